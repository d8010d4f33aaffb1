"""Every kernel of every operator on the emulated GPU."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_cases.group_norm_silu
import pytest
import torch
import torch.nn.functional as F
from kernel_cases.running import Kernels, cases_of, run_case, run_covering, run_random
from ptx_emulator import build, triton_driver

from litevae_kernels.group_norm_silu import native
from litevae_kernels.testing import assert_within_budget

WITH_KERNELS = {"cuda": build.OPERATORS, "triton": triton_driver.OPERATORS}
BACKENDS = tuple(WITH_KERNELS)
EACH = [(backend, name) for backend, names in WITH_KERNELS.items() for name in names]
TESTED = sorted(path.stem for path in Path(__file__).parent.glob("kernel_cases/*.py"))
# Operators whose cases are missing fail a test of their own, and not the collection.
COVERING = [
    (backend, operator, name)
    for backend, operator in EACH
    if operator in TESTED
    for name in cases_of(operator).COVERING[backend]
]


@pytest.fixture
def kernels(backend: str, request: pytest.FixtureRequest) -> Kernels:
    return request.getfixturevalue(f"{backend}_kernels")


@pytest.mark.parametrize(("backend", "operator"), EACH)
def test_every_operator_has_cases(backend: str, operator: str) -> None:
    assert operator in TESTED, f"kernel_cases/{operator}.py is missing; see CONTRIBUTING.md"
    assert cases_of(operator).COVERING[backend]


@pytest.mark.parametrize(("backend", "operator", "name"), COVERING)
def test_equals_the_oracle(kernels: Any, operator: str, name: str) -> None:
    run_covering(kernels, operator, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kernel_ran(kernels: Any, backend: str) -> None:
    """The kernels are those of the compiled PTX, or of the modules of Triton kernels."""
    ran: set[str] = set()
    for with_kernels, operator, name in COVERING:
        if with_kernels == backend:
            ran |= run_covering(kernels, operator, name)
    assert ran == kernels.all_kernels()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("operator", WITH_KERNELS["cuda"])
def test_random_calls(cuda_kernels: Any, operator: str, seed: int) -> None:
    run_random(cuda_kernels, operator, seed, count=15)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
@pytest.mark.parametrize("operator", WITH_KERNELS["cuda"])
def test_many_random_calls(cuda_kernels: Any, operator: str, seed: int) -> None:
    run_random(cuda_kernels, operator, seed, count=20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("operator", WITH_KERNELS["triton"])
def test_random_calls_of_triton(triton_kernels: Any, operator: str, seed: int) -> None:
    run_random(triton_kernels, operator, seed, count=3)


SPECIAL = [("smc", "LARGE"), ("smc", "SPECIAL"), ("group_norm_silu", "SPECIAL")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "group", "name"),
    [(operator, group, name) for operator, group in SPECIAL for name in getattr(cases_of(operator), group)],
)
def test_special_cases(cuda_kernels: Any, operator: str, group: str, name: str) -> None:
    run_case(cuda_kernels, operator, getattr(cases_of(operator), group)[name])


# Values for cases of `COVERING`, whose kernels are compiled already.
SPECIAL_VALUES = [
    ("group_norm_silu", "channels_last float32", {"mean": 1e4}),
    ("group_norm_silu", "channels_last float32", {"outlier": 1e4}),
    ("smc", "float32 3x3", {"zeros": "filter", "eps": 1e-3}),
    ("smc", "float32 3x3", {"zeros": "scales", "eps": 1e-3}),
]


@pytest.mark.parametrize(
    ("operator", "name", "values"), SPECIAL_VALUES, ids=["mean", "outlier", "zero filter", "zero scales"]
)
def test_special_values_of_triton(
    triton_kernels: Any, operator: str, name: str, values: dict[str, Any]
) -> None:
    case = replace(cases_of(operator).COVERING["triton"][name], **values)
    run_case(triton_kernels, operator, case)


def test_tensors_may_have_no_elements(cuda_kernels: Any) -> None:
    haar = importlib.import_module("kernel_cases.haar")
    case = haar.Case(True, (0, 3, 8, 8), 2, "symmetric", True, haar.F32, haar.F32, "contiguous", "contiguous")
    assert run_case(cuda_kernels, "haar", case) == set()


@pytest.mark.parametrize("contracted", [False, True], ids=["as launched", "control"])
def test_equal_filters_have_equal_norms(
    triton_kernels: Any, contracted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm does not depend on which lane has which number, so that all lanes get the same.

    It does if the product of one lane is contracted with the addition of another lane's. Of 16 filters, there are two
    copies, and two with both halves, which the first shuffle adds, in the other order. Each lane has one number.
    """
    if contracted:
        smc = importlib.import_module("litevae_kernels.smc.triton")
        order = smc._order

        def contracting(*arguments: Any) -> Any:
            sizes, options = order(*arguments)
            return sizes, options | {"enable_fp_fusion": True}

        monkeypatch.setattr(smc, "_order", contracting)
    torch.manual_seed(0)
    halves = torch.randn(16, 2, 16)
    halves[..., -1] = 0
    weight = torch.cat([halves, halves.flip(1)] * 2).view(64, 32, 1, 1)[:, :31].contiguous()
    modulated, norm = torch.empty_like(weight), torch.empty(64)
    triton_kernels.emulator.reset()
    arguments = (weight, torch.ones(31), None, modulated, norm, 1e-8)
    triton_kernels.run("smc", "forward", *arguments, written=[modulated, norm])
    assert not triton_kernels.emulator.problems()
    assert torch.equal(norm[:32], norm[32:])
    assert torch.equal(modulated[:32], modulated[32:])
    assert torch.equal(norm[:16], norm[16:32]) == (not contracted)


