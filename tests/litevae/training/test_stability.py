"""Every loss with every discriminator, from the command line, on the demo's photographs."""

import json
import math

import pytest
from PIL import Image
from skimage import data

from litevae.cli import main
from litevae.losses import TEACHER_TERMS, TERMS

START, STEPS = 13, 18
LOSSES = ["loss.pretrained=false"] + [
    f"loss.{name}={weight}"
    for name, weight in {
        "l1": 1.0,
        "l2": 1.0,
        "lpips": 1.0,
        "st_lpips": 1.0,
        "esrgan": 1.0,
        "wavelet": 1.0,
        "gaussian": 0.5,
        "ldl": 1.0,
        "kl": 1e-4,
    }.items()
]
RUN = [
    "initialise=random",
    "model.latent_channels=4",
    "model.block_out_channels=[16,32,32]",
    "model.layers_per_block=1",
    "model.num_groups=4",
    "data.batch_size=4",
    f"max_steps={STEPS}",
    "log_every=1",
    "validate_every=6",
    f"loss.adversarial_start={START}",
    "ema_decay=0.9",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=2",
    "discriminator.width=S",
    "discriminator.learning_rate=2e-4",
    "discriminator.betas=[0.5,0.9]",
]
# The loss per head of a discriminator that outputs 0 for every image.
BLIND = {"hinge": 1.0, "logistic": math.log(2)}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    for top in range(0, 256, 128):
        for left in range(0, 448, 128):
            Image.fromarray(data.chelsea()[top:, left:][:64, :64]).save(folder / f"{top}-{left}.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "size", "loss", "weight", "heads"),
    [
        ("patchgan", 32, "hinge", "constant", 1),
        ("unet", 32, "logistic", "adaptive", 2),
        ("stylegan", 32, "hinge", "adaptive", 1),
    ],
)
def test_all_losses_train_with_the_discriminator(
    held_out, tmp_path, no_pictures, kind, size, loss, weight, heads
):
    settings = [
        *RUN,
        *LOSSES,
        f"output_dir={tmp_path / 'run'}",
        f"data.size={size}",
        f"data.validation={held_out}",
        f"discriminator.kind={kind}",
        f"loss.adversarial_loss={loss}",
        f"loss.adversarial_weight={weight}",
        f"loss.adversarial={0.1 if weight == 'constant' else 0.5}",
    ]
    assert main(["train", "demo", *settings]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert lines[-1]["skipped_steps"] == 0
    assert all(math.isfinite(value) for line in lines for value in line.values())

    adversarial = lines[START - 1 :]
    assert {*TERMS} - {*TEACHER_TERMS} <= adversarial[0].keys()
    assert all("adversarial" not in line for line in lines[: START - 1])
    # The discriminator has neither won, which would leave no gradient to learn from, nor diverged.
    last = [line["discriminator"] for line in adversarial[-4:]]
    assert 0.1 < sum(last) / 4 / heads / BLIND[loss] < 2
    if weight == "adaptive":  # far from the upper bound
        assert all(0 < line["weighted/adversarial"] / line["adversarial"] < 1e3 for line in adversarial)

    history = json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]["history"]
    psnr = [point["psnr"] for point in history]
    assert psnr[2] > psnr[0]
