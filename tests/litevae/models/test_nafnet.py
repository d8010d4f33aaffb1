import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.models.nafnet import NAFBlock, NAFNet


def plain_naf_block(block: NAFBlock, x: Tensor) -> Tensor:
    """Follows Figure 3c and Equations 4 to 6 of Chen et al., with the sums written out."""

    def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        y = centred / (centred.square().mean(dim=1, keepdim=True) + layer.eps).sqrt()
        return torch.einsum("nchw,c->nchw", y, layer.weight) + layer.bias[:, None, None]

    def pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
        return torch.einsum("nchw,oc->nohw", x, layer.weight[:, :, 0, 0]) + layer.bias[:, None, None]

    def simple_gate(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return x[:, :half] * x[:, half:]

    h = pointwise(block.expand1, norm(block.norm1, x))
    padded, (height, width) = F.pad(h, (1, 1, 1, 1)), h.shape[2:]
    h = block.depthwise.bias[:, None, None] + sum(
        block.depthwise.weight[:, :, i, j].view(1, -1, 1, 1) * padded[:, :, i : i + height, j : j + width]
        for i in range(3)
        for j in range(3)
    )
    h = simple_gate(h)
    h = h * pointwise(block.attention, h.sum(dim=(2, 3), keepdim=True) / (height * width))
    x = x + block.beta * pointwise(block.project1, h)
    h = simple_gate(pointwise(block.expand2, norm(block.norm2, x)))
    return x + block.gamma * pointwise(block.project2, h)


def test_nafnet_is_the_formula_of_its_paper(randomised):
    torch.manual_seed(0)
    network = randomised(NAFNet(3, 5, channels=4, multipliers=(1, 2)).double())
    assert len(network.blocks) == 16
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = network.conv_in(x)
    for block in network.blocks:
        expected = plain_naf_block(block, expected)
    torch.testing.assert_close(network(x), network.conv_out(expected), atol=1e-11, rtol=1e-11)


def test_new_nafnet_is_two_convolutions():
    """Beta and gamma start at zero."""
    network, x = NAFNet(3, 5, channels=4, multipliers=(1,)), torch.randn(2, 3, 6, 5)
    assert torch.equal(network(x), network.conv_out(network.conv_in(x)))


def test_layer_norms_statistics_are_float32():
    """The values are near 300, whose square float16 cannot represent and bfloat16 rounds coarsely."""
    torch.manual_seed(0)
    block = NAFBlock(64)
    x = 300 + 8 * torch.randn(1, 64, 4, 4)
    for dtype in (torch.float16, torch.bfloat16):
        stored = x.to(dtype)
        actual = copy.deepcopy(block.norm1).to(dtype)(stored)
        expected = (stored.double() - stored.double().mean(1)) / stored.double().std(1, unbiased=False)
        assert actual.dtype == dtype
        # The result is rounded once; the mean, 300 times as large as the differences from it, in float32.
        torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=torch.finfo(dtype).eps)
