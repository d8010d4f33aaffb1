"""`litevae distill`, and the comparison of `litevae eval --teacher`."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from litevae import LiteVAE
from litevae.files import sha256

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    return tmp_path / "pipeline"


def test_distills_and_compares(litevae, teacher, squares, tmp_path):
    run = tmp_path / "run"
    settings = ["data.train=demo", "data.crop=native", "data.size=32", "data.batch_size=1", "data.workers=0"]
    settings += ["model.preset=litevae-s", "precision=fp32", "tracker=none", f"output_dir={run}"]
    output = litevae("distill", teacher, *settings, "max_steps=1")
    assert "1 step in " in output
    assert "validation: PSNR " in output
    model = LiteVAE.from_pretrained(run / "model")
    assert (model.config.scaling_factor, model.config.use_1x1_conv) == (0.5, True)

    # The run's own configuration repeats it.
    litevae("train", run / "config.yaml", f"output_dir={tmp_path / 'again'}")
    weights = "diffusion_pytorch_model.safetensors"
    assert sha256(run / "model" / weights) == sha256(tmp_path / "again" / "model" / weights)

    options = ["--size", 32, "--workers", 0, "--precision", "fp32", "--metrics", "psnr,ssim"]
    output = litevae("eval", run, squares, *options, "--teacher", teacher, "-o", tmp_path / "eval.json")
    record = json.loads((tmp_path / "eval.json").read_text())
    compared = record["teacher"]
    assert compared["weights"] == {weights: sha256(teacher / "vae" / weights)}
    assert compared["latent_errors"]["sigmas"] > 0
    # The error of the latent is not that of bfloat16.
    options[options.index("fp32")] = "bf16"
    litevae("eval", run, squares, *options, "--teacher", teacher, "-o", tmp_path / "bf16.json")
    assert (
        json.loads((tmp_path / "bf16.json").read_text())["teacher"]["latent_errors"]
        == compared["latent_errors"]
    )
    options[options.index("bf16")] = "fp32"
    assert f"{compared['latent_errors']['sigmas']:.3g} standard deviations of the teacher's" in output
    assert set(compared["encoder_images_per_second"]) == {"model", "teacher"}
    (line,) = [line for line in output.splitlines() if line.startswith("teacher ")]
    assert f"{compared['metrics']['psnr']:10.2f}" in line
    litevae("eval", f"diffusers:{teacher}", squares, *options, "-o", tmp_path / "teacher.json")
    assert json.loads((tmp_path / "teacher.json").read_text())["metrics"] == compared["metrics"]


def test_mistakes_are_one_line(fails, teacher, tmp_path):
    assert "teacher: nowhere: no such folder" in fails("distill", "nowhere", "data.train=demo")
    assert "leave out teacher=" in fails("distill", teacher, "teacher=x")
    settings = ["data.train=demo", "data.crop=native", "tracker=none", f"output_dir={tmp_path / 'run'}"]
    assert "needs model.latent_channels=4" in fails("distill", teacher, *settings, "model.latent_channels=3")
    assert "data.train is empty" in fails("distill", teacher, f"output_dir={tmp_path / 'run'}")
