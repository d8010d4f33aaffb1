"""Distances between an image and its reconstruction, on uint8 pixels."""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from litevae.images import Pixels


def psnr(image: Pixels, reconstruction: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two (H, W, 3) uint8 images; infinite where they are equal."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(image, reconstruction, data_range=255))


def ssim(image: Pixels, reconstruction: Pixels) -> float:
    """Structural similarity of two (H, W, 3) uint8 images of at least 11 pixels, the mean over channels.

    With the settings of Wang et al. (2004): 11x11 Gaussian window of sigma 1.5, population covariance.
    """
    return float(
        structural_similarity(
            image,
            reconstruction,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
