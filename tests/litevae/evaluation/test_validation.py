"""Metrics during training against those of `evaluate` on the same images."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import litevae.evaluation.evaluate as evaluate_module
import litevae.evaluation.validation as validation_module
from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.fid import make_fid
from litevae.evaluation.metrics import METRICS, is_better
from litevae.evaluation.validation import Validation
from litevae.losses.perceptual import LPIPS

SIZE, COUNT = 32, 5

pytestmark = pytest.mark.usefixtures("one_thread")


class Colours(torch.nn.Module):
    """Features that are easy to compute: the mean of each colour."""

    num_features = 3

    def forward(self, images):
        return images.double().mean((2, 3))


def make_model(seed):
    torch.manual_seed(seed)
    sizes = {"block_out_channels": (16, 16, 16), "layers_per_block": 1, "num_groups": 4}
    return LiteVAE.from_preset("litevae-s", **sizes)


def test_metrics_are_those_of_an_evaluation_for_each_model_in_turn(tmp_path, monkeypatch):
    lpips = LPIPS(pretrained=False)
    for module in (evaluate_module, validation_module):
        monkeypatch.setattr(module, "LPIPS", lambda: lpips)
    monkeypatch.setattr(validation_module, "make_fid", lambda _: make_fid(Colours()))
    images = [data.chelsea()[20 * i : 20 * i + SIZE, 30 * i : 30 * i + SIZE].copy() for i in range(COUNT)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    validation = Validation(images, ["rfid", "lpips"])
    for seed in range(2):
        model = make_model(seed)
        found, pairs = validation(model)
        expected = evaluate(
            model, open_images(str(tmp_path)), METRICS, SIZE, batch_size=1, workers=0, features=Colours()
        )
        assert list(found) == list(METRICS)
        assert found == pytest.approx(expected.values, rel=1e-4)
        assert all(np.array_equal(image, pair[0]) for image, pair in zip(images, pairs, strict=True))


def test_only_psnr_and_ssim_are_measured_unasked(monkeypatch):
    for name in ("LPIPS", "make_fid"):
        monkeypatch.setattr(validation_module, name, None)
    found, _ = Validation([data.chelsea()[:SIZE, :SIZE].copy()])(make_model(0))
    assert list(found) == ["psnr", "ssim"]


def test_rfid_of_one_image_is_refused():
    with pytest.raises(UserError, match="rfid needs at least two images, got 1"):
        Validation([data.chelsea()], ["rfid"])


@pytest.mark.parametrize("metric", METRICS)
def test_lower_is_better_for_distances(metric):
    lower = metric in ("rfid", "lpips")
    assert is_better(metric, 1.0, 2.0) == lower
    assert is_better(metric, 2.0, 1.0) == (not lower)
    assert not is_better(metric, 1.0, 1.0)
    assert not is_better(metric, float("nan"), 1.0)
