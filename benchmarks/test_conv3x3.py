"""The 3x3 convolution of ResBlocks against PyTorch's, at sizes of LiteVAE-B's encoder and of the decoder.

The default run has LiteVAE-B's widest layer; `--full` adds the other sizes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    autocast,
    compiled,
    contest,
    dtype_name,
    relative_error,
    served_dtypes,
    with_autocast,
)
from benchmarks.session import Session
from litevae_kernels import conv3x3
from litevae_kernels.arithmetic import current_isa
from litevae_kernels.conv3x3.dispatch import why_not

# (batch, channels in, channels out, height, width)
SIZES = [(4, 96, 96, 128, 128), (4, 64, 64, 128, 128), (4, 96, 96, 32, 32), (1, 512, 512, 64, 64)]
INPUTS = 5
SECONDS = 2.0
RIVALS = ("conv2d, eager", "conv2d, eager, contiguous", "conv2d, torch.compile")
DTYPES = [dtype for dtype in served_dtypes("cpu") if why_not(dtype, current_isa()) is None]
# The smallest ratio of PyTorch's time to ours for LiteVAE-B's widest layer: inference; forward and backward.
BARS = {torch.float32: (2.2, 2.0)}
# The bound of the error, as a multiple of that of PyTorch's convolution and as a fraction of the norm. Winograd's
# algorithm for bfloat16 also rounds both factors, which makes its error 2.5 times that of the result alone. In float32
# its larger tiles lose about a decimal digit.
ALLOWED = {torch.bfloat16: (3.5, 0.0), torch.float32: (3.5, 1e-5)}


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch's convolution serves GPUs")


def image(dtype: torch.dtype, batch: int, channels: int, height: int, width: int) -> Tensor:
    x = torch.randn(batch, channels, height, width).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def check(ours: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    factor, least = ALLOWED[dtype]
    assert relative_error(ours, exact) < max(factor * relative_error(theirs, exact), least)


def bars(size: tuple[int, ...], dtype: torch.dtype, *, training: bool) -> dict[str, float]:
    if size != SIZES[0] or dtype not in BARS:
        return {}
    return dict.fromkeys(RIVALS, BARS[dtype][training])


def make_weight(outputs: int, inputs: int) -> Tensor:
    weight = torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5
    return weight.contiguous(memory_format=torch.channels_last)


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
by_size = pytest.mark.parametrize(
    "size",
    [SIZES[0], *(pytest.param(size, marks=pytest.mark.full) for size in SIZES[1:])],
    ids=lambda size: "x".join(map(str, size)),
)


@by_dtype
@by_size
def test_inference(benchmark: Any, session: Session, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Inference with bias and residual, as in the second convolution of a block."""
    batch, inputs, outputs, *pixels = size
    sets = [
        (image(dtype, batch, inputs, *pixels), image(dtype, batch, outputs, *pixels)) for _ in range(INPUTS)
    ]
    contiguous = [(x.contiguous(), residual.contiguous()) for x, residual in sets]
    weight, bias = make_weight(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)

    def ours(i: int) -> Tensor:
        return conv3x3(sets[i][0], weight, bias, residual=sets[i][1])

    def torchs(x: Tensor, residual: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1).add_(residual)

    def plain(x: Tensor, residual: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1) + residual

    fused = compiled(plain)
    with torch.inference_mode():
        x, residual = sets[0]
        exact = F.conv2d(x[:1].double(), weight.double(), bias.double(), padding=1) + residual[:1].double()
        check(ours(0)[:1], torchs(*sets[0])[:1], exact, dtype)
        contest(
            benchmark,
            session,
            f"conv3x3 with bias and residual, inference, {dtype_name(dtype)}, {'x'.join(map(str, size))}",
            "litevae_kernels native",
            {
                "litevae_kernels native": ours,
                "conv2d, eager": lambda i: torchs(*sets[i]),
                "conv2d, eager, contiguous": lambda i: torchs(*contiguous[i]),
                "conv2d, torch.compile": lambda i: fused(*sets[i]),
            },
            inputs=INPUTS,
            bars=bars(size, dtype, training=False),
            seconds=SECONDS,
        )


@by_dtype
@by_size
def test_forward_and_backward(
    benchmark: Any, session: Session, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Forward and backward with float32 weights and their float32 gradients."""
    batch, inputs, outputs, *pixels = size
    sets = [
        (image(dtype, batch, inputs, *pixels).requires_grad_(), image(dtype, batch, outputs, *pixels))
        for _ in range(INPUTS)
    ]
    contiguous = [(x.detach().contiguous().requires_grad_(), grad.contiguous()) for x, grad in sets]
    weight = make_weight(outputs, inputs).requires_grad_()

    def torchs(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    def provider(
        function: Callable[[Tensor], Tensor], sets: list[tuple[Tensor, Tensor]]
    ) -> Callable[[int], tuple[Tensor, ...]]:
        def run(i: int) -> tuple[Tensor, ...]:
            x, grad = sets[i]
            with autocast("cpu", dtype):
                y = function(x)
            return torch.autograd.grad(y, (x, weight), grad)

        return run

    providers = {
        "litevae_kernels native": provider(lambda x: conv3x3(x, weight), sets),
        "conv2d, eager": provider(torchs, sets),
        "conv2d, eager, contiguous": provider(torchs, contiguous),
        "conv2d, torch.compile": provider(compiled(torchs), sets),
    }
    x, grad = (t[:1].detach() for t in sets[0])
    wide = x.double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.conv2d(*wide, padding=1), wide, grad.double())
    sets[0] = (x.requires_grad_(), grad)
    found = zip(providers["litevae_kernels native"](0), providers["conv2d, eager"](0), exact, strict=True)
    for ours, theirs, expected in found:
        check(ours, theirs, expected, dtype)
    sets[0] = sets[1]
    contest(
        benchmark,
        session,
        f"conv3x3 forward and backward, {with_autocast(dtype)}, {'x'.join(map(str, size))}",
        "litevae_kernels native",
        providers,
        inputs=INPUTS,
        bars=bars(size, dtype, training=True),
        seconds=SECONDS,
    )
