import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.cli import main
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.evaluation.latent_space import collect_latents, distance_from_gaussian, squared_mmd
from litevae.evaluation.pictures import latents_as_rgb
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
    # distances of about 50 and kernels of about 1, some tens of roundings each
    assert found.tolist() == pytest.approx(expected, rel=0, abs=1e-13)


def test_mmd_is_unbiased():
    """Two Gaussians of unit variance, their means apart: the expectation is known."""
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


def test_latents_are_samples_of_each_image(model, folder):
    images = open_images(str(folder))
    latents = collect_latents(model, images, SIZE, batch_size=3, workers=0)
    assert (latents.shape, latents.dtype) == ((8, 4, 8, 8), torch.float32)
    # float32 convolutions of batches of another size round differently
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


def test_first_three_channels_are_red_green_and_blue():
    latent = torch.stack(
        [*torch.meshgrid(torch.arange(50.0), torch.arange(50.0), indexing="ij"), *torch.randn(2, 50, 50)]
    )
    (picture,) = latents_as_rgb([latent], principal=False)
    low, high = np.percentile(latent[:3].flatten(1).numpy(), (1, 99), axis=1)
    expected = np.clip((latent[:3].numpy() - low[:, None, None]) / (high - low)[:, None, None], 0, 1) * 255
    assert np.abs(picture.transpose(2, 0, 1) - expected).max() <= 0.51
    assert latents_as_rgb([latent[:2]], principal=False)[0].shape == (50, 50, 3)


class TestCommand:
    @pytest.fixture
    def run(self, model, folder, tmp_path, capsys):
        model.save_pretrained(tmp_path / "model")
        command = [
            "latents",
            tmp_path / "model",
            folder,
            "-o",
            tmp_path / "out",
            "--workers",
            0,
            "--size",
            SIZE,
        ]

        def run(*arguments, status=0):
            assert main([str(argument) for argument in (*command, *arguments)]) == status
            return capsys.readouterr()

        return run

    def test_result(self, run, tmp_path, model, folder):
        output = run("--groups", 4).out
        record = json.loads((tmp_path / "out" / "latents.json").read_text())
        latents = collect_latents(model, open_images(str(folder)), SIZE, workers=0)
        expected = distance_from_gaussian(latents, groups=4)
        assert [d["sigma"] for d in record["squared_mmd"]] == [25, 50, 100, 250, 500]
        assert [d["mean"] for d in record["squared_mmd"]] == pytest.approx(
            [d.mean for d in expected], rel=1e-6
        )
        assert record["count"] == 8
        assert f"   50{1000 * expected[1].mean:9.2f} ± {1000 * expected[1].std:.2f}\n" in output
        with Image.open(tmp_path / "out" / "latents.png") as picture:
            assert picture.width > 1000  # three columns
        with Image.open(tmp_path / "out" / "distances.png") as picture:
            assert picture.size == (1200, 480)

        assert "latents.json exists already" in run(status=2).err
        assert run("--groups", 4, "--overwrite").out == output

    def test_too_few_images_are_one_line(self, run, tmp_path):
        error = run(status=2).err.splitlines()[-1]
        assert "8 images cannot be shared among 10 groups" in error
        assert not (tmp_path / "out").exists()
