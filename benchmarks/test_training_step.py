"""A whole training step of LiteVAE-B against Stable Diffusion's VAE: same trainer, same losses, same optimizer."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from benchmarks.harness import Goal, Provider, Session, contest
from litevae.discriminators import build_discriminator
from litevae.losses import Objective
from litevae.training.build import build_model
from litevae.training.config import load_config
from litevae.training.step import EMA, TrainingStep

INPUTS = 2
BATCH = {"cpu": 1, "cuda": 16}
SUBJECTS = {
    "LiteVAE-B": ("imagenet-b", []),
    "LiteVAE-B, wavelet output": ("imagenet-b", ["model.output_type=wavelet"]),
    "SD-VAE": ("imagenet-sd-vae", []),
}
GOALS = {"LiteVAE-B": Goal(1.5), "LiteVAE-B, wavelet output": Goal(2.0)}  # 1.28 by multiplications alone


def make_step(name: str, overrides: list[str], size: int, adversarial: bool) -> TrainingStep:
    """As the trainer builds it; VGG's weights, which change no time, are random."""
    settings = [f"data.size={size}", "loss.pretrained=false", "loss.adversarial_start=1", *overrides]
    config = load_config(name, settings + ([] if adversarial else ["loss.adversarial=0"]))
    AcceleratorState._reset_state(True)  # one precision a process, unless told
    accelerator = Accelerator(mixed_precision=config.precision)
    model = build_model(config).to(accelerator.device, memory_format=torch.channels_last)
    discriminator = build_discriminator(config.discriminator, size) if adversarial else None
    if discriminator is not None:
        discriminator.to(accelerator.device, memory_format=torch.channels_last)
    objective = Objective(config.loss).to(accelerator.device, memory_format=torch.channels_last)
    ema = EMA(model, config.ema_decay)
    return TrainingStep(config, accelerator, model, discriminator, objective, ema, lambda done: 1.0)


@pytest.mark.parametrize("adversarial", [False, True], ids=["no discriminator", "discriminator"])
@pytest.mark.parametrize("size", [128, pytest.param(256, marks=pytest.mark.full("cpu"))])
def test_step(benchmark: Any, session: Session, device: str, size: int, adversarial: bool) -> None:
    batch = BATCH[device]
    images = [
        (torch.rand(batch, 3, size, size, device=device) * 2 - 1).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(INPUTS)
    ]
    noise = torch.randn(batch, 4, size // 8, size // 8, device=device)

    def provider(step: TrainingStep) -> Provider:
        def run(i: int) -> None:
            outcome = step(images[i], noise, 1, False)
            assert outcome.bad is None, outcome.bad

        return run

    providers = {
        name: provider(make_step(config, overrides, size, adversarial))
        for name, (config, overrides) in SUBJECTS.items()
    }
    contest(
        benchmark,
        session,
        f"training step, bf16 autocast, {'U-Net discriminator' if adversarial else 'no discriminator'}, LPIPS, "
        f"{batch}x3x{size}x{size}",
        "LiteVAE-B",
        providers,
        inputs=INPUTS,
        images=batch,
        rivals=["SD-VAE"],
        goals=GOALS,
    )
