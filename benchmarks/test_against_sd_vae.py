"""Encoders and decoders against Stable Diffusion's, each in its fastest configuration on this machine.

The SD-VAE, LiteVAE-B and LiteVAE-S are entered in every dtype that the hardware multiplies, each in the layout and mode
that were fastest in a trial just before. On a CPU, OpenVINO and ONNX Runtime also run the SD-VAE and LiteVAE-B. The
option `--full` adds the other models and the decoders, measures all configurations (`test_grid`) and enters each model
in the best of its grid at other sizes and batches.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Provider, contest, dtype_name, served_dtypes
from benchmarks.models import (
    LAYOUTS,
    NAMES,
    SD_VAE,
    Configuration,
    Gate,
    Side,
    as_input,
    call_of,
    configurations,
    deploy,
    fastest,
    make_inputs,
    make_model,
    usual_configuration,
    work,
)
from benchmarks.rivals import Exported, in_onnxruntime, in_openvino
from benchmarks.session import Goal, Session, Work
from benchmarks.test_encoder import unfused
from litevae_kernels.backend import core

SLICED = f"{SD_VAE} image by image"
COMPARED = (SD_VAE, "LiteVAE-B", "LiteVAE-S")  # in all dtypes; the others in the usual configuration only
INPUTS = 3  # one pass reads and writes far more than the caches hold
BATCH = {"cpu": 2, "cuda": 32}  # with few images a GPU waits for Python
DECODER_BATCH = {"cpu": 1, "cuda": 32}
BATCHES = (1, 8, 32) if torch.cuda.is_available() else (1, 8)
SIZES = (128, 256, 512)
GOALS = {
    "cuda": {"LiteVAE-B": Goal(4, 0.25, 4600), "LiteVAE-S": Goal(10)},
    "avx2": {"LiteVAE-B": Goal(5)},
    "avx512": {"LiteVAE-B": Goal(6), "LiteVAE-S": Goal(20)},
    "avx512bf16": {"LiteVAE-B": Goal(5.5, 0.25), "LiteVAE-S": Goal(18, 0.10)},
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

    def enter(
        self,
        model: Any,
        configuration: Configuration,
        name: str,
        gate: Gate,
        call: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Adds a provider after its output has passed the gate; `call` is the deployed model if there is one."""
        layout = Configuration(configuration.dtype, configuration.memory_format, "")
        if layout not in self.cast:
            self.cast[layout] = [as_input(x, layout) for x in self.inputs]
        inputs = self.cast[layout]
        call = call or deploy(model, self.side, configuration)
        gate.check(call, inputs[0], configuration)
        self.providers[name] = lambda i: call(inputs[i])
        self.works[name] = work(model, self.side, self.inputs[0], configuration.dtype)

    def enter_runtimes(self, model: Any, name: str, gate: Gate) -> None:
        """Adds OpenVINO in every dtype, and ONNX Runtime in float32, where they are installed."""
        plain = unfused(model)
        module = Exported(plain, call_of(plain, self.side))
        found = in_openvino(module, self.inputs[0], served_dtypes(self.device))
        calls = {
            Configuration(dtype, torch.contiguous_format, "OpenVINO"): call for dtype, call in found.items()
        }
        if (call := in_onnxruntime(module, self.inputs[0])) is not None:
            calls[Configuration(torch.float32, torch.contiguous_format, "ONNX Runtime")] = call
        for configuration, call in calls.items():
            gate.check(call, self.inputs[0], configuration)
            provider = f"{name}, {dtype_name(configuration.dtype)}, {configuration.mode}"
            self.providers[provider] = lambda i, call=call: call(self.inputs[i])
            self.works[provider] = work(model, self.side, self.inputs[0], configuration.dtype)

    def gate(self, model: Any) -> Gate:
        return Gate(model, self.side, self.inputs[0])


def label(name: str, configuration: Configuration) -> str:
    return f"{name}, {configuration}"


@torch.no_grad()
def test_encoder(benchmark: Any, session: Session, device: str, wanted: Callable[[str], bool]) -> None:
    """The headline: the models at their best, and the SD-VAE at the best of all its configurations and runtimes.

    With `--full`, the SD-VAE also runs image by image, which needs the memory of one image; LiteVAE treats its finest
    level so by default.
    """
    batch = BATCH[device]
    field = Field("encoder", (batch, 3, 256, 256), device)
    best: dict[str, str] = {}
    others = [name for name in NAMES if name not in COMPARED]
    for name in NAMES if wanted(f"{', '.join(others)} beside the others") else COMPARED:
        model = make_model(name, "encoder", device)
        gate = field.gate(model)
        if name in COMPARED:
            trials = []
            for dtype in served_dtypes(device):
                # Where the CPU multiplies bfloat16, a float32 LiteVAE is never the fastest one.
                needed = dtype == served_dtypes(device)[-1] or name == SD_VAE
                compiled_too = needed or wanted(f"{name} compiled in {dtype_name(dtype)}")
                trials.append(fastest(model, "encoder", field.inputs[0], dtype, compiled_too=compiled_too))
            for trial in trials:
                field.enter(model, trial.configuration, label(name, trial.configuration), gate, trial.call)
            best[name] = label(name, min(trials, key=lambda trial: trial.seconds).configuration)
        else:
            field.enter(model, usual_configuration(device), label(name, usual_configuration(device)), gate)
        if name in (SD_VAE, "LiteVAE-B") and device == "cpu":
            field.enter_runtimes(model, name, gate)
        if name == SD_VAE and wanted(SLICED):
            model.enable_slicing()
            configuration = usual_configuration(device)
            field.enter(model, configuration, label(SLICED, configuration), gate)
    goals = GOALS.get(device if device == "cuda" or core is None else core.isa(), {})
    contest(
        benchmark,
        session,
        f"encoders at their best, {batch}x3x256x256",
        best["LiteVAE-B"],
        field.providers,
        inputs=INPUTS,
        images=batch,
        works=field.works,
        rivals=[name for name in field.providers if name.startswith(f"{SD_VAE},")],
        goals={best[name]: goal for name, goal in goals.items()},
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
        str(usual_configuration(device)),
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


@pytest.mark.full("cpu")
@torch.no_grad()
def test_decoder(benchmark: Any, session: Session, device: str) -> None:
    """The decoders; LiteVAE's with GroupNorm and image output is the SD-VAE's own, in fused operators."""
    batch = DECODER_BATCH[device]
    field = Field("decoder", (batch, 4, 32, 32), device)
    usual = usual_configuration(device)
    sd_vae = make_model(SD_VAE, "decoder", device)
    gate = field.gate(sd_vae)
    rivals = []
    for configuration in dict.fromkeys(
        [
            *(replace(usual, memory_format=layout) for layout in LAYOUTS),
            fastest(sd_vae, "decoder", field.inputs[0], usual.dtype).configuration,
        ]
    ):
        rivals.append(label(SD_VAE, configuration))
        field.enter(sd_vae, configuration, rivals[-1], gate)
    for name, (overrides, fold) in DECODERS.items():
        model = make_model("LiteVAE-B", "decoder", device, **overrides)
        gate = field.gate(model)
        field.enter(model.fold() if fold else model, usual, name, gate)
    contest(
        benchmark,
        session,
        f"decoders, {usual}, {batch} x 256x256",
        "GroupNorm, image",
        field.providers,
        inputs=INPUTS,
        images=batch,
        works=field.works,
        rivals=rivals,
        rounds=15,
        least=5,
    )
