"""The kernel that adds biases and residuals to a convolution, on a GPU or in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so this module runs itself again in a process that sets it.
There the device of the tests is the CPU, and here it is CUDA.
"""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from litevae_kernels import conv3x3, use_backend
from litevae_kernels.conv3x3 import addition
from litevae_kernels.testing import assert_within_budget

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=needs_gpu)]
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_under_the_interpreter(under_the_interpreter: Any) -> None:
    under_the_interpreter(__file__, old_numpy=True)


def problem(device: str, format: torch.memory_format) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Returns the input, the weight, two biases and two residuals of a convolution of odd size."""
    torch.manual_seed(0)
    x, *residuals = (torch.randn(2, c, 5, 7).to(device, memory_format=format) for c in (6, 12, 12))
    weight = torch.randn(12, 6, 3, 3, device=device)
    return x, weight, [torch.randn(12, device=device) for _ in range(2)], residuals


@on_device
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("silu_input", [False, True])
@torch.no_grad()
def test_equals_pytorch_in_float64(device: str, silu_input: bool, format: torch.memory_format) -> None:
    x, weight, biases, residuals = problem(device, format)
    for count in (1, 2):
        with use_backend("triton"):
            assert addition.serves(x)
            y, statistics = addition.convolve_and_add(
                x, weight, biases[:count], residuals[:count], silu_input, measure=True
            )
            unmeasured, none = addition.convolve_and_add(
                x, weight, biases[:count], residuals[:count], silu_input
            )
            joined = conv3x3(x, weight, biases[0], residual=residuals[0], silu_input=silu_input)
        assert none is None
        assert torch.equal(unmeasured, y)
        assert count == 2 or torch.equal(joined, y)
        h = F.silu(x.double()) if silu_input else x.double()
        terms = [b.double()[:, None, None] for b in biases[:count]] + [r.double() for r in residuals[:count]]
        exact = F.conv2d(h, weight.double(), padding=1) + sum(terms)
        magnitude = F.conv2d(h.abs(), weight.double().abs(), padding=1) + sum(t.abs() for t in terms)
        assert_within_budget(y, exact, magnitude=magnitude, operations=9 * 6 + 4 + 10)
        variance, mean = torch.var_mean(y.double(), (2, 3), correction=0)
        assert statistics is not None
        # 35 values of at most 10 deviations from the first one
        torch.testing.assert_close(
            statistics[..., 0], mean, rtol=0, atol=35 * 2**-24 * 10 * variance.max().sqrt().item()
        )
        torch.testing.assert_close(statistics[..., 1], variance, rtol=100 * 35 * 2**-24, atol=0)


@on_device
@torch.no_grad()
def test_registration(device: str) -> None:
    """The fake operator agrees with the real one, and functionalisation keeps what it writes."""
    x, _, biases, residuals = problem(device, torch.channels_last)
    y = residuals[0].clone(memory_format=torch.preserve_format)
    for measure in (True, False):
        torch.library.opcheck(
            torch.ops.litevae.add_residuals_.default, (y, residuals[1:], biases, measure, "triton")
        )
    assert torch.ops.litevae.add_residuals_(x[:0], [x[:0]], [], True, "triton").shape == (0, 6, 2)


@on_device
@torch.no_grad()
def test_compiles_to_one_graph(device: str) -> None:
    x, weight, biases, residuals = problem(device, torch.channels_last)

    def call(x: Tensor) -> tuple[Tensor, Tensor | None]:
        assert addition.serves(x, measure=True)
        return addition.convolve_and_add(x, weight, biases, residuals, False, measure=True)

    with use_backend("triton"):
        for actual, expected in zip(
            torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x), strict=True
        ):
            assert torch.equal(actual, expected)


def test_what_the_kernel_serves() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with FakeTensorMode():
        on_gpu = torch.empty(1, 4, 2, 2, device="cuda")
    with torch.no_grad():
        assert addition.serves(on_gpu)
        assert not addition.serves(x)
        with use_backend("reference"):
            assert not addition.serves(on_gpu)
        with forward_ad.dual_level():
            assert not addition.serves(on_gpu)
    assert not addition.serves(on_gpu)


@pytest.mark.parametrize(("chosen", "on_cpu"), [("native", None), ("triton", "triton"), ("reference", None)])
def test_which_backend_adds(chosen: str, on_cpu: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core adds on a GPU alone, and Triton also in its interpreter."""
    with FakeTensorMode():
        on_gpu = torch.empty(1, 4, 2, 2, device="cuda")
    monkeypatch.setattr(addition, "choose", lambda device_type: chosen)
    assert addition._backend(on_gpu) == (None if chosen == "reference" else chosen)
    assert addition._backend(torch.zeros(1, 4, 2, 2)) == on_cpu
