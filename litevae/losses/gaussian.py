"""The Gaussian high-frequency loss of Section 4.3."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The paper does not specify the filter; the works that it cites use 5x5 taps and sigma 1.
RADIUS = 2
SIGMA = 1.0


def gaussian_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Returns mean |(x - h(x)) - (x̂ - h(x̂))|, where h is a 5x5 Gaussian blur of sigma 1 with mirrored borders.

    Args:
        image, reconstruction: images (N, C, H, W) with H and W at least 3.

    Returns:
        A scalar, the mean over all elements. It is zero if the images are equal.
    """
    difference = reconstruction - image  # the blur is linear
    return (difference - blur(difference)).abs().mean()


def blur(image: Tensor) -> Tensor:
    """Returns images (N, C, H, W) with each channel blurred separately."""
    taps = torch.arange(-RADIUS, RADIUS + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (taps / SIGMA).square())
    kernel = kernel / kernel.sum()
    n, c, h, w = image.shape
    planes = F.pad(image.reshape(n * c, 1, h, w), [RADIUS] * 4, mode="reflect")
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return planes.view(n, c, h, w)
