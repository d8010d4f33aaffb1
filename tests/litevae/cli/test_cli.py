import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from litevae import LiteVAE
from litevae.cli import main
from litevae.data.images import read_image
from litevae.models.baseline import SmallEncoderVAE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    LiteVAE.from_preset(
        "litevae-s", latent_channels=12, block_out_channels=(32, 32, 32, 32), layers_per_block=1
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def litevae(capsys):
    """Runs a command that succeeds, and returns what it printed."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        assert status == 0, errors
        return output

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that fails, and returns its one line."""

    def run(*arguments, status=2):
        assert main([str(argument) for argument in arguments]) == status
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.startswith("litevae: error: ")
        assert errors.count("\n") == 1, errors
        return errors

    return run


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


def test_train_short_form(litevae, tmp_path, capsys):
    output = litevae(
        "train", "demo", "max_steps=2", "data.size=16", "data.batch_size=1", f"output_dir={tmp_path}"
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert f"PSNR {metrics['validation']['psnr']:.2f} dB" in output
    assert "2 steps" in output
    # the run's folder serves as the model
    assert "latent: 12 x 32 x 32" in litevae("info", tmp_path)


class TestInfo:
    def test_preset(self, litevae):
        output = litevae("info", "litevae-b")
        assert re.search(r"encoder +6,753,252 +37\.84\n", output)
        assert re.search(r"decoder +49,490,179 ", output)
        assert "latent: 4 x 32 x 32, for an image of 3 x 256 x 256" in output

    @pytest.mark.parametrize(
        ("settings", "parameters", "latent"),
        [
            ("aggregator=vit", 1_002_580, "4 x 8 x 8"),
            ("encoder_type=dwt,latent_channels=12", 0, "12 x 8 x 8"),
            ("block_out_channels=[16,32],num_groups=8", 515_828, "4 x 32 x 32"),
        ],
    )
    def test_settings_after_a_preset(self, litevae, settings, parameters, latent):
        output = litevae("info", f"litevae-s,{settings}", "--size", 64)
        assert re.search(rf"encoder +{parameters:,} ", output)
        assert f"latent: {latent}, for an image of 3 x 64 x 64" in output

    def test_folder(self, litevae, model):
        assert "latent: 12 x 8 x 8, for an image of 3 x 64 x 64" in litevae("info", model, "--size", 64)


def image_files(folder):
    """One file of each awkward kind; sizes that are no multiples of 8."""
    rgb = data.chelsea()[100:145, 60:127]
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = rgb[..., 1]
    files = {
        "odd.png": (Image.fromarray(rgb), {}),
        "grey.png": (Image.fromarray(grey), {}),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "palette.gif": (Image.fromarray(rgb).convert("P"), {}),
        "alpha.png": (Image.fromarray(np.dstack([rgb, grey])), {}),
        "turned.jpg": (Image.fromarray(rgb), {"exif": exif, "quality": 95}),
        "cmyk.tif": (Image.fromarray(rgb).convert("CMYK"), {}),
        "tiny.png": (Image.fromarray(rgb[:1, :3]), {}),
    }
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
    return [folder / name for name in files]


class TestReconstruct:
    def test_every_kind_of_image(self, litevae, model, tmp_path):
        images = image_files(tmp_path)
        lines = litevae("reconstruct", model, *images, "-o", tmp_path / "out").splitlines()
        values = []
        for path, line in zip(images, lines, strict=False):
            pixels = read_image(path)
            result = Image.open(tmp_path / "out" / f"{path.stem}.png")
            assert (result.mode, result.size) == ("RGB", (pixels.shape[1], pixels.shape[0]))
            values.append(peak_signal_noise_ratio(pixels, np.asarray(result)))
            assert line.startswith(f"{path}: {result.width}x{result.height}, PSNR {values[-1]:.2f} dB, ")
        assert Image.open(tmp_path / "out" / "turned.png").size == (45, 67)
        assert lines[len(images) :] == [f"mean PSNR of 8 images: {np.mean(values):.2f} dB"]
        assert len(list((tmp_path / "out").iterdir())) == len(images)

    def test_same_names_get_numbers(self, litevae, model, tmp_path):
        images = []
        for folder, size in (("a", 16), ("b", 24), ("c", 32)):
            (tmp_path / folder).mkdir()
            images.append(tmp_path / folder / "x.png")
            Image.fromarray(data.chelsea()[:size, :size]).save(images[-1])
        litevae("reconstruct", model, *images, "-o", tmp_path / "out")
        sizes = {path.name: Image.open(path).width for path in (tmp_path / "out").iterdir()}
        assert sizes == {"x.png": 16, "x-2.png": 24, "x-3.png": 32}

    def test_input_is_never_overwritten(self, fails, model, tmp_path):
        (image,) = [path for path in image_files(tmp_path) if path.name == "odd.png"]
        before = image.read_bytes()
        assert "would be overwritten" in fails("reconstruct", model, image, "-o", tmp_path)
        assert image.read_bytes() == before

    def test_not_an_image(self, fails, model, tmp_path):
        (tmp_path / "x.png").write_text("text")
        assert "x.png: not an image" in fails("reconstruct", model, tmp_path / "x.png", "-o", tmp_path / "o")

    def test_output_that_cannot_be_made(self, fails, model, tmp_path):
        image = image_files(tmp_path)[0]
        assert "cannot be made" in fails("reconstruct", model, image, "-o", image / "out")


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


def test_reconstruct_overwrites_only_when_told(model, litevae, fails, tmp_path):
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    (tmp_path / "photo.png").write_text("mine")
    command = ["reconstruct", str(model), str(tmp_path / "photo.jpg"), "-o", str(tmp_path)]
    assert "is there already" in fails(*command)
    assert (tmp_path / "photo.png").read_text() == "mine"
    litevae(*command, "--overwrite")
    assert Image.open(tmp_path / "photo.png").size == (30, 20)


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
    """By tiles of its size it reconstructs larger images; other sizes are one line."""
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
