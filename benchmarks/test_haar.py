"""The Haar pyramid against its rivals: forward and backward, fp32 and bf16.

pytorch_wavelets is entered if it is installed (``pip install ".[rivals]"``).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ptwt
import pytest
import pywt
import torch
from torch import Tensor

from benchmarks.harness import Provider, contest, copies, our_backends, relative_error, with_backend
from benchmarks.rivals import optional
from benchmarks.session import Session
from litevae_kernels import haar_pyramid
from litevae_kernels.testing import assert_within_budget

SHAPE = (32, 3, 256, 256)
# times 25 MB in fp32: more than the last cache of a CPU or a GPU
INPUTS = 7
LEVELS = 3

pytorch_wavelets = optional("pytorch_wavelets")


def in_float32() -> AbstractContextManager[None]:
    """Turns TF32 off for the convolutions by which some rivals transform on a GPU."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def appendix_g(image: Tensor) -> list[Tensor]:
    """The paper's pseudocode (Appendix G): ptwt once per level."""
    out = []
    for level in range(1, LEVELS + 1):
        low, high, *_ = ptwt.wavedec2(image.float(), pywt.Wavelet("haar"), level=level, mode="symmetric")
        out.append(torch.cat([low, *high], dim=1) / 2**level)
    return out


def slicing(image: Tensor) -> list[Tensor]:
    """The transform as one writes it in PyTorch without a library."""
    out, ll = [], image
    for _ in range(LEVELS):
        a, b = ll[..., 0::2, 0::2], ll[..., 0::2, 1::2]
        c, d = ll[..., 1::2, 0::2], ll[..., 1::2, 1::2]
        ll = (a + b + c + d) / 4
        out.append(torch.cat([ll, (a + b - c - d) / 4, (a - b + c - d) / 4, (a - b - c + d) / 4], 1))
    return out


def pywavelets(image: Tensor) -> list[Any]:
    """PyWavelets, one level after the other, on its single thread."""
    out, ll = [], image.numpy()
    for level in range(1, LEVELS + 1):
        ll, details = pywt.dwt2(ll, "haar", mode="symmetric")
        out.append([x / 2**level for x in (ll, *details)])
    return out


def check(outputs: Sequence[Tensor], image: Tensor) -> None:
    """Checks the results: a speed is reported only for correct results."""
    for actual, exact in zip(outputs, slicing(image.double()), strict=True):
        assert_within_budget(actual, exact, magnitude=4 * image.abs().max().item(), operations=3 * LEVELS)


CASES = {
    "fp32": (torch.float32, torch.float32, torch.contiguous_format),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.contiguous_format),
    "fp32 to bf16 channels_last": (torch.float32, torch.bfloat16, torch.channels_last),
}


# On a CPU, the default run measures float32.
by_case = pytest.mark.parametrize(
    "case",
    [case if case == "fp32" else pytest.param(case, marks=pytest.mark.full("cpu")) for case in CASES],
)


def rounding(case: str) -> float:
    """Returns the allowed error of a rival relative to the root mean square: one rounding per addition."""
    return 4 * LEVELS * max(torch.finfo(dtype).eps for dtype in CASES[case][:2])


Function = Callable[[Tensor], Sequence[Tensor]]


def contestants(case: str) -> tuple[torch.dtype, Function, Function, Function]:
    """The images' dtype, and three functions with the same result: ours, slicing, and ptwt."""
    dtype, out_dtype, memory_format = CASES[case]

    def ours(image: Tensor) -> tuple[Tensor, ...]:
        return haar_pyramid(image, LEVELS, dtype=out_dtype, memory_format=memory_format)

    def by_slicing(image: Tensor) -> list[Tensor]:
        return [x.to(out_dtype, memory_format=memory_format) for x in slicing(image)]

    def by_ptwt(image: Tensor) -> list[Tensor]:
        return [x.to(out_dtype, memory_format=memory_format) for x in appendix_g(image)]

    return dtype, ours, by_slicing, by_ptwt


def with_pytorch_wavelets(case: str, device: str) -> Function:
    """Transforms level by level, because the means of each level are needed."""
    _, out_dtype, memory_format = CASES[case]
    transform = pytorch_wavelets.DWTForward(J=1, wave="haar", mode="symmetric").to(device)

    def pyramid(image: Tensor) -> list[Tensor]:
        out, ll = [], image.float()
        for level in range(1, LEVELS + 1):
            ll, (details,) = transform(ll)
            out.append(torch.cat([ll, *details.unbind(2)], dim=1) / 2**level)
        return [x.to(out_dtype, memory_format=memory_format) for x in out]

    return pyramid


