"""The regularisation of the latent (Section 3)."""

from torch import Tensor


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Returns KL(N(mean, exp(logvar)) || N(0, 1)) in nats, the mean over the latent's elements.

    LDM sums this loss over a latent and the reconstruction's over an image: its weight times h·w·n_z / (H·W·C) is
    the equivalent weight here. Its 1e-6 is 1e-6·n_z / (3·f²), or 2.083e-8 for n_z = 4 and f = 8.

    Args:
        mean, logvar: mean and log-variance of the posterior, (N, n_z, h, w).

    Returns:
        A scalar.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
