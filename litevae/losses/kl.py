"""The regulariser of the latent (Section 3)."""

from torch import Tensor


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, the mean over the latent's elements.

    Args:
        mean, logvar: (N, n_z, h, w), the posterior's mean and the logarithm of its variance.

    Returns:
        A scalar. LDM sums over a latent instead: its weight times h·w·n_z / (H·W·C) is the weight here.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