def compete_forward(
    benchmark: Any,
    session: Session,
    device: str,
    case: str,
    shape: tuple[int, ...],
    chart: str | None = None,
    x: float | None = None,
) -> None:
    dtype, ours, by_slicing, by_ptwt = contestants(case)
    images = [torch.randn(shape, device=device).to(dtype) for _ in range(INPUTS)]

    compiled = torch.compile(by_slicing, fullgraph=True)
    backends = our_backends(device)
    out = ours(images[0])
    byte_count = images[0].nbytes + sum(x.nbytes for x in out)
    copy = copies(device, byte_count, INPUTS)
    providers: dict[str, Provider] = {"copy of the same bytes": copy}
    for backend in backends:
        call = with_backend(backend, ours)
        check(call(images[0]), images[0])
        providers[f"litevae_kernels {backend}"] = lambda i, call=call: call(images[i])
    providers |= {
        "slicing, torch.compile": lambda i: compiled(images[i]),
        "slicing, eager": lambda i: by_slicing(images[i]),
        "Appendix G, ptwt": lambda i: by_ptwt(images[i]),
    }
    if pytorch_wavelets is not None:
        library = with_pytorch_wavelets(case, device)
        with in_float32():
            outputs = library(images[0])
        for actual, exact in zip(outputs, slicing(images[0].double()), strict=True):
            assert relative_error(actual, exact) < rounding(case)
        providers["pytorch_wavelets"] = lambda i: library(images[i])
    if case == "fp32":
        with in_float32():  # the rivals compute the same
            torch.testing.assert_close(appendix_g(images[0]), slicing(images[0]))
        if device == "cpu":
            providers["PyWavelets"] = lambda i: pywavelets(images[i])
    contest(
        benchmark,
        session,
        f"haar_pyramid forward, {case}, {'x'.join(map(str, shape))}",
        f"litevae_kernels {backends[0]}",
        providers,
        inputs=INPUTS,
        bytes_moved=byte_count,
        copy="copy of the same bytes",
        chart=chart,
        x=x,
    )


@by_case
def test_pyramid_forward(benchmark: Any, session: Session, device: str, case: str) -> None:
    compete_forward(benchmark, session, device, case, SHAPE)


@pytest.mark.full("cpu")
@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024, 2048])
def test_forward_over_size(benchmark: Any, session: Session, device: str, size: int) -> None:
    chart = "haar_pyramid forward, fp32, 4 images of 3 channels"
    compete_forward(benchmark, session, device, "fp32", (4, 3, size, size), chart, size)


@by_case
def test_pyramid_backward(benchmark: Any, session: Session, device: str, case: str) -> None:
    dtype, ours, by_slicing, by_ptwt = contestants(case)
    images = [torch.randn(SHAPE, device=device).to(dtype).requires_grad_() for _ in range(INPUTS)]

    with torch.no_grad():
        grads = [[torch.randn_like(x) for x in ours(image)] for image in images]
    byte_count = images[0].nbytes + sum(x.nbytes for x in grads[0])

    def backward_of(function: Function) -> Provider:
        outputs = [function(image) for image in images]
        return lambda i: torch.autograd.grad(outputs[i], images[i], grads[i], retain_graph=True)[0]

    exact_image = images[0].detach().double().requires_grad_()
    exact_grads = [g.double() for g in grads[0]]
    exact = torch.autograd.grad(slicing(exact_image), exact_image, exact_grads)[0]
    backends = our_backends(device)
    providers: dict[str, Provider] = {"copy of the same bytes": copies(device, byte_count, INPUTS)}
    for backend in backends:
        provider = backward_of(with_backend(backend, ours))
        assert_within_budget(provider(0), exact, magnitude=32.0, operations=4 * LEVELS)
        providers[f"litevae_kernels {backend}"] = provider
    providers |= {
        "slicing, torch.compile": backward_of(torch.compile(by_slicing, fullgraph=True)),
        "slicing, eager": backward_of(by_slicing),
        "Appendix G, ptwt": backward_of(by_ptwt),
    }
    if pytorch_wavelets is not None:
        providers["pytorch_wavelets"] = backward_of(with_pytorch_wavelets(case, device))
    for name, provider in providers.items():
        if not name.startswith(("copy", "litevae")):
            with in_float32():
                gradient = provider(0)
            assert relative_error(gradient, exact) < rounding(case), name
    contest(
        benchmark,
        session,
        f"haar_pyramid backward, {case}, {'x'.join(map(str, SHAPE))}",
        f"litevae_kernels {backends[0]}",
        providers,
        inputs=INPUTS,
        bytes_moved=byte_count,
        copy="copy of the same bytes",
    )
