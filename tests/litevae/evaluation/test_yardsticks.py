"""The yardsticks, with PyWavelets and scikit-image as oracles."""

import numpy as np
import pytest
import pywt
import torch
from skimage import data
from skimage.measure import block_reduce
from skimage.metrics import peak_signal_noise_ratio

from litevae import LiteVAE
from litevae.evaluation.metrics import ssim
from litevae.evaluation.yardsticks import (
    BLOCK_MEANS,
    HAAR,
    MEAN_COLOUR,
    YARDSTICKS,
    below_haar,
    coarsest_haar,
    for_json,
    haar_count,
    make_yardsticks,
    measure_yardsticks,
    reconstruct_without_learning,
    yardstick_labels,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(factor=8, n_z=12):
    widths = (16,) * factor.bit_length()
    with torch.device("meta"):
        return LiteVAE.from_preset(
            "litevae-s", latent_channels=n_z, block_out_channels=widths, layers_per_block=1, num_groups=4
        )


def kept_by_pywavelets(channel, factor, count):
    """Returns the image of the first `count` coefficients per block of `factor` pixels, in PyWavelets' order."""
    levels = int(np.log2(factor))
    coefficients = pywt.wavedec2(channel.astype(float), "haar", mode="symmetric", level=levels)
    left = count
    for level, entry in enumerate(coefficients):
        side = 2 ** max(level - 1, 0)
        for band in entry if level else [entry]:
            for row in range(side):
                for column in range(side):
                    if left <= 0:
                        band[row::side, column::side] = 0
                    left -= 1
    return pywt.waverec2(coefficients, "haar")[: channel.shape[0], : channel.shape[1]]


@pytest.mark.parametrize(
    ("factor", "n_z", "count"),
    [
        (8, 3, 3),
        (8, 4, 3),
        (8, 12, 12),
        (8, 16, 15),
        (8, 32, 30),
        (4, 12, 12),
        (2, 7, 6),
        (4, 48, 48),
        (4, 64, 48),
    ],
)
@pytest.mark.parametrize("size", [(64, 48), (61, 45)])
def test_haar_is_pywavelets_with_the_rest_set_to_zero(factor, n_z, count, size):
    model, image = make_model(factor, n_z), data.chelsea()[100 : 100 + size[0], 100 : 100 + size[1]]
    assert haar_count(model) == count
    found = coarsest_haar(torch.from_numpy(image).permute(2, 0, 1)[None].float(), factor, count // 3)[0]
    expected = np.dstack([kept_by_pywavelets(image[..., c], factor, count // 3) for c in range(3)])
    # Sums of 8-bit numbers divided by powers of two are exact in float32.
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-10)
    rounded = np.clip(np.rint(found.permute(1, 2, 0).numpy()), 0, 255)
    np.testing.assert_array_equal(reconstruct_without_learning(model, image)[HAAR], rounded)


def test_fewer_channels_than_colours_give_grey():
    found = reconstruct_without_learning(make_model(n_z=2), data.chelsea()[:16, :24])[HAAR]
    assert (found == 128).all()


def test_block_means_and_mean_colour():
    image = data.chelsea()[40:96, 100:164]
    found = reconstruct_without_learning(make_model(), image)
    means = torch.from_numpy(block_reduce(image, (8, 8, 1), np.mean)).permute(2, 0, 1)[None]
    enlarged = torch.nn.functional.interpolate(means, size=image.shape[:2], mode="bicubic")[0].permute(
        1, 2, 0
    )
    np.testing.assert_array_equal(found[BLOCK_MEANS], enlarged.round().clamp(0, 255).byte().numpy())
    assert (found[MEAN_COLOUR] == np.rint(image.mean((0, 1)))).all()


def test_known_figures_of_a_photograph():
    image = data.chelsea()  # 300 x 451: odd sizes
    measured = measure_yardsticks(make_model(), [image])
    assert measured[HAAR] == {"psnr": pytest.approx(28.53, abs=0.01), "ssim": pytest.approx(0.728, abs=1e-3)}
    assert measured[BLOCK_MEANS]["psnr"] == pytest.approx(27.09, abs=0.01)
    restored = reconstruct_without_learning(make_model(), image)
    for name in YARDSTICKS:
        assert measured[name]["psnr"] == pytest.approx(peak_signal_noise_ratio(image, restored[name]))
        assert measured[name]["ssim"] == pytest.approx(ssim(image, restored[name]))


def test_a_batch_is_its_images_and_a_single_pixel_is_an_image():
    model, images = make_model(), np.stack([data.chelsea()[:31, i : i + 40] for i in (0, 90)])
    batch = make_yardsticks(model, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert list(batch) == list(YARDSTICKS)
    for i, image in enumerate(images):
        for name, single in reconstruct_without_learning(model, image).items():
            np.testing.assert_array_equal(batch[name][i].permute(1, 2, 0).numpy(), single)
    pixel = data.chelsea()[:1, :1]
    for restored in reconstruct_without_learning(model, pixel).values():
        np.testing.assert_array_equal(restored, pixel)


def test_labels_say_what_is_kept():
    assert yardstick_labels(make_model(4, 4)) == {
        MEAN_COLOUR: "mean colour",
        BLOCK_MEANS: "4x4 block means, enlarged",
        HAAR: "3 Haar coefficients per 4x4 block",
    }


def test_an_infinite_psnr_is_none_in_json():
    assert for_json({HAAR: {"psnr": np.inf, "ssim": 1.0}}) == {HAAR: {"psnr": None, "ssim": 1.0}}


def test_only_a_lower_psnr_is_below():
    yardsticks = {HAAR: {"psnr": 28.0}}
    assert below_haar({"psnr": 27.9}, yardsticks)
    assert not below_haar({"psnr": 28.0}, yardsticks)
    assert not below_haar({"rfid": 1.0}, {HAAR: {"rfid": 2.0}})


@pytest.mark.parametrize(("channels", "kept"), [(1, 12), (4, 3)])
def test_the_latents_numbers_are_shared_by_the_channels(channels, kept):
    with torch.device("meta"):
        model = LiteVAE.from_preset("litevae-s", in_channels=channels, latent_channels=12 + channels // 4)
    image = np.random.default_rng(0).uniform(0, 255, (32, 24, channels)).astype(np.float32)
    found = reconstruct_without_learning(model, image)[HAAR]
    assert haar_count(model) == 12
    assert found.dtype == np.float32
    for channel in range(channels):
        expected = kept_by_pywavelets(image[..., channel] - 127.5, 8, kept) + 127.5
        np.testing.assert_allclose(found[..., channel], expected.clip(0, 255), atol=1e-3)
    assert (found != np.rint(found)).mean() > 0.9  # values of a range are not rounded
