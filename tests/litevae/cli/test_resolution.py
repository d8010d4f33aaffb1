import json

import numpy as np
import pytest
import torch
from PIL import Image

from litevae import LiteVAE
from litevae.cli import main
from litevae.data.sources import open_images
from litevae.evaluation.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def make(seed):
    torch.manual_seed(seed)
    return LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4, sample_size=32
    ).eval()


@pytest.fixture
def run(squares, tmp_path, capsys):
    for seed, name in enumerate(("smc", "group")):
        make(seed).save_pretrained(tmp_path / name)
    command = ["resolution", tmp_path / "smc", tmp_path / "group", squares, "-o", tmp_path / "out"]

    def run(*arguments, status=0):
        assert main([str(a) for a in (*command, "--workers", 0, *arguments)]) == status
        return capsys.readouterr()

    return run


def test_result(run, tmp_path, squares):
    output = run("--sizes", "64,32").out
    record = json.loads((tmp_path / "out" / "resolution.json").read_text())
    assert [model["name"] for model in record["models"]] == ["smc", "group"]
    expected = evaluate(make(1), open_images(str(squares)), ("psnr", "ssim"), 64, workers=0).values
    model = record["models"][1]
    assert model["trained_at"] == 32
    assert "32 x 32 and 64 x 64" in model["crop"]
    assert [result["size"] for result in model["results"]] == [32, 64]
    assert model["results"][1]["metrics"] == expected
    assert model["results"][0]["degradation_percent"] == {"psnr": 0, "ssim": 0}
    before = model["results"][0]["metrics"]["psnr"]
    worse = 100 * (before - expected["psnr"]) / before
    assert model["results"][1]["degradation_percent"]["psnr"] == pytest.approx(worse)
    assert f"group    64{expected['psnr']:10.2f}{worse:+10.1f} %" in output
    assert list(model["results"][0]["yardsticks"])[-1] == "3 Haar coefficients per 4x4 block"
    assert output.count("below the Haar yardstick\n") == 4  # the models are not trained
    with Image.open(tmp_path / "out" / "resolution.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert "resolution.json already exists" in run(status=2).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64,x"], "--sizes must be different whole numbers such as 64,128,256, got '64,x'"),
        (["--sizes", "64,64"], "--sizes must be different"),
        (["--sizes", "30"], "smc does not take images of 30 x 30 pixels: size must be a multiple of 4"),
        (["--names", "A"], "--names must be 2 different names, separated by commas, got A"),
        (["--names", "A,A"], "--names must be 2 different names"),
        (["--metrics", "st_lpips", "--sizes", "20,32"], "st_lpips needs images of at least 21 pixels a side"),
        (["--metrics", "mse"], "error: unknown metric 'mse'"),
    ],
)
def test_mistake_is_one_line(run, tmp_path, arguments, message):
    error = run(*arguments, status=2).err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
