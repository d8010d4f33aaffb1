from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

from litevae.data.sources import open_images
from litevae.diffusion import LatentDiffusionPipeline, train
from litevae.diffusion.fid import measure_fid
from litevae.diffusion.pipeline import generate
from litevae.errors import UserError
from litevae.evaluation.fid import INCEPTION


class Features(nn.Module):
    """The means of the quarters of an image: 12 numbers."""

    num_features = 12

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_is_the_frechet_distance_of_the_features(tiny, autoencoder, photographs, no_pictures):
    config = tiny("max_steps=1", "fid.count=7", "sample.batch_size=4")
    result = train(config, autoencoder)
    pipeline = LatentDiffusionPipeline.from_pretrained(result.output_dir / "pipeline")
    images = open_images(str(photographs))
    found = measure_fid(pipeline, images, 32, config, Features()).value

    samples = torch.cat(list(generate(pipeline, range(7), 0, 3, 4))).numpy()
    real = np.stack([np.asarray(Image.open(path)) for path in photographs.iterdir()]).transpose(0, 3, 1, 2)

    def moments(pixels):
        parts = pixels.astype(np.float64).reshape(len(pixels), 3, 2, 16, 2, 16)
        features = parts.mean((3, 5)).reshape(len(pixels), 12)
        return features.mean(0), np.cov(features, rowvar=False)

    (mean, cov), (other, other_cov) = moments(samples), moments(real)
    root = sqrtm(cov @ other_cov + 1e-12 * np.eye(12)).real
    expected = ((mean - other) ** 2).sum() + np.trace(cov + other_cov - 2 * root)
    # Both covariances are singular, so a rounding of 2^-53 becomes 1e-8 in the square root; features are float32.
    assert found == pytest.approx(expected, rel=1e-4)


def test_missing_weights_are_named_before_the_training(
    tiny, autoencoder, tmp_path, photographs, monkeypatch, no_pictures
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def offline(*_):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    wanted = f"fid.images={photographs}"
    result = train(tiny("max_steps=1", wanted), autoencoder)
    missing = str(tmp_path / "torch" / "hub" / "checkpoints" / INCEPTION.rpartition("/")[2])
    assert result.fid is None
    assert f"{missing} is missing" in result.no_fid
    with pytest.raises(UserError, match="is not there and cannot be downloaded"):
        train(tiny("max_steps=1", wanted, "fid.measure=always", name="other"), autoencoder)
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="no images to compare with"):
        train(tiny("fid.measure=always", name="third"), autoencoder)
