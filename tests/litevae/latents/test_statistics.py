import json

import numpy as np
import pytest
import torch
from PIL import Image

from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents.statistics import (
    LatentStatistics,
    latent_statistics,
    measure_latents,
    read_statistics,
    store_scale,
)

SIZE = 32


def test_nothing_readable_says_why(uneven_model, broken_images):
    folder, message = broken_images
    with pytest.raises(UserError) as caught:
        measure_latents(uneven_model, open_images(str(folder)), SIZE, workers=0)
    assert str(caught.value) == message


def test_statistics_are_those_of_samples(uneven_model, square_images):
    found = measure_latents(uneven_model, open_images(str(square_images)), SIZE, batch_size=2, workers=0)
    assert found.count == 5
    pixels = np.stack([np.asarray(Image.open(square_images / f"{i}.png")) for i in range(5)])
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).double() / 127.5 - 1
    draws = 2000
    with torch.no_grad():
        posterior = uneven_model.encode(images.float()).latent_dist
        samples = posterior.mean.double() + posterior.std.double() * torch.randn(
            draws, *posterior.mean.shape, dtype=torch.float64
        )
    # five standard errors of the noise; the images are the same
    each = samples.transpose(0, 2).flatten(1)
    error = 5 * posterior.std.max().double() / each.shape[1] ** 0.5
    assert (torch.tensor(found.mean) - each.mean(1)).abs().max() < error
    assert (torch.tensor(found.std) - each.std(1)).abs().max() < error
    assert 1 / found.scaling_factor == pytest.approx(samples.std().item(), abs=error.item())


def test_count_takes_images_at_equal_distances(uneven_model, square_images):
    (square_images / "bad.png").unlink()
    images = open_images(str(square_images))
    assert measure_latents(uneven_model, images, SIZE, count=3, workers=0).count == 3
    with pytest.raises(UserError, match="size must be a multiple of 4, at least 16, got 30"):
        measure_latents(uneven_model, images, 30)


def test_latents_have_the_statistics_of_their_elements():
    latents = 3 * torch.randn(5, 4, 8, 8) + torch.arange(4.0).reshape(4, 1, 1)
    found = latent_statistics(latents)
    values = latents.double().numpy()
    assert found.count == 5
    np.testing.assert_allclose(found.mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.std, values.std((0, 2, 3)), rtol=1e-12)
    assert found.scaling_factor == pytest.approx(1 / values.std(), rel=1e-12)
    with pytest.raises(UserError, match="all equal"):
        latent_statistics(torch.ones(2, 4, 8, 8))


def test_statistics_are_added_to_the_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_name_or_path": "x", "scaling_factor": 1.0, "other": [1]}))
    store_scale(path, LatentStatistics((0.0, 1.0), (2.0, 3.0), 0.4, 5))
    assert json.loads(path.read_text()) == {
        "scaling_factor": 0.4,
        "shift_factor": 0.0,
        "latents_mean": None,
        "latents_std": None,
        "other": [1],
    }
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.json", "latent_statistics.json"]


def test_stored_statistics_are_read_and_anything_else_is_refused(tmp_path):
    found = LatentStatistics((0.5, -1.0), (2.0, 0.25), 0.75, 12)
    (tmp_path / "config.json").write_text("{}")
    store_scale(tmp_path / "config.json", found)
    assert read_statistics(tmp_path, 0.75, 2) == found

    def error(scaling_factor=0.75, channels=2):
        with pytest.raises(UserError) as caught:
            read_statistics(tmp_path, scaling_factor, channels)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "belongs to another scaling_factor than config.json's 1.5" in error(1.5)
    assert "does not hold the statistics of 3 channels" in error(channels=3)
    path = tmp_path / "latent_statistics.json"
    whole = json.loads(path.read_text())
    for wrong in ([], {}, whole | {"std": [1.0, 0.0]}, whole | {"mean": "ab"}, whole | {"mean": [1e400, 0]}):
        path.write_text(json.dumps(wrong))
        assert "does not hold the statistics of 2 channels" in error()
    path.unlink()
    assert "holds no latent_statistics.json: run litevae scale" in error()
