"""What the Triton kernels of all operators share. Imports Triton, which not every platform has."""

# Kernels are typed by Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GRID = tl.constexpr(2**30)  # programs on the grid's first axis


def kernel(function: Callable[..., Any]) -> Any:
    """Integer arguments are int64 and specialised on nothing, so that no size compiles a kernel of its own.

    What a kernel needs to know about alignment comes with its constexpr vector widths.
    """
    integers = [name for name, kind in function.__annotations__.items() if kind is tl.int64]
    return triton.jit(function, do_not_specialize=integers)


@triton.jit
def program_index():
    """Of the programs that `grid_of` makes, in int64."""
    return tl.program_id(1).to(tl.int64) * GRID + tl.program_id(0)


def grid_of(programs: int) -> tuple[int, int]:
    """For any number of programs, which one axis cannot hold; the last ones may be beyond `programs`."""
    return min(programs, GRID.value), triton.cdiv(programs, GRID.value)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of `x` the current one, where it is a GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
