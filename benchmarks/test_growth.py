"""Growth of the encoders' cost: images/s and peak memory against resolution and batch.

Each figure is a point on a curve that `benchmarks.plots` draws. The curves of the kernels are in their own files.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.harness import contest
from benchmarks.models import SD_VAE, Configuration, make_model, usual_configuration
from benchmarks.session import Session
from benchmarks.test_against_sd_vae import INPUTS, Field

MODELS = (SD_VAE, "LiteVAE-B", "LiteVAE-S")
TILE = 512
WHOLE = {"cpu": 1024, "cuda": 2048}  # above, the work of the SD-VAE's attention grows with the fourth power
RESOLUTIONS = (128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def enter(field: Field, name: str, configuration: Configuration, *, tiled: bool) -> None:
    model = make_model(name, "encoder", field.device)
    provider = name
    if tiled:
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = TILE, TILE // 8
        provider = f"{name}, tiles of {TILE}"
        configuration = replace(configuration, mode="eager")  # the compiler would unroll the loop over tiles
    field.enter(model, configuration, provider, field.gate(model))


def compete(
    benchmark: Any, session: Session, field: Field, chart: str, x: int, shape: tuple[int, ...]
) -> None:
    contest(
        benchmark,
        session,
        f"{chart}: {'x'.join(map(str, shape))}",
        next(name for name in field.providers if name.startswith("LiteVAE-B")),
        field.providers,
        inputs=INPUTS,
        images=shape[0],
        works=field.works,
        chart=chart,
        x=x,
        rounds=15,
        least=3,
    )


@pytest.mark.full("cpu")
@pytest.mark.parametrize("size", RESOLUTIONS)
@torch.no_grad()
def test_resolution(benchmark: Any, session: Session, device: str, size: int) -> None:
    shape = (1, 3, size, size)
    field = Field("encoder", shape, device)
    for name in MODELS:
        if size <= WHOLE[device]:
            enter(field, name, usual_configuration(device), tiled=False)
        if size > TILE:
            enter(field, name, usual_configuration(device), tiled=True)
    compete(benchmark, session, field, "encoders over resolution", size, shape)


@pytest.mark.full("cpu")
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_batch(benchmark: Any, session: Session, device: str, batch: int) -> None:
    shape = (batch, 3, 256, 256)
    field = Field("encoder", shape, device)
    for name in MODELS:
        enter(field, name, usual_configuration(device), tiled=False)
    compete(benchmark, session, field, "encoders over batch", batch, shape)
