"""Metrics during training against those of `evaluate` on the same images."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import litevae.evaluation.metrics as metrics_module
import litevae.evaluation.validation as validation_module
from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.metrics import METRICS, is_better
from litevae.evaluation.validation import Validation

SIZE, COUNT = 32, 5

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(seed):
    torch.manual_seed(seed)
    sizes = {"block_out_channels": (16, 16, 16), "layers_per_block": 1, "num_groups": 4}
    return LiteVAE.from_preset("litevae-s", **sizes)


def test_metrics_are_those_of_an_evaluation_for_each_model_in_turn(tmp_path, stand_in_networks):
    images = [data.chelsea()[20 * i : 20 * i + SIZE, 30 * i : 30 * i + SIZE].copy() for i in range(COUNT)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    validation = Validation(images, ["rfid", "lpips", "st_lpips"])
    for seed in range(2):
        model = make_model(seed)
        found, pairs = validation(model)
        expected = evaluate(
            model,
            open_images(str(tmp_path)),
            METRICS,
            SIZE,
            batch_size=1,
            workers=0,
            features=stand_in_networks,
        )
        assert list(found) == list(METRICS)
        assert found == pytest.approx(expected.values, rel=1e-4)
        assert all(np.array_equal(image, pair[0]) for image, pair in zip(images, pairs, strict=True))


def test_only_psnr_and_ssim_are_measured_unasked(monkeypatch):
    monkeypatch.setattr(validation_module, "make_fid", None)
    for name in ("LPIPS", "STLPIPS"):
        monkeypatch.setattr(metrics_module, name, None)
    found, _ = Validation([data.chelsea()[:SIZE, :SIZE].copy()])(make_model(0))
    assert list(found) == ["psnr", "ssim"]


def test_rfid_of_one_image_is_refused():
    with pytest.raises(UserError, match="rfid needs at least two images, got 1"):
        Validation([data.chelsea()], ["rfid"])


def test_images_that_are_too_small_are_refused():
    images = [data.chelsea()[:size, :SIZE].copy() for size in (SIZE, 16)]
    with pytest.raises(UserError, match="st_lpips needs images of at least 21 pixels a side, got 16"):
        Validation(images, ["st_lpips"])


@pytest.mark.parametrize("metric", METRICS)
def test_lower_is_better_for_distances(metric):
    lower = metric in ("rfid", "lpips", "st_lpips")
    assert is_better(metric, 1.0, 2.0) == lower
    assert is_better(metric, 2.0, 1.0) == (not lower)
    assert not is_better(metric, 1.0, 1.0)
    assert not is_better(metric, float("nan"), 1.0)
