import json

import pytest
import torch
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.cli import main
from litevae.evaluation.feature_maps import feature_magnitude, imbalance, inside

SIZE = 32

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**settings):
    torch.manual_seed(0)
    return LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4, **settings
    ).eval()


def test_command(tmp_path, capsys):
    for name, model in (("smc", make(decoder_norm="smc")), ("group", make())):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "images").mkdir()
    squares = [data.chelsea()[20 * i : 20 * i + SIZE, 30 * i : 30 * i + SIZE] for i in range(5)]
    for i, square in enumerate(squares):
        Image.fromarray(square).save(tmp_path / "images" / f"{i}.png")
    command = ["features", "smc", "group", "images", "-o", "out"]
    command[1:4] = [str(tmp_path / part) for part in command[1:4]]
    command[5] = str(tmp_path / "out")
    command += ["--size", str(SIZE), "--names", "SMC,GroupNorm"]
    assert main(command) == 0
    output = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "features.json").read_text())
    expected = imbalance([inside(feature_magnitude(make(), square)) for square in squares])
    assert record["count"] == 5
    assert [model["name"] for model in record["models"]] == ["SMC", "GroupNorm"]
    assert record["models"][1]["imbalance"] == pytest.approx(expected, rel=1e-6)
    assert f"GroupNorm  imbalance {expected:.2f}\n" in output
    with Image.open(tmp_path / "out" / "features.png") as picture:
        assert picture.height > picture.width  # four rows, three columns
    assert main(command) == 2
    assert "features.json already exists" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--size", "30"]) == 2
    assert "SMC does not take images of 30 x 30 pixels" in capsys.readouterr().err
