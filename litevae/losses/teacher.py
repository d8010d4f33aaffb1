"""The distance of the encoder's posterior from a teacher's."""

import torch
from torch import Tensor


def teacher_kl_loss(mean: Tensor, logvar: Tensor, teacher_mean: Tensor, teacher_logvar: Tensor) -> Tensor:
    """Returns KL(N(m, exp(v)) || N(mean, exp(logvar))) in nats, the mean over the latent's elements.

    With the teacher's mean m and log-variance v, it is per element

        ½ (exp(v - logvar) + (m - mean)² exp(-logvar) - 1 - (v - logvar)).

    Up to a constant this is the negative log-likelihood of the teacher's samples under the encoder's posterior. Its
    gradient is divided by the encoder's own variance. The opposite direction divides by the teacher's, which
    published autoencoders let fall to exp(-30), so that a few elements would outweigh all others. In return, the
    variance that is best for a wrong mean is exp(v) + (m - mean)²: the distance of the log-variances, a term of its
    own, counteracts that.

    Args:
        mean, logvar: mean and log-variance of the encoder's posterior, (N, n_z, h, w).
        teacher_mean, teacher_logvar: the same of the teacher's posterior.

    Returns:
        A scalar.
    """
    difference = teacher_logvar - logvar
    error = (teacher_mean - mean).square() * torch.exp(-logvar)
    return 0.5 * (torch.expm1(difference) - difference + error).mean()