# Groups of 5 channels, one of which has channels of x and of skip.
@pytest.mark.parametrize(
    ("backend", "mode", "dtype", "layout"),
    [
        ("cuda", "off", torch.bfloat16, torch.channels_last),
        ("cuda", "off", torch.float32, torch.contiguous_format),
        ("cuda", "off", torch.float64, torch.contiguous_format),
        ("cuda", "clusters", torch.bfloat16, torch.channels_last),
        ("cuda", "clusters", torch.float32, torch.contiguous_format),
        ("cuda", "clusters", torch.float64, torch.contiguous_format),
        ("triton", "off", torch.float32, torch.channels_last),
    ],
    ids=str,
)
@pytest.mark.parametrize("given", [False, True], ids=["own statistics", "given statistics"])
def test_an_offset_is_added_before_the_norm(
    kernels: Any,
    mode: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    given: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "mode", mode)
    torch.manual_seed(0)
    x, skip = (torch.randn(2, c, 5, 8).to(dtype).contiguous(memory_format=layout) for c in (24, 16))
    weight, bias, offset = (
        torch.randn(40),
        torch.randn(40, dtype=torch.float64),
        3 * torch.randn(80).half()[::2],
    )
    y = torch.full((2, 40, 5, 8), torch.nan, dtype=dtype).contiguous(memory_format=layout)
    stats = torch.empty(2, 8, 2, dtype=torch.float64)
    statistics = kernel_cases.group_norm_silu.statistics_of(x, skip) if given else ()
    arguments = (x, skip, weight, bias, y, stats, 8, 1e-6, offset, statistics)
    kernels.emulator.reset()
    kernels.run("group_norm_silu", "forward", *arguments, written=[y, stats])
    assert not kernels.emulator.problems()
    whole = torch.cat([x, skip], 1).double() + offset.double()[:, None, None]
    exact = F.silu(F.group_norm(whole, 8, weight.double(), bias.double(), 1e-6))
    actual = y.float() if dtype == torch.float64 else y  # the parameters are only as exact as float32
    magnitude = 5 * weight.abs().max().item() + bias.abs().max().item()
    operations = kernel_cases.group_norm_silu.FORWARD + kernel_cases.group_norm_silu.CHAIN
    assert_within_budget(actual, exact, magnitude=magnitude, operations=operations)


@pytest.mark.parametrize("mode", native.MODES)
def test_statistics_may_be_unwanted(cuda_kernels: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference mode they go to the scratch memory, whose remainder must be aligned."""
    monkeypatch.setattr(native, "mode", mode)
    x = torch.randn(3, 15, 5, 7)
    with_stats, without = torch.empty_like(x), torch.empty_like(x)
    stats = torch.empty(3, 5, 2, dtype=torch.float64)
    cuda_kernels.emulator.reset()
    for y, given in ((with_stats, stats), (without, None)):
        arguments = (x, None, None, None, y, given, 5, 1e-6)
        cuda_kernels.run("group_norm_silu", "forward", *arguments, written=[y, given])
    assert not cuda_kernels.emulator.problems()
    assert torch.equal(with_stats, without)
