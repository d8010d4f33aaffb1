import math

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.evaluation.latent_space import (
    SIGMAS,
    collect_latents,
    distance_from_gaussian,
    scaled_sigmas,
    squared_mmd,
)
from litevae.latents.statistics import latent_statistics, measure_latents

SIZE = 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        Image.fromarray(data.chelsea()[20 * i : 20 * i + SIZE, 30 * i : 30 * i + SIZE]).save(
            folder / f"{i}.png"
        )
    (folder / "bad.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4
    ).eval()


def test_mmd_is_the_double_sum():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 2, (5, 3)), rng.normal(0, 1, (7, 3))
    sigmas = (0.5, 2.0, 100.0)

    def kernel(a, b, sigma):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * sigma**2))

    expected = []
    for sigma in sigmas:
        within_x = sum(kernel(x[i], x[j], sigma) for i in range(5) for j in range(5) if i != j) / (5 * 4)
        within_y = sum(kernel(y[i], y[j], sigma) for i in range(7) for j in range(7) if i != j) / (7 * 6)
        between = sum(kernel(a, b, sigma) for a in x for b in y) / (5 * 7)
        expected.append(within_x + within_y - 2 * between)
    found = squared_mmd(torch.from_numpy(x), torch.from_numpy(y), sigmas)
    assert found.dtype == torch.float64
    # Distances are about 50 and kernels about 1, with some tens of roundings each.
    assert found.tolist() == pytest.approx(expected, rel=0, abs=1e-13)


def test_mmd_is_unbiased():
    """The expectation is known for two Gaussians of unit variance with different means."""
    d, sigma, apart, draws = 6, 2.0, 0.8, 4000
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, draws, 4, d, generator=generator, dtype=torch.float64)
    x[..., 0] += apart
    estimates = torch.stack([squared_mmd(a, b, [sigma])[0] for a, b in zip(x, y, strict=True)])
    overlap = (sigma**2 / (sigma**2 + 2)) ** (d / 2)
    expected = 2 * overlap * (1 - math.exp(-(apart**2) / (2 * (sigma**2 + 2))))
    assert abs(estimates.mean().item() - expected) < 4 * estimates.std().item() / draws**0.5


def test_error_bars_are_those_of_the_groups():
    torch.manual_seed(0)
    latents = 3 * torch.randn(12, 4, 2, 2) + 1
    (found,) = distance_from_gaussian(latents, [2.0], groups=3)
    scaled = latents.double().flatten(1) / latents.double().std(correction=0)
    noise = torch.randn(12, 16, generator=torch.Generator().manual_seed(-1)).double()
    estimates = [squared_mmd(scaled[i::3], noise[i::3], [2.0]).item() for i in range(3)]
    assert found.mean == pytest.approx(np.mean(estimates), rel=1e-9)
    assert found.std == pytest.approx(np.std(estimates, ddof=1), rel=1e-9)
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(estimates), scipy.stats.sem(estimates))
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-6)


def test_bandwidths_grow_with_the_distances_of_the_latents():
    assert scaled_sigmas(4096) == list(SIGMAS)
    assert scaled_sigmas(256) == [sigma / 4 for sigma in SIGMAS]
    found = distance_from_gaussian(torch.randn(4, 4, 8, 8), groups=2)
    assert [each.sigma for each in found] == scaled_sigmas(256)


def test_gaussian_latents_are_near_and_others_far():
    latents = 5 * torch.stack(
        [torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(200)]
    )
    near, far = (distance_from_gaussian(z, [8.0], groups=5)[0] for z in (latents, latents + 5))
    assert abs(near.mean) < 4 * near.std / 5**0.5
    assert far.mean > 4 * far.std


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"at least 2, got \(1, 3\) and \(4, 3\)"):
        squared_mmd(torch.zeros(1, 3), torch.zeros(4, 3), [1.0])
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(4, 5\)"):
        squared_mmd(torch.zeros(2, 3), torch.zeros(4, 5), [1.0])
    with pytest.raises(UserError, match="7 images cannot be shared among 4 groups"):
        distance_from_gaussian(torch.randn(7, 1, 2, 2), groups=4)
    with pytest.raises(UserError, match="all equal"):
        distance_from_gaussian(torch.ones(8, 1, 2, 2), groups=4)


def test_nothing_readable_says_why(model, broken_images):
    folder, message = broken_images
    with pytest.raises(UserError) as caught:
        collect_latents(model, open_images(str(folder)), SIZE, workers=0)
    assert str(caught.value) == message


def test_latents_are_samples_of_each_image(model, folder):
    images = open_images(str(folder))
    latents = collect_latents(model, images, SIZE, batch_size=3, workers=0)
    assert (latents.shape, latents.dtype) == ((8, 4, 8, 8), torch.float32)
    # float32 convolutions round differently in batches of another size.
    torch.testing.assert_close(
        collect_latents(model, images, SIZE, batch_size=8, workers=0), latents, rtol=1e-4, atol=1e-4
    )
    pixels = np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in range(8)])
    with torch.no_grad():
        posterior = model.encode(
            torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 127.5 - 1
        ).latent_dist
    noise = (latents - posterior.mean) / posterior.std  # 2048 samples of a standard Gaussian
    assert abs(noise.mean().item()) < 5 / 2048**0.5
    assert noise.std().item() == pytest.approx(1, abs=5 / (2 * 2048) ** 0.5)

    found, exact = latent_statistics(latents), measure_latents(model, images, SIZE, workers=0)
    assert found.count == exact.count == 8
    error = 5 * posterior.std.max().item() / (8 * 64) ** 0.5
    assert found.mean == pytest.approx(exact.mean, abs=error)
    assert found.std == pytest.approx(exact.std, abs=error)
    assert 1 / found.scaling_factor == pytest.approx(latents.std(correction=0).item(), rel=1e-5)
