"""The errors that modulate_weight and self_modulated_conv2d raise."""

import pytest
import torch

from litevae_kernels import modulate_weight, self_modulated_conv2d
from litevae_kernels.nn import SelfModulatedConv2d

W, S, IMAGE = torch.ones(4, 6, 3, 3), torch.ones(6), torch.ones(2, 6, 8, 8)


def layer(padding_mode, padding):
    return SelfModulatedConv2d(6, 4, 3, padding=padding, padding_mode=padding_mode)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: modulate_weight("w", S), TypeError, "weight is a str; a torch.Tensor is needed"),
        (lambda: modulate_weight(W.int(), S), TypeError, "weight has dtype torch.int32; allowed: float32"),
        (
            lambda: modulate_weight(W.to_sparse(), S),
            TypeError,
            "weight is torch.sparse_coo; a dense (strided)",
        ),
        (lambda: modulate_weight(W, [1.0]), TypeError, "scale is a list; a torch.Tensor is needed"),
        (lambda: modulate_weight(W, S.long()), TypeError, "scale has dtype torch.int64; allowed: float32"),
        (lambda: modulate_weight(W, S, 1.0), TypeError, "gain is a float; a torch.Tensor is needed"),
        (
            lambda: modulate_weight(W, S, torch.tensor([True])),
            TypeError,
            "gain has dtype torch.bool; allowed",
        ),
        (
            lambda: modulate_weight(W[0], S),
            ValueError,
            "weight has shape (6, 3, 3); 4 dimensions of at least 1",
        ),
        (lambda: modulate_weight(W[:0], S), ValueError, "weight has shape (0, 6, 3, 3); 4 dimensions"),
        (lambda: modulate_weight(W[:, :0], S), ValueError, "weight has shape (4, 0, 3, 3); 4 dimensions"),
        (
            lambda: modulate_weight(W, S[:5]),
            ValueError,
            "scale has shape (5,); (6,) is needed for a weight of (4, 6, 3, 3), or a multiple of it whose factor, "
            "the groups, divides 4",
        ),
        (lambda: modulate_weight(W, S.repeat(3)), ValueError, "scale has shape (18,); (6,) is needed"),
        (lambda: modulate_weight(W, S[:0]), ValueError, "scale has shape (0,); (6,) is needed"),
        (lambda: modulate_weight(W, S[None]), ValueError, "scale has shape (1, 6); (6,) is needed"),
        (lambda: modulate_weight(W, S, torch.ones(())), ValueError, "gain has shape (); (1,) is needed"),
        (lambda: modulate_weight(W, S, S), ValueError, "gain has shape (6,); (1,) is needed"),
        (lambda: modulate_weight(W, S, eps=0.0), ValueError, "eps is 0.0; a positive number is needed"),
        (lambda: modulate_weight(W, S, eps=float("nan")), ValueError, "eps is nan; a positive number"),
        (
            lambda: modulate_weight(W, S.to("meta")),
            ValueError,
            "scale is on meta; allowed: the weight's device, cpu",
        ),
        (
            lambda: modulate_weight(W, S, torch.ones(1, device="meta")),
            ValueError,
            "gain is on meta; allowed: the weight's device, cpu",
        ),
        (lambda: modulate_weight(W, S, dtype=torch.int8), TypeError, "dtype is torch.int8; allowed: float32"),
        (
            lambda: modulate_weight(W, S, memory_format=torch.channels_last_3d),
            ValueError,
            "memory_format is torch.channels_last_3d; allowed: torch.contiguous_format, torch.channels_last",
        ),
        (lambda: self_modulated_conv2d(None, W, S), TypeError, "x is a NoneType; a torch.Tensor is needed"),
        (lambda: self_modulated_conv2d(IMAGE.long(), W, S), TypeError, "x has dtype torch.int64; allowed"),
        (lambda: self_modulated_conv2d(IMAGE, W, None), TypeError, "scale is a NoneType; a torch.Tensor"),
        (lambda: self_modulated_conv2d(IMAGE, None, S), TypeError, "weight is a NoneType; a torch.Tensor"),
        (
            lambda: self_modulated_conv2d(IMAGE, W[0], S),
            ValueError,
            "weight has shape (6, 3, 3); 4 dimensions",
        ),
        (lambda: self_modulated_conv2d(IMAGE[0], W, S), ValueError, "x has 3 dimensions; 4 are needed"),
        (
            lambda: self_modulated_conv2d(IMAGE[:, :5], W, S),
            ValueError,
            "scale has shape (6,); x's channels are needed: (5,)",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S[:5]),
            ValueError,
            "scale has shape (5,); x's channels are",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, groups=2),
            ValueError,
            "groups is 2; with a weight of (4, 6, 3, 3) it does not give x's 6 channels",
        ),
        (lambda: self_modulated_conv2d(IMAGE, W, S, groups=0), ValueError, "groups is 0; with a weight of"),
        (lambda: self_modulated_conv2d(IMAGE, W, S, eps=-1.0), ValueError, "eps is -1.0; a positive number"),
        (
            lambda: self_modulated_conv2d(IMAGE, torch.ones(4, 2, 3, 3), S, groups=3),
            ValueError,
            "scale has shape (6,); (2,) is needed for a weight of (4, 2, 3, 3)",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, stride=0),
            ValueError,
            "stride is 0; an integer of at least 1 is needed, or two: (height, width)",
        ),
        (lambda: self_modulated_conv2d(IMAGE, W, S, stride=torch.ones(2)), TypeError, "stride is a Tensor"),
        (lambda: self_modulated_conv2d(IMAGE, W, S, stride=(1, 2, 1)), TypeError, "stride is (1, 2, 1); an"),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, dilation=2**40),
            ValueError,
            "dilation is 1099511627776; an",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, dilation=(True, 1)),
            TypeError,
            "dilation is (True, 1); an",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, padding=-1),
            ValueError,
            "padding is -1; an integer of at",
        ),
        (lambda: self_modulated_conv2d(IMAGE, W, S, padding=1.0), TypeError, "padding is 1.0; an integer"),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, padding="full"),
            ValueError,
            "padding is 'full'; allowed:",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, padding="same", stride=2),
            ValueError,
            "padding is 'same' with a stride of (2, 2); it needs a stride of 1",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, dilation=4),
            ValueError,
            "x has shape (2, 6, 8, 8); with a padding of (0, 0) and a dilation of (4, 4), it is smaller than the "
            "kernel of 3x3",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE[:, :, :0], W, S, padding=3),
            ValueError,
            "x has shape (2, 6, 0, 8)",
        ),
        (lambda: self_modulated_conv2d(IMAGE, W, S, groups="1"), TypeError, "groups is '1'; an integer"),
        (lambda: self_modulated_conv2d(IMAGE, W, S, silu_input=1), TypeError, "silu_input is 1; True or"),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, bias=S),
            ValueError,
            "bias has shape (6,); (4,) is needed",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, bias=S[:4].to("meta")),
            ValueError,
            "bias is on meta; allowed: x's device, cpu",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE.to("meta"), W, S),
            ValueError,
            "weight is on cpu; allowed: x's device, meta",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, padding=1, residual=IMAGE[:, :4].to("meta")),
            ValueError,
            "residual is on meta; allowed: x's device, cpu",
        ),
        (lambda: modulate_weight(W, S, eps=torch.ones(2)), TypeError, "eps is a Tensor; a positive number"),
        (
            lambda: layer("reflect", 8)(IMAGE),
            ValueError,
            "padding is (8, 8); padding_mode 'reflect' allows at most 7",
        ),
        (lambda: layer("circular", 9)(IMAGE), ValueError, "padding_mode 'circular' allows at most 8"),
        (
            lambda: layer("replicate", 1)(IMAGE[..., :0]),
            ValueError,
            "x has shape (2, 6, 8, 0); with a padding of (1, 1)",
        ),
        (lambda: layer("reflect", 1)(IMAGE.int()), TypeError, "x has dtype torch.int32; allowed"),
        (
            lambda: layer("reflect", 1)(IMAGE[:, :0]),
            ValueError,
            "x has shape (2, 0, 8, 8); 6 channels are needed, as in the weight",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [("reflect", 7), ("circular", 8), ("replicate", 20)])
def test_the_largest_padding_is_allowed(limit):
    assert layer(*limit)(IMAGE).shape == (2, 4, *[8 + 2 * limit[1] - 2] * 2)


@pytest.mark.parametrize("stride", [1, [1], (1,), [1, 1], (1, 1)])
def test_integers_and_sequences_mean_the_same(stride):
    expected = self_modulated_conv2d(IMAGE, W, S, padding=1)
    assert torch.equal(
        self_modulated_conv2d(IMAGE, W, S, stride=stride, padding=stride, dilation=stride), expected
    )
