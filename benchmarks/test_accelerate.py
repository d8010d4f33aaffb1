"""The SD-VAE in diffusers' own operators against the same model after `litevae_kernels.accelerate_vae`.

diffusers' model runs in eager mode in both layouts, the accelerated one as a user gets it, with contiguous parameters
and inputs. The default run decodes one image of 256x256 in the machine's fastest dtype; `--full` adds 512x512, the
encoder and the other dtypes.
"""

import copy
import itertools
from typing import Any

import pytest
import torch

from benchmarks.harness import contest, dtype_name, served_dtypes
from benchmarks.models import SD_VAE, Configuration, Side, make_model
from benchmarks.session import Goal, Session
from benchmarks.test_against_sd_vae import INPUTS, Field
from litevae_kernels import accelerate_vae

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES: dict[Side, tuple[int, int]] = {
    "encoder": (3, 1),
    "decoder": (4, 8),
}  # channels, image pixels per latent pixel
OURS = "litevae_kernels"
GOALS: dict[Side, Goal] = {"encoder": Goal(), "decoder": Goal(speedup=1.7, memory_share=0.7)}


DTYPES = served_dtypes("cuda" if torch.cuda.is_available() else "cpu")
DEFAULT = ("decoder", 256, DTYPES[-1])
RACES = [
    pytest.param(
        side,
        size,
        dtype,
        id=f"{side}-{size}-{dtype_name(dtype)}",
        marks=[] if (side, size, dtype) == DEFAULT else [pytest.mark.full],
    )
    for side, size, dtype in itertools.product(SHAPES, (256, 512), DTYPES)
]


@pytest.mark.parametrize(("side", "size", "dtype"), RACES)
@torch.no_grad()
def test_accelerated(
    benchmark: Any, session: Session, device: str, side: Side, size: int, dtype: torch.dtype
) -> None:
    channels, factor = SHAPES[side]
    field = Field(side, (1, channels, size // factor, size // factor), device)
    model = make_model(SD_VAE, side, device)
    gate = field.gate(model)
    rivals = {f"diffusers, {name}": layout for name, layout in LAYOUTS.items()}
    for name, layout in rivals.items():
        field.enter(model, Configuration(dtype, layout, "eager"), name, gate)
    accelerated = copy.deepcopy(model)
    accelerate_vae(accelerated)
    field.enter(accelerated, Configuration(dtype, torch.contiguous_format, "eager"), OURS, gate)
    contest(
        benchmark,
        session,
        f"accelerate_vae, SD-VAE's {side}, {dtype_name(dtype)}, 1 x {size}x{size}",
        OURS,
        field.providers,
        inputs=INPUTS,
        images=1,
        works=field.works,
        rivals=list(rivals),
        goals={OURS: GOALS[side]},
        rounds=15,
        least=3,
        seconds=20,
    )
