import json
import re
from dataclasses import asdict

import pytest
from PIL import Image

from litevae import LiteVAE
from litevae.cli import main
from litevae.evaluation.complexity import measure_complexity


def test_table(tmp_path, capsys):
    model = LiteVAE.from_preset("litevae-s", block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    model.save_pretrained(tmp_path / "model")
    settings = ["--size", "64", "--batch-size", "1", "--rounds", "1"]
    assert main(["complexity", str(tmp_path), "litevae-s", *settings, "--precision", "bf16"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("1 x 3 x 64 x 64, bf16; ")
    for name in (str(tmp_path), "litevae-s"):  # the cost is a sixteenth of that at 256
        assert re.search(rf"^{name} +1,038,308 +0\.36 +\S+ +\d\S*$", output, re.MULTILINE)
    assert main(["complexity", str(tmp_path), *settings, "--decoder"]) == 0
    cost = measure_complexity(model, 64)
    output = capsys.readouterr().out
    assert f"{cost.decoder_parameters:14,}{cost.decoder_macs / 1e9:10,.2f}" in output


def test_figures_and_picture(tmp_path, capsys):
    tiny = [LiteVAE.from_preset("litevae-s", block_out_channels=(16, 16, c), num_groups=4) for c in (16, 32)]
    names = [str(tmp_path / name) for name in ("a", "b")]
    for name, model in zip(names, tiny, strict=True):
        model.save_pretrained(name)
    command = [
        "complexity",
        *names,
        *["--size", "64", "--batch-size", "1", "--rounds", "1"],
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    output = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "complexity.json").read_text())
    assert (record["side"], record["size"], record["batch_size"]) == ("encoder", 64, 1)
    for name, model, own in zip(names, record["models"], tiny, strict=True):
        assert model["name"] == name
        cost = asdict(measure_complexity(own, 64))
        assert {key: model[key] for key in cost} == {**cost, "latent_shape": [4, 16, 16]}
        assert f" {model['images_per_second']:.4g}\n" in output
    with Image.open(tmp_path / "out" / "complexity.png") as picture:
        assert picture.width == 1560
    assert main(command) == 2
    assert "complexity.json already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["litevae-x"], "did you mean 'litevae-"),
        (["litevae-s", "--size", "30"], "litevae-s: --size 30: "),
        (["litevae-s", "--precision", "int8"], "'int8' is not one of 'auto', 'fp32', 'bf16', 'fp16'"),
    ],
)
def test_mistake_is_one_line(arguments, message, capsys):
    assert main(["complexity", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
