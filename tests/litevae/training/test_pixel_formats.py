"""Runs on images that are not RGB of 8 bits, and the commands that take their models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from litevae.cli import main
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.evaluation.evaluate import evaluate
from litevae.latents import Settings, encode_images
from litevae.models.interface import pixel_format
from litevae.models.loading import load_model
from litevae.training import train

RUN = [
    "data.workers=0",
    "data.validation_count=2",
    "max_steps=2",
    "model.preset=litevae-s",
    "checkpoint.every=0",
]
OPTIONS = ["--size", "32", "--workers", "0"]


def write_images(folder):
    """Writes two images of each kind to a folder of its own."""
    photograph = data.chelsea()[100:148, 60:124]
    for number, part in enumerate((photograph, photograph[:, ::-1])):
        deep = (part[..., 0] * 16.0 + part[..., 1] / 16).astype(np.uint16)  # 12 bits
        images = {"grey": part[..., 1], "rgba": np.dstack([part, part[::-1, :, 0]])}
        for name in ("grey", "rgba", "deep"):
            (folder / name).mkdir(exist_ok=True)
        for name, pixels in images.items():
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
        if number:
            Image.fromarray(deep).save(folder / "deep" / "1.png")
        else:
            np.save(folder / "deep" / "0.npy", deep.astype(np.float32))
    return folder


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path)


KINDS = {
    "grey": ["data.validation=", "data.channels=1"],
    "rgba": ["data.validation=", "data.channels=4"],
    "deep": ["data.validation=", "data.channels=1", "data.value_range=[0,4095]"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("discriminator", ["patchgan", "unet"])
def test_a_run_and_the_commands_that_take_its_model(images, tiny, kind, discriminator, capsys, tmp_path):
    source = images / kind
    adversarial = ["loss.adversarial=0.1", f"discriminator.kind={discriminator}", "discriminator.width=S"]
    config = tiny(f"data.train={source}", *KINDS[kind], f"data.validation={source}", *adversarial, *RUN)
    result = train(config)
    assert pixel_format(load_model(tmp_path / "run")) == config.data.pixel_format
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"32x32 pixels, {config.data.pixel_format}, mode" in record["validation"]["measured_on"]
    grid = Image.open(next((tmp_path / "run" / "validation").iterdir()))
    assert grid.size == (64, 64)
    assert grid.mode == ("RGBA" if kind == "rgba" else "RGB")
    assert (tmp_path / "run" / "reconstructions.png").is_file()

    command = ["eval", tmp_path / "run", source, "--metrics", "psnr,ssim", "-o", tmp_path / "eval.json"]
    assert main([str(part) for part in (*command, "--precision", "fp32", *OPTIONS)]) == 0
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["metrics"] == pytest.approx({"psnr": result.psnr, "ssim": result.ssim}, abs=1e-4)
    assert measured["crop"].endswith(str(config.data.pixel_format))
    assert main(["scale", *map(str, (tmp_path / "run", source)), *OPTIONS]) == 0
    assert main(["encode", *map(str, (tmp_path / "run", source, tmp_path / "latents")), *OPTIONS]) == 0
    images_of = config.data.pixel_format
    capsys.readouterr()
    command = ["eval", *map(str, (tmp_path / "run", source)), *OPTIONS, "-o"]
    assert main([*command, str(tmp_path / "all.json")]) == 0
    left_out = f"without rfid and lpips, which compare RGB images of 8 bits: the model's are {images_of}"
    assert left_out in capsys.readouterr().err.splitlines()
    assert list(json.loads((tmp_path / "all.json").read_text())["metrics"]) == ["psnr", "ssim"]
    assert main([*command, str(tmp_path / "none.json"), "--metrics", "lpips,psnr"]) == 2
    assert "--metrics: lpips compares RGB images of 8 bits" in capsys.readouterr().err
    model, others = load_model(tmp_path / "run"), open_images("demo")
    message = f"the images are RGB of 8 bits, and the model takes {images_of}"
    with pytest.raises(UserError, match=message):
        evaluate(model, others, ["psnr"], size=32)
    with pytest.raises(UserError, match=message):
        encode_images(model, others, tmp_path / "others", Settings(size=32))


def test_auto_is_fp32_for_values_of_a_range(images, tiny, cpu_multiplies, capsys, tmp_path):
    cpu_multiplies("bf16")
    source = images / "deep"
    train(tiny(f"data.train={source}", *KINDS["deep"], "precision=auto", *RUN))
    assert "precision=auto: fp32, as bf16 would round values" in capsys.readouterr().err
    arguments = [*map(str, (tmp_path / "run", source)), *OPTIONS]
    for precision, expected in (("auto", "fp32"), ("bf16", "bf16")):
        output, folder = str(tmp_path / f"{precision}.json"), str(tmp_path / precision)
        assert main(["eval", *arguments, "--precision", precision, "-o", output]) == 0
        assert json.loads((tmp_path / f"{precision}.json").read_text())["precision"] == expected
        assert main(["encode", *arguments[:2], folder, *OPTIONS, "--precision", precision]) == 0
        assert (
            json.loads((tmp_path / precision / "index.json").read_text())["encoding"]["precision"] == expected
        )


def test_reconstructions_are_of_the_kind_of_their_files(images, tiny, capsys, tmp_path):
    config = tiny(f"data.train={images / 'deep'}", *KINDS["deep"], *RUN)
    train(config)
    tiff = (np.asarray(Image.open(images / "deep" / "1.png")) / 2).astype(np.float32)
    Image.fromarray(tiff).save(images / "half.tif")
    files = [images / "deep" / "0.npy", images / "deep" / "1.png", images / "half.tif"]
    assert main(["reconstruct", *map(str, (tmp_path / "run", *files, "-o", tmp_path / "out"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    read = [np.load, Image.open, Image.open]
    for open_file, path, line, dtype in zip(
        read, files, lines[:3], (np.float32, np.uint16, np.float32), strict=True
    ):
        before, after = (np.asarray(open_file(each)) for each in (path, tmp_path / "out" / path.name))
        assert (after.dtype, after.shape) == (dtype, before.shape)
        assert f"PSNR {peak_signal_noise_ratio(before, after, data_range=4095):.2f} dB" in line
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0.npy", "1.png", "half.tif"}


def test_batches_of_a_range_are_not_rounded(images, tiny, monkeypatch):
    seen = []
    convert = torch.Tensor.float

    def record(tensor, *rest):
        seen.append(tensor)
        return convert(tensor, *rest)

    monkeypatch.setattr("litevae.training.trainer.to_model_range", lambda batch: record(batch) / 127.5 - 1)
    train(tiny(f"data.train={images / 'deep'}", *KINDS["deep"], *RUN))
    assert {(batch.dtype, batch.shape[1]) for batch in seen} == {(torch.float32, 1)}
    assert any((batch != batch.round()).any() for batch in seen)


def test_values_outside_the_range_count_as_bad_images(images, tiny, tmp_path):
    with pytest.raises(UserError, match="of 2 images cannot be used"):
        train(tiny(f"data.train={images / 'deep'}", *KINDS["grey"], "data.value_range=[0,1000]", *RUN))
    assert "outside the range from 0 to 1000" in (tmp_path / "run" / "bad_images.txt").read_text()


@pytest.mark.parametrize("kind", ["grey", "deep"])
def test_a_student_takes_the_images_of_its_teacher(images, tiny, capsys, kind, tmp_path):
    train(tiny(f"data.train={images / kind}", *KINDS[kind], *RUN, name="teacher"))
    small = [each for each in RUN if "validation" not in each] + [
        "tracker=none",
        "data.size=32",
        "data.batch_size=2",
    ]
    command = [
        "distill",
        str(tmp_path / "teacher"),
        f"data.train={images / kind}",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert main([*command, *small, "precision=fp32"]) == 0, capsys.readouterr().err
    model, teacher = (load_model(tmp_path / name) for name in ("run", "teacher"))
    assert pixel_format(model) == pixel_format(teacher)
    other = ["data.channels=3", "data.value_range=null", f"output_dir={tmp_path / 'other'}"]
    assert main([*command, *small, *other]) == 2
    needed = {
        "grey": "data.channels=1 data.value_range=null",
        "deep": "data.channels=1 data.value_range=[0.0,4095.0]",
    }
    assert f"needs {needed[kind]}" in capsys.readouterr().err


def test_a_run_with_a_range_starts_from_a_model_of_8_bits(images, tiny, tmp_path):
    train(tiny(f"data.train={images / 'grey'}", *KINDS["grey"], *RUN, name="first"))
    train(tiny(f"data.train={images / 'deep'}", *KINDS["deep"], f"init={tmp_path / 'first'}", *RUN))
    assert pixel_format(load_model(tmp_path / "run")).value_range == (0, 4095)
