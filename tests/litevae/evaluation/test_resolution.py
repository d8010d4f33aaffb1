import math

import pytest
import torch
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.resolution import check_takes, relative_degradation, sweep_resolutions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        Image.fromarray(data.chelsea()[20 * i : 20 * i + 64, 30 * i : 30 * i + 64]).save(folder / f"{i}.png")
    return folder


def make(seed, kind=LiteVAE):
    torch.manual_seed(seed)
    return kind.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4, sample_size=32
    ).eval()


class OneSize(LiteVAE):
    """A model that takes one size only, like one with a Vision Transformer."""

    def encode(self, x, return_dict=True):
        if x.shape[-1] != 32:
            raise ValueError(f"the Vision Transformer takes 32x32, got {x.shape[-1]}x{x.shape[-1]}")
        return super().encode(x, return_dict)


def test_a_sweep_is_evaluate_at_each_size(folder):
    models, images = {"a": make(0), "b": make(1)}, open_images(str(folder))
    found = sweep_resolutions(models, images, (32, 64), ("ssim", "psnr"), batch_size=2, workers=0)
    assert found == {
        name: {
            size: evaluate(model, images, ("ssim", "psnr"), size, batch_size=2, workers=0)
            for size in (32, 64)
        }
        for name, model in models.items()
    }
    assert len({result.values["psnr"] for by_size in found.values() for result in by_size.values()}) == 4


def test_a_model_of_one_size_is_refused_before_anything_is_measured(folder, capsys):
    models = {"first": make(0), "vit": make(0, OneSize)}
    with pytest.raises(UserError, match=r"^vit does not take images of 64 x 64 pixels: the Vision Trans"):
        sweep_resolutions(models, open_images(str(folder)), (32, 64), workers=0)
    assert capsys.readouterr().err == ""  # no progress bar
    with pytest.raises(UserError, match="the Vision Transformer takes 32x32, got 64x64"):
        evaluate(models["vit"], open_images(str(folder)), ("psnr",), 64, workers=0)
    check_takes("vit", models["vit"], 32)
    with pytest.raises(UserError, match="first does not take images of 30 x 30 pixels: size must be a mult"):
        check_takes("first", models["first"], 30)


def test_degradation():
    psnr = {64: 20.0, 128: 25.0, 256: 30.0}
    assert relative_degradation(psnr, "psnr", 128) == {64: 20.0, 128: 0.0, 256: -20.0}
    assert relative_degradation(psnr, "psnr", 96) == pytest.approx({64: 100 / 3, 128: 100 / 6, 256: 0})
    lpips = {64: 0.5, 128: 0.25}
    assert relative_degradation(lpips, "lpips", 128) == {64: 100.0, 128: 0.0}
    assert relative_degradation(lpips, "rfid", 32) == {64: 100.0, 128: 0.0}  # the lowest value is the best
    for undefined in (0.0, math.inf):
        assert all(map(math.isnan, relative_degradation({32: undefined, 64: 1.0}, "psnr", 32).values()))
