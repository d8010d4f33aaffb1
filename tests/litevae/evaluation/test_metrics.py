import numpy as np
import pytest
from skimage import data

from litevae.evaluation.metrics import psnr, ssim

IMAGE = data.chelsea()[:64, :80]
NOISY = np.clip(IMAGE + np.random.default_rng(0).normal(0, 10, IMAGE.shape), 0, 255).astype(np.uint8)


def test_psnr_equals_the_formula():
    error = np.mean((IMAGE.astype(np.float64) - NOISY) ** 2)
    assert psnr(IMAGE, NOISY) == pytest.approx(10 * np.log10(255**2 / error))


@pytest.mark.filterwarnings("error")
def test_equal_images():
    assert psnr(IMAGE, IMAGE) == np.inf
    assert ssim(IMAGE, IMAGE) == 1


def test_ssim_equals_the_definition():
    """SSIM of Wang et al. (2004) written out per channel, without the border, as in scikit-image."""
    from scipy.ndimage import gaussian_filter

    def blur(x):
        return gaussian_filter(x, sigma=1.5, radius=5)

    values = []
    for x, y in zip(np.moveaxis(IMAGE / 1.0, 2, 0), np.moveaxis(NOISY / 1.0, 2, 0), strict=True):
        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        values.append(index[5:-5, 5:-5].mean())
    assert ssim(IMAGE, NOISY) == pytest.approx(np.mean(values), rel=1e-9)
