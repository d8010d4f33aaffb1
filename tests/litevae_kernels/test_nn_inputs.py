"""What the layers do with inputs that they cannot take: PyTorch's decision, in one line of our own."""

import numpy as np
import pytest
import torch
from torch import nn

from litevae_kernels import haar_pyramid, wavedec2
from litevae_kernels.nn import Conv2d, Conv3x3, GroupNormSiLU, Linear, SelfModulatedConv2d


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (Conv2d(4, 6, 3), (1, 4, 2, 9), "smaller than the kernel of 3x3$"),
        (Conv2d(4, 6, 3, dilation=(1, 4)), (1, 4, 9, 8), "smaller than the kernel of 3x3$"),
        (Conv2d(4, 6, 1), (1, 4, 0, 9), "smaller than the kernel of 1x1$"),
        (Conv2d(4, 6, 3, groups=2), (1, 2, 9, 9), r"^x has shape \(1, 2, 9, 9\); 4 channels are needed"),
        (Conv2d(4, 6, 3), (4,), "^x has 1 dimensions; 4 are needed"),
        (
            Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
            (4, 9, 2),
            "'reflect' allows at most 1 for x of",
        ),
        (Conv3x3(4, 6, 3, padding=4, padding_mode="circular"), (1, 4, 3, 9), "'circular' allows at most 3"),
        (SelfModulatedConv2d(4, 6, 3, padding=1, padding_mode="replicate"), (1, 4, 9, 0), "smaller than the"),
        (Linear(4, 6), (2, 3), r"^x has shape \(2, 3\); \(\.\.\., 4\) is needed"),
        (Linear(4, 6), (), r"^x has shape \(\); \(\.\.\., 4\) is needed"),
    ],
)
def test_layers_refuse_inputs_that_pytorch_refuses_in_its_own_words(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("padding", [0, 1, 2, 3, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_convolutions_take_the_sizes_that_pytorchs_take(mode, padding, size):
    options = {"padding": padding, "dilation": 2, "padding_mode": mode}
    ours, theirs = Conv2d(2, 2, (3, 2), **options), nn.Conv2d(2, 2, (3, 2), **options)
    ours.load_state_dict(theirs.state_dict())
    for x in (torch.randn(1, 2, size, 5), torch.randn(2, 5, size)):
        try:
            expected = theirs(x)
        except RuntimeError:
            with pytest.raises(ValueError, match=r"^(x has shape|padding is)"):
                ours(x)
        else:
            assert torch.equal(ours(x), expected)


def test_a_residual_of_a_convolution_that_pytorch_computes_is_checked():
    layer, x = Conv3x3(4, 6, 5, padding=2), torch.randn(1, 4, 8, 8)
    assert layer(x, torch.zeros(1, 6, 8, 8, dtype=torch.float64)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^residual has shape \(1, 6, 1, 1\); the result's is needed"):
        layer(x, torch.zeros(1, 6, 1, 1))
    with pytest.raises(TypeError, match=r"^silu_input is 1; True or False is needed"):
        layer(x, silu_input=1)


def test_integers_of_numpy_are_integers():
    x = torch.randn(1, 4, 8, 8)
    two = np.int64(2)
    assert torch.equal(GroupNormSiLU(two, 4)(x), GroupNormSiLU(2, 4)(x))
    assert torch.equal(haar_pyramid(x, two)[1], haar_pyramid(x, 2)[1])
    assert torch.equal(wavedec2(x, two)[0], wavedec2(x, 2)[0])
