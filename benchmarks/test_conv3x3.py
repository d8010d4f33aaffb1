"""The 3x3 convolution of ResBlocks against PyTorch's, at sizes of LiteVAE-B's encoder and of the decoder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import compiled, contest, relative_error
from benchmarks.session import Session
from litevae_kernels import conv3x3
from litevae_kernels.arithmetic import current_isa, multiplies
from litevae_kernels.conv3x3 import why_not

# (batch, channels in, channels out, height, width)
SIZES = [(4, 96, 96, 128, 128), (4, 64, 64, 128, 128), (4, 96, 96, 32, 32), (1, 512, 512, 64, 64)]
INPUTS = 5


WHY_NOT = "a GPU" if torch.cuda.is_available() else why_not(torch.bfloat16, current_isa())
if WHY_NOT is None and not multiplies(torch.bfloat16, current_isa()):
    WHY_NOT = "the CPU has no bfloat16 arithmetic, and PyTorch emulates it"
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no comparison in bfloat16 here: {WHY_NOT}")


def image(batch: int, channels: int, height: int, width: int) -> Tensor:
    x = torch.randn(batch, channels, height, width).bfloat16()
    return x.contiguous(memory_format=torch.channels_last)


def make_weight(outputs: int, inputs: int) -> Tensor:
    weight = torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5
    return weight.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_inference(benchmark: Any, session: Session, size: tuple[int, ...]) -> None:
    """Inference with bias and residual, as in the second convolution of a block."""
    batch, inputs, outputs, *pixels = size
    sets = [(image(batch, inputs, *pixels), image(batch, outputs, *pixels)) for _ in range(INPUTS)]
    weight, bias = make_weight(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()

    def ours(i: int) -> Tensor:
        return conv3x3(sets[i][0], weight, bias, residual=sets[i][1])

    def torchs(i: int) -> Tensor:
        return F.conv2d(sets[i][0], weight, bias, padding=1).add_(sets[i][1])

    def plain(x: Tensor, residual: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1) + residual

    fused = compiled(plain)
    with torch.inference_mode():
        x, residual = sets[0]
        exact = F.conv2d(x[:1].double(), weight.double(), bias.double(), padding=1) + residual[:1].double()
        # The kernel also rounds both factors to bfloat16, which makes its error 2.5 times that of the result alone.
        assert relative_error(ours(0)[:1], exact) < 3.5 * relative_error(torchs(0)[:1], exact)
        contest(
            benchmark,
            session,
            f"conv3x3 with bias and residual, inference, bf16 channels_last, {'x'.join(map(str, size))}",
            "litevae_kernels native",
            {
                "litevae_kernels native": ours,
                "conv2d, eager": torchs,
                "conv2d, torch.compile": lambda i: fused(*sets[i]),
            },
            inputs=INPUTS,
        )


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_forward_and_backward(benchmark: Any, session: Session, size: tuple[int, ...]) -> None:
    """Forward and backward under autocast: float32 weights and their float32 gradients."""
    batch, inputs, outputs, *pixels = size
    sets = [
        (image(batch, inputs, *pixels).requires_grad_(), image(batch, outputs, *pixels))
        for _ in range(INPUTS)
    ]
    weight = make_weight(outputs, inputs).requires_grad_()

    def torchs(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    def provider(function: Callable[[Tensor], Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
        def run(i: int) -> tuple[Tensor, ...]:
            x, grad = sets[i]
            with torch.autocast("cpu", torch.bfloat16):
                y = function(x)
            return torch.autograd.grad(y, (x, weight), grad)

        return run

    providers = {
        "litevae_kernels native": provider(lambda x: conv3x3(x, weight)),
        "conv2d, eager": provider(torchs),
        "conv2d, torch.compile": provider(compiled(torchs)),
    }
    x, grad = (t[:1].detach() for t in sets[0])
    wide = x.double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.conv2d(*wide, padding=1), wide, grad.double())
    sets[0] = (x.requires_grad_(), grad)
    found = zip(providers["litevae_kernels native"](0), providers["conv2d, eager"](0), exact, strict=True)
    for ours, theirs, expected in found:  # the same bound as above
        assert relative_error(ours, expected) < 3.5 * relative_error(theirs, expected)
    sets[0] = sets[1]
    contest(
        benchmark,
        session,
        f"conv3x3 forward and backward, bf16 autocast, channels_last, {'x'.join(map(str, size))}",
        "litevae_kernels native",
        providers,
        inputs=INPUTS,
    )
