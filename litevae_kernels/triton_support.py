"""Helpers of all operators' Triton kernels. Imports Triton, which is not available on every platform."""

# Triton gives kernels their types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GRID = tl.constexpr(2**30)  # programs on the grid's first axis


def kernel(*scalars: str) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator that compiles a kernel whose numbers are int64 and float64, once for all of their values.

    Triton would compile a kernel again for a size of 1 or a multiple of 16. Kernels learn about alignment from their
    constexpr vector widths instead.

    Launches of kernels with sums set enable_fp_fusion=False. Otherwise Triton 3.8 contracts the product of one lane
    with the addition of another lane's, so that the lanes of a sum get different results. These kernels call `tl.fma`.

    Args:
        scalars: Names of the pointers that are not accessed as vectors. Their alignment does not matter, so it does
            not compile the kernel again.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        integers = [name for name, kind in function.__annotations__.items() if kind is tl.int64]
        return triton.jit(function, do_not_specialize=integers, do_not_specialize_on_alignment=list(scalars))

    return decorate


@triton.jit
def program_index():
    """Returns the index of a program in the grid of `grid_of`, as int64."""
    return tl.program_id(1).to(tl.int64) * GRID + tl.program_id(0)


def grid_of(programs: int) -> tuple[int, int]:
    """Returns a two-dimensional grid, because one axis cannot hold every number of programs.

    The grid may hold more than `programs`; a kernel returns early if its index is not below that.
    """
    return min(programs, GRID.value), triton.cdiv(programs, GRID.value)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of `x` the current one if it is a GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
