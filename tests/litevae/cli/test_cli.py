import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.data.images import read_image
from litevae.models.baseline import SmallEncoderVAE

COMMANDS = ["train", "config", "reconstruct", "info", "scale", "encode", "eval", "complexity", "latents"]
COMMANDS += ["resolution", "features", "gradients", "train-diffusion", "experiment"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(litevae, command):
    assert f"Example: litevae {command}" in litevae(command, "--help")


def test_no_command_is_help(litevae):
    assert litevae() == litevae("--help")
    assert all(f" litevae {command}" in litevae() for command in COMMANDS)
    assert "Example: litevae train demo" in litevae()


def test_version(litevae):
    assert litevae("--version").startswith("litevae")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian"),
        (["train"], "Missing argument 'CONFIG'. See litevae train --help."),
        (["train", "dmeo"], "did you mean 'demo'?"),
        (["train", "demo", "max_step=3"], "did you mean 'max_steps'?"),
        (["train", "demo", "--max-steps", "3"], "write key=value"),
        (["train", "demo", "max_steps=many"], "max_steps must be a whole number"),
        (["train", "demo", "output_dir=/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["info", "litevae-x"], "did you mean 'litevae-"),
        (["info", "litevae-s", "--size", "250"], "multiples of 8"),
        (["info", "litevae-s,agregator=vit"], "did you mean 'aggregator'"),
        (["info", "litevae-s,preset=litevae-m"], "litevae-s determines this already, got preset=litevae-m"),
        (["info", "litevae-s,aggregator=mlp"], "aggregator must be unet or vit"),
        (["info", "litevae-s,encoder_type=dwt"], "latent_channels must be 12 for encoder_type='dwt', got 4"),
        (["info", "sd-vae,extractor=nafnet"], "extractor must be unet for kind=sd-vae"),
        (["complexity", "litevae-s,finest_level=9"], "finest_level must be from 1 to 3, got 9"),
        (["info", "litevae-s", "--size", "0"], "greater than or equal to 16"),
        (["info", "litevae-s", "--size", "big"], "Invalid value for '--size'"),
        (["reconstruct", "nowhere", "missing.png", "-o", "out"], "missing.png: no such file"),
        (["reconstruct", "nowhere"], "Missing argument"),
        (["eval", "nowhere", "demo"], "nowhere: no such folder"),
        (["eval", "diffusers:nowhere", "demo"], "nowhere: no such folder"),
        (["eval", "nowhere", "demo", "-o", "nowhere/eval.json"], "nowhere: no such folder"),
    ],
)
def test_mistake_is_one_line(fails, arguments, message):
    assert message in fails(*arguments)


def empty(folder):
    folder.mkdir()


def other_class(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "AutoencoderDC"}')


def not_json(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")


def a_file(folder):
    folder.touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "there is no config.json"),
        (other_class, "not a LiteVAE but AutoencoderDC"),
        (not_json, "not a model's configuration"),
        (a_file, "is a file, not a model folder"),
    ],
)
def test_not_a_model(fails, tmp_path, make, message):
    make(tmp_path / "m")
    assert message in fails("info", tmp_path / "m")


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "text", "other", "partial"])
def test_damaged_weights(fails, model, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, tmp_path / "m")
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1")
    elif damage == "other":
        save_file({name: torch.zeros(3) for name in tensors}, weights, {"format": "pt"})
    else:
        save_file(dict(list(tensors.items())[:-1]), weights, {"format": "pt"})
    assert str(folder) in fails("info", folder)


@pytest.mark.parametrize("kind", [AutoencoderKL, SmallEncoderVAE])
def test_baselines_are_models_too(litevae, tmp_path, kind):
    blocks = {} if kind is SmallEncoderVAE else {"down_block_types": ("DownEncoderBlock2D",) * 4}
    if blocks:
        blocks["up_block_types"] = ("UpDecoderBlock2D",) * 4
    kind(block_out_channels=(32, 32, 32, 32), layers_per_block=1, **blocks).save_pretrained(
        tmp_path / "model"
    )
    Image.fromarray(data.chelsea()[:40, :30]).save(tmp_path / "cat.png")
    assert "latent: 4 x 8 x 8" in litevae("info", tmp_path, "--size", 64)
    litevae("reconstruct", tmp_path, tmp_path / "cat.png", "-o", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "cat.png").size == (30, 40)
    litevae("scale", tmp_path, tmp_path, "--size", 32, "--workers", 0)
    assert kind.from_pretrained(tmp_path / "model").config.scaling_factor != 1.0


def test_model_of_one_size(litevae, fails, tmp_path):
    """Larger images are reconstructed in tiles of its size; other sizes give a one-line error."""
    torch.manual_seed(0)
    small = {"block_out_channels": (16, 16, 16), "layers_per_block": 1, "num_groups": 4}
    folder = tmp_path / "model"
    LiteVAE.from_preset("litevae-s", aggregator="vit", sample_size=32, **small).save_pretrained(folder)
    for name, height in (("large", 50), ("flat", 20)):
        Image.fromarray(data.chelsea()[:height, :70]).save(tmp_path / f"{name}.png")
    litevae("reconstruct", folder, tmp_path / "large.png", "-o", tmp_path / "out")
    assert read_image(tmp_path / "out" / "large.png").shape == (50, 70, 3)
    line = fails("reconstruct", folder, tmp_path / "flat.png", "-o", tmp_path / "out")
    assert "flat.png: image must be 32x32, the sample_size that aggregator='vit' was made for" in line
    for command in (
        ["info", folder],
        ["scale", folder, tmp_path],
        ["encode", folder, tmp_path, tmp_path / "latents"],
        ["eval", folder, tmp_path, "--metrics", "psnr"],
    ):
        assert "32" in fails(*command, "--size", 64)


@pytest.mark.parametrize("variable", ["LITEVAE_CPU_ISA", "LITEVAE_BACKEND"])
def test_wrong_variable_of_the_kernels_is_one_line(variable):
    code = "import sys; from litevae.cli import main; sys.exit(main(['info']))"
    environment = {**os.environ, variable: "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"litevae: error: {variable} is 'nonsense'; allowed")


def test_commands_import_torch_only_when_they_run():
    code = "import sys, litevae.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
