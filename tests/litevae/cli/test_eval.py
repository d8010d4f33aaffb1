import json
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from litevae.cli import main
from litevae.data.sources import open_images
from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.yardsticks import measure_yardsticks
from litevae.files import sha256

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(squares, tmp_path, capsys):
    def run(model, *arguments, status=0):
        command = ["eval", model, squares, "--size", 32, "--workers", 0, "-o", tmp_path / "eval.json"]
        command += ["--precision", "fp32"]
        assert main([str(argument) for argument in (*command, *arguments)]) == status
        return capsys.readouterr()

    return run


def test_result(run, tiny_folder, tiny_model, square_pixels, tmp_path):
    output = run(tiny_folder, "--metrics", "ssim,psnr").out
    record = json.loads((tmp_path / "eval.json").read_text())
    weights = tiny_folder / "diffusion_pytorch_model.safetensors"
    assert record["weights"] == {weights.name: sha256(weights)}
    with torch.no_grad():
        decoded = tiny_model(torch.from_numpy(square_pixels.transpose(0, 3, 1, 2)).float() / 127.5 - 1).sample
    restored = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    psnr = np.mean([peak_signal_noise_ratio(a, b) for a, b in zip(square_pixels, restored, strict=True)])
    assert record["metrics"]["psnr"] == pytest.approx(psnr, abs=1e-4)
    assert list(record["metrics"]) == ["psnr", "ssim"]
    assert (record["count"], record["unreadable"], record["latent"]) == (8, 1, "mode")
    assert record["precision"] == "fp32"
    assert "32 x 32" in record["crop"]
    assert f"torch {torch.__version__}" in record["versions"]["litevae"]
    assert record["networks"] == {}
    assert f"{psnr:10.2f}" in output
    expected = measure_yardsticks(tiny_model, list(square_pixels))
    haar = "3 Haar coefficients per 4x4 block"
    assert list(record["yardsticks"]) == ["mean colour", "4x4 block means, enlarged", haar]
    for found, values in zip(record["yardsticks"].values(), expected.values(), strict=True):
        assert found == pytest.approx(values)
    assert f"{haar}{expected['haar']['psnr']:10.2f}{expected['haar']['ssim']:10.4f}\n" in output
    assert record["below_haar_yardstick"] is True  # the model is not trained
    (line,) = [line for line in output.splitlines() if line.startswith("model ")]
    assert line.endswith("  below the Haar yardstick")
    assert "8 images, middle square, 32 x 32, RGB of 8 bits; mode of the posterior; fp32" in output
    assert "unreadable images, left out: 1" in output

    error = run(tiny_folder, "--metrics", "psnr", status=2).err
    assert "eval.json already exists" in error
    assert "sample of the posterior" in run(tiny_folder, "--metrics", "psnr", "--sample", "--overwrite").out


def test_precision_is_that_of_the_machine_unless_given(run, tiny_folder, tmp_path, cpu_multiplies):
    for precisions, options, expected in (
        (["bf16"], ["--precision", "auto"], "bf16"),
        ([], ["--precision", "auto"], "fp32"),
        (["bf16"], [], "fp32"),  # the fixture's --precision fp32
    ):
        cpu_multiplies(*precisions)
        output = run(tiny_folder, "--metrics", "psnr", "--overwrite", *options).out
        assert output.splitlines()[0].endswith(f"of the posterior; {expected}")
        assert json.loads((tmp_path / "eval.json").read_text())["precision"] == expected


