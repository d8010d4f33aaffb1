"""Encoders and decoders against Stable Diffusion's, each in its fastest configuration on this machine.

The default run enters each model in its best configurations, `ENTERED`. `--full` measures all configurations
(`test_grid`) and then enters each model in the best of its grid at other sizes and batches. On two cores with
AVX512-BF16 and no AMX the SD-VAE's encoder is fastest in bf16, channels_last and eager mode; its grid in
results/REPORT.md shows the others. Before a machine's figures are quoted, its grid must show the same, or `ENTERED`
must change.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Provider, contest
from benchmarks.models import (
    NAMES,
    SD_VAE,
    Configuration,
    Gate,
    Side,
    as_input,
    configurations,
    deploy,
    make_inputs,
    make_model,
    work,
)
from benchmarks.session import Goal, Session, Work

SLICED = f"{SD_VAE} image by image"
INPUTS = 3  # one pass reads and writes far more than the caches hold
BATCH = {"cpu": 4, "cuda": 32}  # with 4 images a GPU waits for Python
DECODER_BATCH = {"cpu": 1, "cuda": 32}
BATCHES = (1, 8, 32) if torch.cuda.is_available() else (1, 8)
SIZES = (128, 256, 512)
ENTERED = {
    "cpu": [
        Configuration(torch.bfloat16, torch.channels_last, "eager"),
        Configuration(torch.bfloat16, torch.contiguous_format, "eager"),
    ],
    "cuda": [
        Configuration(torch.bfloat16, torch.channels_last, "CUDA graphs"),
        Configuration(torch.bfloat16, torch.channels_last, "eager"),
    ],
}
GOALS = {
    "cpu": {"LiteVAE-B": Goal(3.2, 0.25), "LiteVAE-S": Goal(9, 0.10)},
    "cuda": {"LiteVAE-B": Goal(4, 0.25, 4600), "LiteVAE-S": Goal(10)},
}


class Field:
    """The providers, the work of each, and their common inputs."""

    def __init__(self, side: Side, shape: tuple[int, ...], device: str) -> None:
        self.side: Side = side
        self.device = device
        self.inputs = make_inputs(side, shape, device, INPUTS)
        self.cast: dict[Configuration, list[Tensor]] = {}
        self.providers: dict[str, Provider] = {}
        self.works: dict[str, Work] = {}

    def enter(self, model: Any, configuration: Configuration, name: str, gate: Gate) -> None:
        """Adds a provider after its output has passed the gate."""
        layout = Configuration(configuration.dtype, configuration.memory_format, "")
        if layout not in self.cast:
            self.cast[layout] = [as_input(x, layout) for x in self.inputs]
        inputs = self.cast[layout]
        call = deploy(model, self.side, configuration)
        gate.check(call, inputs[0], configuration)
        self.providers[name] = lambda i: call(inputs[i])
        self.works[name] = work(model, self.side, self.inputs[0], configuration.dtype)

    def gate(self, model: Any) -> Gate:
        return Gate(model, self.side, self.inputs[0])


def label(name: str, configuration: Configuration) -> str:
    return f"{name}, {configuration}"


@torch.no_grad()
def test_encoder(benchmark: Any, session: Session, device: str) -> None:
    """The headline: all presets in the SD-VAE's best configuration, and the SD-VAE in its best two.

    The SD-VAE also runs image by image, which needs the memory of one image; LiteVAE treats its finest level so by
    default.
    """
    batch = BATCH[device]
    field = Field("encoder", (batch, 3, 256, 256), device)
    best = ENTERED[device][0]
    rivals = [label(SD_VAE, configuration) for configuration in ENTERED[device]]
    for name in NAMES:
        model = make_model(name, "encoder", device)
        gate = field.gate(model)
        for configuration in ENTERED[device] if name == SD_VAE else [best]:
            field.enter(model, configuration, label(name, configuration), gate)
        if name == SD_VAE:
            model.enable_slicing()
            field.enter(model, best, label(SLICED, best), gate)
    contest(
        benchmark,
        session,
        f"encoders at their best, {batch}x3x256x256",
        label("LiteVAE-B", best),
        field.providers,
        inputs=INPUTS,
        images=batch,
        works=field.works,
        rivals=rivals,
        goals={label(name, best): goal for name, goal in GOALS[device].items()},
        rounds=15,
        least=5,
    )


def grid_subject(name: str, device: str) -> str:
    return f"grid: {name}'s encoder, {BATCH[device]}x3x256x256"


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_grid(benchmark: Any, session: Session, device: str, name: str) -> None:
    """Every dtype, layout and mode."""
    field = Field("encoder", (BATCH[device], 3, 256, 256), device)
    model = make_model(name, "encoder", device)
    gate = field.gate(model)
    for configuration in configurations(device):
        field.enter(model, configuration, str(configuration), gate)
    contest(
        benchmark,
        session,
        grid_subject(name, device),
        str(ENTERED[device][0]),
        field.providers,
        inputs=INPUTS,
        images=BATCH[device],
        works=field.works,
        rounds=15,
        least=3,
    )


def best_of_grid(session: Session, name: str, device: str) -> Configuration:
    """Returns the fastest configuration of `test_grid`, in this run or in the last one on this machine."""
    rows = [row for row in session.saved() if row["subject"] == grid_subject(name, device)]
    assert rows, f"no grid for {name}: run test_grid first"
    times = {row["provider"]: row["median_ms"] for row in rows}
    among = [configuration for configuration in configurations(device) if str(configuration) in times]
    return min(among, key=lambda configuration: times[str(configuration)])


@pytest.mark.full
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_encoder_sizes(benchmark: Any, session: Session, device: str, size: int, batch: int) -> None:
    """Every model, in the best configuration of its grid."""
    field = Field("encoder", (batch, 3, size, size), device)
    entered = {name: best_of_grid(session, name, device) for name in NAMES}
    for name, configuration in entered.items():
        model = make_model(name, "encoder", device)
        field.enter(model, configuration, label(name, configuration), field.gate(model))
    contest(
        benchmark,
        session,
        f"sizes: encoders at their best, {batch}x3x{size}x{size}",
        label("LiteVAE-B", entered["LiteVAE-B"]),
        field.providers,
        inputs=INPUTS,
        images=batch,
        works=field.works,
        rivals=[label(SD_VAE, entered[SD_VAE])],
        rounds=15,
        least=3,
    )


# decoder_norm, output_type, and whether the decoder is folded
DECODERS: dict[str, tuple[dict[str, str], bool]] = {
    "GroupNorm, image": ({}, False),
    "GroupNorm, wavelet": ({"output_type": "wavelet"}, False),
    "SMC, image": ({"decoder_norm": "smc"}, False),
    "SMC folded, image": ({"decoder_norm": "smc"}, True),
    "SMC folded, wavelet": ({"decoder_norm": "smc", "output_type": "wavelet"}, True),
}


@torch.no_grad()
def test_decoder(benchmark: Any, session: Session, device: str) -> None:
    """The decoders; LiteVAE's with GroupNorm and image output is the SD-VAE's own, in fused operators."""
    batch = DECODER_BATCH[device]
    field = Field("decoder", (batch, 4, 32, 32), device)
    best = ENTERED[device][0]
    sd_vae = make_model(SD_VAE, "decoder", device)
    gate = field.gate(sd_vae)
    rivals = [label(SD_VAE, configuration) for configuration in ENTERED[device]]
    for name, configuration in zip(rivals, ENTERED[device], strict=True):
        field.enter(sd_vae, configuration, name, gate)
    for name, (overrides, fold) in DECODERS.items():
        model = make_model("LiteVAE-B", "decoder", device, **overrides)
        gate = field.gate(model)
        field.enter(model.fold() if fold else model, best, name, gate)
    contest(
        benchmark,
        session,
        f"decoders, {best.mode}, {batch} x 256x256",
        "GroupNorm, image",
        field.providers,
        inputs=INPUTS,
        images=batch,
        works=field.works,
        rivals=rivals,
        rounds=15,
        least=5,
    )
