"""The 3x3 convolution of ResBlocks against PyTorch's, at sizes of LiteVAE-B's encoder and of the decoder."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Session, compiled, contest, relative_error
from litevae_kernels import conv3x3
from litevae_kernels.conv3x3 import WHY_NOT

# (batch, channels in, channels out, height, width)
SIZES = [(4, 96, 96, 128, 128), (4, 64, 64, 128, 128), (4, 96, 96, 32, 32), (1, 512, 512, 64, 64)]
INPUTS = 5


@pytest.mark.skipif(WHY_NOT is not None, reason=f"PyTorch's convolution serves all calls here: {WHY_NOT}")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_inference(benchmark: Any, session: Session, device: str, size: tuple[int, ...]) -> None:
    """With bias and residual, as the second convolution of a block."""
    if device != "cpu":
        pytest.skip("PyTorch's convolution serves all calls on a GPU")
    batch, inputs, outputs, height, width = size

    def image(channels: int) -> Tensor:
        x = torch.randn(batch, channels, height, width).bfloat16()
        return x.contiguous(memory_format=torch.channels_last)

    sets = [(image(inputs), image(outputs)) for _ in range(INPUTS)]
    weight = (torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5).bfloat16()
    weight, bias = weight.contiguous(memory_format=torch.channels_last), torch.randn(outputs).bfloat16()

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
        # the gate: both factors are rounded to bfloat16 beside the result, 2.5 times the error of that alone
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
