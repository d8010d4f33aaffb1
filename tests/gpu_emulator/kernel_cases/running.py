"""Runs a case on the emulator, with everything that the emulator finds as an error."""

import functools
import importlib
import random
from types import ModuleType
from typing import Any

from ptx_emulator.cuda import CudaKernels
from ptx_emulator.triton_driver import TritonKernels

Kernels = CudaKernels | TritonKernels


def cases_of(operator: str) -> ModuleType:
    return importlib.import_module(f"kernel_cases.{operator}")


def run_case(kernels: Kernels, operator: str, case: Any, seed: int = 0) -> set[str]:
    """Checks a case, and returns the names of the kernels that ran."""
    kernels.emulator.reset()
    try:
        cases_of(operator).check(kernels, random.Random(seed), case)
    except AssertionError as error:
        error.add_note(f"seed {seed}: {case}\n" + "\n".join(kernels.emulator.problems()))
        raise
    found = kernels.emulator.problems()
    assert not found, f"seed {seed}: {case}\n" + "\n".join(found)
    return set(kernels.emulator.kernels())


@functools.cache
def run_covering(kernels: Kernels, operator: str, name: str) -> frozenset[str]:
    """Runs a case of `COVERING` once per session, and returns the names of its kernels."""
    return frozenset(run_case(kernels, operator, cases_of(operator).COVERING[kernels.name][name]))


def run_random(kernels: Kernels, operator: str, seed: int, count: int) -> None:
    """Runs `count` random cases of a seed."""
    for i in range(count):
        rng = random.Random(1000 * seed + i)
        run_case(kernels, operator, cases_of(operator).random_case(rng), 1000 * seed + i)
