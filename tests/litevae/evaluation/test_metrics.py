import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from litevae.data.pixels import PixelFormat
from litevae.errors import UserError
from litevae.evaluation.metrics import (
    batch_psnr,
    batch_ssim,
    check_metric_sizes,
    check_metrics_apply,
    psnr,
    ssim,
)

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


def test_images_that_are_too_small_for_a_metric():
    check_metric_sizes(["psnr", "st_lpips"], [21, 256])
    check_metric_sizes(["psnr", "ssim"], [16])
    with pytest.raises(UserError, match="st_lpips needs images of at least 21 pixels a side, got 20"):
        check_metric_sizes(["psnr", "st_lpips"], [256, 20])


@pytest.mark.parametrize(("low", "high"), [(0, 65535), (-1000, 3000)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_metrics_of_values_are_those_of_scikit_image_in_their_range(low, high, channels):
    random = np.random.default_rng(0)
    image = random.uniform(low, high, (40, 48, channels))
    other = np.clip(image + random.normal(0, (high - low) / 20, image.shape), low, high)
    images = PixelFormat(channels, (low, high))
    levels = [images.to_levels(each) for each in (image, other)]
    # Values are measured from the lower end of the range on, which is what black is in an image.
    expected = [
        peak_signal_noise_ratio(image, other, data_range=high - low),
        structural_similarity(
            image - low,
            other - low,
            channel_axis=2,
            data_range=high - low,
            gaussian_weights=True,
            use_sample_covariance=False,
        ),
    ]
    batches = [torch.from_numpy(each).permute(2, 0, 1)[None] for each in levels]
    # Levels are rounded to float32: by 2^-17 of 255, on errors of about 255 / 20.
    assert [psnr(*levels), ssim(*levels)] == pytest.approx(expected, rel=1e-5)
    assert [batch_psnr(*batches).item(), batch_ssim(*batches).item()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("images", [PixelFormat(1), PixelFormat(4), PixelFormat(3, (0, 65535))], ids=str)
@pytest.mark.parametrize("metric", ["rfid", "lpips", "st_lpips"])
def test_metrics_of_networks_are_for_rgb_of_8_bits(metric, images):
    with pytest.raises(
        UserError, match=f"here: {metric} compares RGB images of 8 bits, and the model's are {images}"
    ):
        check_metrics_apply(["psnr", metric], images, "here: ")
    check_metrics_apply(["psnr", "ssim"], images)
    check_metrics_apply(["psnr", metric], PixelFormat())
