"""A training step of LiteVAE-B against one of Stable Diffusion's VAE, with the same trainer, losses and optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.harness import (
    FLOAT32_ERROR,
    Provider,
    check,
    contest,
    dtype_name,
    served_dtypes,
    with_autocast,
    with_backend,
)
from benchmarks.session import Goal, Session
from litevae.discriminators import build_discriminator
from litevae.losses import Objective
from litevae.training.build import build_model
from litevae.training.config import load_config
from litevae.training.optimization import EMA
from litevae.training.start import make_accelerator
from litevae.training.step import TrainingStep
from litevae_kernels import restore_vae

INPUTS = 2
BATCH = {"cpu": 1, "cuda": 16}
SD_VAE, SD_VAE_CONTIGUOUS = "SD-VAE", "SD-VAE, contiguous"
CONTIGUOUS = "channels_last=false"
SUBJECTS = {
    "LiteVAE-B": ("imagenet-b", []),
    "LiteVAE-B, wavelet output": ("imagenet-b", ["model.output_type=wavelet"]),
    SD_VAE: ("imagenet-sd-vae", []),
    SD_VAE_CONTIGUOUS: (
        "imagenet-sd-vae",
        [CONTIGUOUS],
    ),  # the layout in which PyTorch's GroupNorm is faster on a CPU
}
# The ratio of multiplications alone is 1.28. The first goal is higher in float32, where the kernels gain more.
GOALS = {
    torch.bfloat16: {"LiteVAE-B": Goal(1.5), "LiteVAE-B, wavelet output": Goal(2.0)},
    torch.float32: {"LiteVAE-B": Goal(2.0)},
}


def make_step(name: str, overrides: list[str], size: int, adversarial: bool) -> TrainingStep:
    """Builds the step as the trainer does, with random VGG weights, which do not change the time."""
    settings = [f"data.size={size}", "loss.pretrained=false", "loss.adversarial_start=1", *overrides]
    config = load_config(name, settings + ([] if adversarial else ["loss.adversarial=0"]))
    accelerator = make_accelerator(config.precision, "none", {}, Path())
    layout = layout_of(overrides)
    torch.manual_seed(0)
    model = build_model(config)
    if isinstance(model, AutoencoderKL):  # The rival is diffusers' own code, which the trainer accelerates.
        restore_vae(model)
    model = model.to(accelerator.device, memory_format=layout)
    discriminator = build_discriminator(config.discriminator, size) if adversarial else None
    if discriminator is not None:
        discriminator.to(accelerator.device, memory_format=layout)
    objective = Objective(config.loss).to(accelerator.device, memory_format=layout)
    ema = EMA(model, config.ema_decay)
    return TrainingStep(config, accelerator, model, discriminator, objective, ema, lambda done: 1.0)


def layout_of(overrides: list[str]) -> torch.memory_format:
    return torch.contiguous_format if CONTIGUOUS in overrides else torch.channels_last


def gradients(step: TrainingStep) -> list[Tensor]:
    """Returns each network's gradients in the first step up to a factor: Adam's first moments."""
    states = [optimizer.moments() for optimizer in step.optimizers.values()]
    return [torch.cat([state[i]["exp_avg"].flatten().double() for i in state]) for state in states]


def check_gradients(
    name: str, size: int, image: Tensor, noise: Tensor, dtype: torch.dtype, *, adversarial: bool
) -> None:
    """Checks the gradients in `dtype` against those of PyTorch's own operators in `dtype` and float64."""
    config, overrides = SUBJECTS[name]

    def run(backend: str | None, *more: str, double: bool = False) -> list[Tensor]:
        step = make_step(config, [*overrides, f"precision={dtype_name(dtype)}", *more], size, adversarial)
        inputs = (image, noise)
        if double:
            inputs = (image.double(), noise.double())
            for module in (step.model, step.discriminator, step.objective, step.ema.model):
                if module is not None:
                    module.double()
        call = step if backend is None else with_backend(backend, step)
        assert call(*inputs, 1, False).non_finite is None
        return gradients(step)

    ours, plain = run(None), run("reference")
    for actual, expected, exact in zip(
        ours, plain, run("reference", "precision=fp32", double=True), strict=True
    ):
        check(actual, expected, exact, name, FLOAT32_ERROR)


@pytest.mark.parametrize(
    "adversarial",
    [
        pytest.param(False, id="no discriminator"),
        pytest.param(True, id="discriminator", marks=pytest.mark.full("cpu")),
    ],
)
@pytest.mark.parametrize("size", [128, pytest.param(256, marks=pytest.mark.full("cpu"))])
def test_step(benchmark: Any, session: Session, device: str, size: int, adversarial: bool) -> None:
    batch = BATCH[device]
    dtype = served_dtypes(device)[-1]
    precision = f"precision={dtype_name(dtype)}"
    images = {
        layout: [
            (torch.rand(batch, 3, size, size, device=device) * 2 - 1).contiguous(memory_format=layout)
            for _ in range(INPUTS)
        ]
        for layout in (torch.channels_last, torch.contiguous_format)
    }
    noise = torch.randn(batch, 4, size // 8, size // 8, device=device)
    check_gradients("LiteVAE-B", size, images[torch.channels_last][0], noise, dtype, adversarial=adversarial)

    def provider(step: TrainingStep, layout: torch.memory_format) -> Provider:
        def run(i: int) -> None:
            outcome = step(images[layout][i], noise, 1, False)
            assert outcome.non_finite is None, outcome.non_finite

        return run

    providers = {
        name: provider(make_step(config, [precision, *overrides], size, adversarial), layout_of(overrides))
        for name, (config, overrides) in SUBJECTS.items()
    }
    networks = "U-Net discriminator" if adversarial else "no discriminator"
    contest(
        benchmark,
        session,
        f"training step, {with_autocast(dtype)}, {networks}, LPIPS, {batch}x3x{size}x{size}",
        "LiteVAE-B",
        providers,
        inputs=INPUTS,
        images=batch,
        rivals=[SD_VAE, SD_VAE_CONTIGUOUS],
        goals=GOALS[dtype],
        whole=True,
        least=3,
    )
