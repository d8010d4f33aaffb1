import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litevae_kernels.nn import GroupNormSiLU, SelfModulatedConv2d


def randomised(layer: SelfModulatedConv2d) -> SelfModulatedConv2d:
    with torch.no_grad():
        layer.scale.uniform_(-2, 2)
        layer.gain.fill_(1.7)
    return layer


def equation_3(layer: SelfModulatedConv2d) -> np.ndarray:
    """w' one element at a time, in float64."""
    w, s, gain = (p.detach().double().numpy() for p in (layer.weight, layer.scale, layer.gain))
    out = np.zeros_like(w)
    out_per_group, in_per_group = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for o in range(w.shape[0]):
        first = o // out_per_group * in_per_group
        filtered = np.stack([s[first + i] * w[o, i] for i in range(in_per_group)])
        out[o] = gain * filtered / (np.sqrt((filtered**2).sum()) + 1e-8)
    return out


def stylegan_conv2d(x, w, s, input_gain, padding):
    """Modulated convolution the way StyleGAN3 does it: a filter bank per sample, in one grouped call."""
    n, c_in, height, width = x.shape
    w = w * w.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
    s = s * s.square().mean().rsqrt()
    bank = w[None] * s[:, None, :, None, None]
    bank = bank * (bank.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt() * input_gain
    y = F.conv2d(
        x.reshape(1, n * c_in, height, width), bank.reshape(-1, *w.shape[1:]), padding=padding, groups=n
    )
    return y.reshape(n, -1, *y.shape[2:])


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (3, 8, 9), (2, 8)])
def test_group_norm_silu_is_silu_of_group_norm(shape):
    layer = GroupNormSiLU(4, 8, eps=1e-6)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(shape)
    y = F.group_norm(x.double(), 4, layer.weight.double(), layer.bias.double(), 1e-6)
    torch.testing.assert_close(layer(x).double(), y * torch.sigmoid(y), atol=1e-5, rtol=1e-5)


def test_group_norm_silu_has_the_keys_of_group_norm():
    assert list(GroupNormSiLU(4, 8).state_dict()) == list(nn.GroupNorm(4, 8).state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "bias": False},
        {"padding": 2, "dilation": 2},
        {"padding": "same", "padding_mode": "reflect"},
        {"groups": 3, "padding": (1, 0)},
        {"groups": 6, "stride": (2, 1)},
    ],
    ids=str,
)
def test_smc_is_a_convolution_with_the_weights_of_equation_3(options):
    layer = randomised(SelfModulatedConv2d(6, 12, 3, dtype=torch.float64, **options))
    plain = nn.Conv2d(6, 12, 3, dtype=torch.float64, **options)
    plain.load_state_dict(
        {"weight": torch.from_numpy(equation_3(layer))}
        | ({"bias": layer.bias.detach()} if layer.bias is not None else {})
    )
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=1e-12)


def test_smc_is_stylegans_modulated_convolution():
    layer = randomised(SelfModulatedConv2d(16, 24, 3, padding=1))
    x = torch.randn(4, 16, 8, 8)
    w, s, gain, bias = (p.detach().double() for p in (layer.weight, layer.scale, layer.gain, layer.bias))
    expected = stylegan_conv2d(x.double(), w, s.expand(4, -1), gain, padding=1) + bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x).double(), expected, atol=5e-6, rtol=5e-6)


def test_smc_is_a_conv2d_with_two_more_keys():
    layer = SelfModulatedConv2d(6, 4, 3)
    assert isinstance(layer, nn.Conv2d)  # diffusers' layerwise casting and quantisers look for it
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"weight": (4, 6, 3, 3), "bias": (4,), "scale": (6,), "gain": (1,)}
    assert (layer.scale == 1).all()
    assert (layer.gain == 1).all()


@pytest.mark.parametrize("zero", ["filter", "scale"])
def test_smc_of_zero_filters_is_zero_with_finite_gradients(zero):
    layer = SelfModulatedConv2d(3, 4, 3, bias=False)
    with torch.no_grad():
        if zero == "filter":
            layer.weight[1] = 0
        else:
            layer.scale.zero_()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    y = layer(x)
    assert (y[:, 1] == 0).all()
    assert (y[:, 0] == 0).all() == (zero == "scale")
    y.square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.isfinite().all()
    y = layer(x)
    y.sum().backward()  # a gradient that is not itself zero at the zero filter
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smc_normalises_half_precision_weights_in_float32(dtype):
    layer = randomised(SelfModulatedConv2d(64, 8, 3, padding=1))
    with torch.no_grad():
        layer.weight.normal_().mul_(1e-4)  # 1e-8 is 0 in float16
    layer = layer.to(dtype)
    weight = layer.modulated_weight()
    assert weight.dtype == dtype
    expected = torch.from_numpy(equation_3(layer))
    # one rounding, of the result, plus float32's
    torch.testing.assert_close(weight.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert layer(torch.randn(1, 64, 4, 4, dtype=dtype)).isfinite().all()


def test_smc_gradients():
    layer = randomised(SelfModulatedConv2d(4, 6, 3, padding=1, groups=2, dtype=torch.float64))
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_smc_keeps_channels_last_and_compiles_whole():
    layer = SelfModulatedConv2d(4, 8, 3, padding=1)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_smc_under_autocast_normalises_in_float32():
    layer = SelfModulatedConv2d(8, 8, 3)
    expected = layer.modulated_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 8, 6, 6)).dtype == torch.bfloat16
        assert torch.equal(layer.modulated_weight(), expected)


def test_smc_reset_parameters_makes_a_fresh_layer():
    conv = SelfModulatedConv2d(3, 4, 3, device="meta").to_empty(device="cpu")
    conv.reset_parameters()
    assert torch.equal(conv.scale, torch.ones(3))
    assert torch.equal(conv.gain, torch.ones(1))
    assert conv.weight.isfinite().all()
    assert "eps=1e-08" in repr(conv)
