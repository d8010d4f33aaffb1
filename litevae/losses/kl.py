"""The regularisation of the latent (Section 3)."""

from torch import Tensor


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Returns KL(N(mean, exp(logvar)) || N(0, 1)) in nats, the mean over the latent's elements.

    LDM sums over the elements instead: its weight times h·w·n_z / (H·W·C) is the equivalent weight here.

    Args:
        mean, logvar: mean and log-variance of the posterior, (N, n_z, h, w).

    Returns:
        A scalar.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