def test_any_autoencoder_of_diffusers(run, tmp_path, tiny_folder):
    torch.manual_seed(0)
    settings = {"block_out_channels": (16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **settings
    )
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    outputs = [
        run(f"diffusers:{folder}", "--metrics", "psnr", "--overwrite").out
        for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae")
    ]
    assert outputs[0] == outputs[1]
    assert "PSNR" in outputs[0]
    assert main(["info", f"diffusers:{tmp_path / 'pipeline'}", "--size", "32"]) == 0
    assert "not an AutoencoderKL but LiteVAE" in run(f"diffusers:{tiny_folder}", "--overwrite", status=2).err


def test_missing_weights_are_one_line(run, tiny_folder, tmp_path, monkeypatch):
    def no_connection(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", no_connection)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for metric, name in (
        ("rfid", "weights-inception-2015-12-05-6726825d.pth"),
        ("lpips", "vgg16-397923af.pth"),
    ):
        error = run(tiny_folder, "--metrics", metric, status=2).err
        assert error.count("\n") == 1
        assert f"{tmp_path}/checkpoints/{name} is not there" in error
    assert not (tmp_path / "eval.json").exists()


def test_every_metric_and_its_network(
    run, tiny_folder, tiny_model, squares, square_pixels, tmp_path, stand_in_networks, st_lpips_package
):
    names = ["rfid", "lpips", "st_lpips", "psnr", "ssim"]
    output = run(tiny_folder, "--metrics", ",".join(reversed(names)), "--save", tmp_path / "all.npz").out
    record = json.loads((tmp_path / "eval.json").read_text())
    expected = evaluate(
        tiny_model, open_images(str(squares)), names, 32, workers=0, features=stand_in_networks
    )
    assert list(record["metrics"]) == names
    assert record["metrics"] == pytest.approx(expected.values, rel=1e-4)
    for found, values in zip(record["yardsticks"].values(), expected.yardsticks.values(), strict=True):
        assert found == pytest.approx(values, rel=1e-4)
    with np.load(tmp_path / "all.npz") as file:
        pairs = [torch.from_numpy(each / 127.5 - 1).float() for each in (square_pixels, file["arr_0"])]
    distances = st_lpips_package(*(each.permute(0, 3, 1, 2) for each in pairs))
    assert record["metrics"]["st_lpips"] == pytest.approx(distances.mean().item(), rel=1e-4)
    assert record["networks"] == {
        "rfid": "Inception of torch-fidelity, weights-inception-2015-12-05-6726825d",
        "lpips": "LPIPS 0.1, VGG16",
        "st_lpips": "ST-LPIPS (not LPIPS) with AlexNet, stlpips-pytorch 0.0.2",
    }
    assert f"\nST-LPIPS: {record['networks']['st_lpips']}\n" in output
    headings = "".join(f"{name:>10}" for name in ("rFID", "LPIPS", "ST-LPIPS", "PSNR", "SSIM"))
    assert f"{headings}\n" in output


def test_what_st_lpips_needs_is_one_line(run, tiny_folder, tmp_path, monkeypatch):
    error = run(tiny_folder, "--metrics", "st_lpips", "--size", 16, status=2).err
    assert error == "litevae: error: st_lpips needs images of at least 21 pixels a side, got 16\n"
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    error = run(tiny_folder, "--metrics", "st_lpips", status=2).err
    assert error.count("\n") == 1
    assert "pip install 'litevae[perceptual]'" in error
    assert not (tmp_path / "eval.json").exists()


def test_reconstructions_are_saved(run, tiny_folder, tiny_model, square_pixels, tmp_path):
    with torch.no_grad():
        decoded = tiny_model(torch.from_numpy(square_pixels.transpose(0, 3, 1, 2)).float() / 127.5 - 1).sample
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    run(tiny_folder, "--metrics", "psnr", "--save", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as file:
        assert (
            np.abs(file["arr_0"].astype(int) - expected).max() <= 1
        )  # another batch size can round otherwise
    saved = tmp_path / "saved"
    run(tiny_folder, "--metrics", "psnr", "--save", saved, "--overwrite")
    pictures = [np.asarray(Image.open(path)).astype(int) for path in sorted(saved.iterdir())]
    assert np.abs(np.stack(pictures) - expected).max() <= 1
    assert json.loads((tmp_path / "eval.json").read_text())["saved"] == str(saved)
    (tmp_path / "eval.json").unlink()
    for path, problem in ((tmp_path / "all.npz", "already exists"), (saved, "is not empty")):
        assert problem in run(tiny_folder, "--metrics", "psnr", "--save", path, status=2).err
