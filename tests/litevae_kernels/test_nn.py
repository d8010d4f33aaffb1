import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from litevae_kernels import group_norm_silu
from litevae_kernels.nn import Conv2d, Conv3x3, GroupNormSiLU, Linear, SelfModulatedConv2d


def randomised(layer: SelfModulatedConv2d) -> SelfModulatedConv2d:
    with torch.no_grad():
        layer.scale.uniform_(-2, 2)
        layer.gain.fill_(1.7)
    return layer


def equation_3(layer: SelfModulatedConv2d) -> np.ndarray:
    """Computes w' one filter at a time, in float64."""
    w, s, gain = (p.detach().double().numpy() for p in (layer.weight, layer.scale, layer.gain))
    out = np.zeros_like(w)
    out_per_group, in_per_group = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for o in range(w.shape[0]):
        first = o // out_per_group * in_per_group
        filtered = np.stack([s[first + i] * w[o, i] for i in range(in_per_group)])
        out[o] = gain * filtered / (np.sqrt((filtered**2).sum()) + 1e-8)
    return out


def stylegan_conv2d(x, w, s, input_gain, padding):
    """Computes the modulated convolution as StyleGAN3 does: a filter bank per sample, in one grouped call."""
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


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)), (Linear(4, 8), nn.Linear(4, 8))]
)
def test_widened_layers_have_the_keys_and_the_bits_of_pytorchs(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    x = torch.randn(2, 4, 6, 4)
    assert torch.equal(ours(x), theirs(x))


def test_group_norm_silu_has_the_keys_of_group_norm():
    assert list(GroupNormSiLU(4, 8).state_dict()) == list(nn.GroupNorm(4, 8).state_dict())


def test_group_norm_silu_without_affine_parameters_or_with_others_of_its_own_dtype():
    x = torch.randn(2, 8, 5, 7)
    plain = GroupNormSiLU(4, 8, affine=False)
    assert not plain.state_dict()
    assert torch.equal(plain(x), group_norm_silu(x, 4, eps=1e-5))
    wide = GroupNormSiLU(4, 8, dtype=torch.float64)
    assert wide(x).dtype == torch.float32
    torch.testing.assert_close(wide(x), plain(x))
    half = GroupNormSiLU(4, 8, eps=0.1).bfloat16()
    assert torch.equal(half(x.bfloat16()), group_norm_silu(x.bfloat16(), 4, half.weight, half.bias, eps=0.1))


def test_group_norm_silu_on_the_meta_device():
    layer = GroupNormSiLU(4, 8, device="meta")
    y = layer(torch.empty(2, 8, 4, 4, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == (2, 8, 4, 4)


def test_group_norm_silu_of_two_inputs_is_that_of_their_concatenation():
    layer = GroupNormSiLU(3, 12)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x, skip = torch.randn(2, 8, 5, 7), torch.randn(2, 4, 5, 7)
    assert torch.equal(layer(x, skip), group_norm_silu(x, 3, layer.weight, layer.bias, eps=1e-5, skip=skip))
    torch.testing.assert_close(layer(x, skip), layer(torch.cat([x, skip], dim=1)))


def test_group_norm_silu_under_autocast_keeps_bfloat16_and_computes_in_float32():
    layer = GroupNormSiLU(4, 8)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 8, 5, 7).bfloat16()
    expected = layer(x.float()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # The result is rounded once, from a value with an error of a few units in the last place of float32.
    torch.testing.assert_close(y, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    assert torch.autograd.grad(y.sum(), layer.weight)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_silu_of_values_at_the_end_of_float16(dtype):
    """The squares and sums of such values are infinite in float16, and so are their differences."""
    layer = GroupNormSiLU(2, 8).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(2, 8, 16, 16, generator=generator) * 2 - 1) * 65504
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    exact = F.silu(F.group_norm(x.double(), 2, eps=1e-5))
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_group_norm_silu_compiles_whole_under_autocast(dynamic):
    torch._dynamo.reset()
    layer, graphs = GroupNormSiLU(4, 12), CompileCounterWithBackend("aot_eager")

    @torch.autocast("cpu", torch.bfloat16)
    def step(x, skip):
        return layer(x, skip)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=graphs)
    counts = []
    for batch in (2, 3, 5):
        x, skip = (torch.randn(batch, c, 6, 7).bfloat16().requires_grad_() for c in (8, 4))
        y, expected = compiled(x, skip), step(x, skip)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
        actual = torch.autograd.grad(y.sum(), [x, skip, layer.weight])
        for a, b in zip(actual, torch.autograd.grad(expected.sum(), [x, skip, layer.weight]), strict=True):
            assert torch.equal(a, b)
        counts.append(graphs.frame_count)
    # If dynamic, there is one graph. Dynamo may start over for it, as for nn.GroupNorm, because eps is a constant.
    # If static, there is one graph for the first batch size, and one for any batch size.
    assert counts[1] == counts[2] <= 2
    assert counts[0] == (counts[1] if dynamic else 1)


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "same"},
        {"padding": (1, 2), "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "replicate", "groups": 2, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("silu_input", [False, True])
def test_smc_folds_to_a_plain_convolution(options, silu_input):
    layer = randomised(SelfModulatedConv2d(6, 4, 3, silu_input=silu_input, **options))
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 6, 7, 8)
    expected = layer(x)
    plain = layer.eval().folded()
    assert type(plain) is nn.Conv2d
    assert list(plain.state_dict()) == (["weight", "bias"] if layer.bias is not None else ["weight"])
    assert not plain.training
    assert not plain.weight.requires_grad
    assert repr(plain) == repr(nn.Conv2d(6, 4, 3, **options))
    torch.testing.assert_close(plain(F.silu(x) if silu_input else x), expected)
    before = layer.state_dict()
    for parameter in plain.parameters():
        parameter.data.zero_()
    assert all(value.abs().sum() > 0 for value in before.values())
    assert ("silu_input=True" in repr(layer)) == silu_input


def test_smc_is_stylegans_modulated_convolution():
    layer = randomised(SelfModulatedConv2d(16, 24, 3, padding=1))
    x = torch.randn(4, 16, 8, 8)
    w, s, gain, bias = (p.detach().double() for p in (layer.weight, layer.scale, layer.gain, layer.bias))
    expected = stylegan_conv2d(x.double(), w, s.expand(4, -1), gain, padding=1) + bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x).double(), expected, atol=5e-6, rtol=5e-6)


def test_smc_is_a_conv2d_with_two_more_keys():
    layer = SelfModulatedConv2d(6, 4, 3)
    assert isinstance(layer, nn.Conv2d)  # diffusers' layerwise casting and its quantisers require it
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
    y.sum().backward()  # This gradient is not zero at the zero filter.
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
    # The result is rounded once, in addition to the roundings in float32.
    torch.testing.assert_close(weight.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert layer(torch.randn(1, 64, 4, 4, dtype=dtype)).isfinite().all()


def test_smc_gradients():
    layer = randomised(SelfModulatedConv2d(4, 6, 3, padding=1, groups=2, dtype=torch.float64))
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("silu_input", [False, True])
def test_smc_keeps_channels_last_and_compiles_whole(silu_input):
    layer = SelfModulatedConv2d(4, 8, 3, padding=1, silu_input=silu_input)
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


def test_conv3x3_takes_no_other_options():
    with pytest.raises(TypeError, match="stride"):
        Conv3x3(4, 4, stride=2)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((3, 1, 1), {"bias": False}),  # as PEFT creates its first layer
        (((1, 1), (1, 1)), {"groups": 1, "bias": False}),  # and its second
        ((3,), {}),
        ((3, 2, 1), {"padding_mode": "reflect"}),
        ((), {"kernel_size": 5, "padding": "same", "dilation": 2, "groups": 4}),
    ],
    ids=str,
)
def test_conv3x3_with_a_kernel_size_is_a_conv2d(args, options):
    torch.manual_seed(0)
    layer = Conv3x3(4, 8, *args, **options)
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 8, *args, **options)
    x = torch.randn(2, 4, 12, 11)
    y = plain(x)
    torch.testing.assert_close(layer(x), y)
    residual = torch.randn_like(y)
    torch.testing.assert_close(layer(x, residual, silu_input=True), plain(F.silu(x)) + residual)


@pytest.mark.parametrize(
    "make", [Conv3x3, lambda *c: SelfModulatedConv2d(*c, 3, padding=1)], ids=["conv", "smc"]
)
def test_silu_input_can_be_given_in_the_call(make):
    layer, x = make(4, 4), torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(layer(x, silu_input=True), layer(F.silu(x)))
    layer.silu_input = True
    torch.testing.assert_close(layer(x), layer(F.silu(x), silu_input=False))


def test_conv3x3_has_the_keys_of_conv2d():
    plain = nn.Conv2d(4, 5, 3, padding=1)
    layer = Conv3x3(4, 5)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 6, 5)
    assert torch.equal(layer(x), plain(x))
    assert repr(Conv3x3(4, 5, bias=False, silu_input=True)).endswith("bias=False, silu_input=True)")


CHANNELS = (0, -1, 1.5, "3", None, True, torch.ones(2), 2**31, 10**30)
FLAGS = (torch.ones(2), 1, "yes")
CONV = {"in_channels": 4, "out_channels": 4}
GEOMETRY = {
    **dict.fromkeys(("kernel_size", "stride", "dilation"), (0, -1, 1.5, None, (1, 2, 3), torch.ones(2), "1")),
    "padding": (-1, 1.5, None, "3", (1, 1, 1)),
    "groups": (0, 3, 1.5, None, torch.ones(2)),
    "padding_mode": ("mirror", None, 1),
}
CONSTRUCTORS = [
    *((layer, CONV | {"kernel_size": 3}, GEOMETRY) for layer in (Conv2d, Conv3x3, SelfModulatedConv2d)),
    *(
        (layer, CONV | {"kernel_size": 3}, dict.fromkeys(CONV, CHANNELS))
        for layer in (Conv2d, SelfModulatedConv2d)
    ),
    (Conv3x3, CONV, dict.fromkeys(CONV, CHANNELS)),
    (Conv3x3, CONV, {"bias": FLAGS, "silu_input": FLAGS, "dtype": (torch.int32, "half")}),
    (SelfModulatedConv2d, CONV | {"kernel_size": 3}, {"eps": (0, -1, None, "1"), "silu_input": FLAGS}),
    (
        Linear,
        {"in_features": 4, "out_features": 4},
        {"in_features": CHANNELS, "out_features": CHANNELS, "bias": FLAGS, "dtype": (torch.int32,)},
    ),
    (
        GroupNormSiLU,
        {"num_groups": 2, "num_channels": 4},
        {
            "num_groups": (*CHANNELS, 3),
            "num_channels": (*CHANNELS, 5),
            "eps": (0, -1, None, "1", torch.ones(2)),
            "affine": FLAGS,
            "dtype": (torch.int32,),
        },
    ),
]


@pytest.mark.parametrize(("layer", "arguments", "broken"), CONSTRUCTORS)
def test_a_wrong_argument_of_a_constructor_is_named_with_what_is_allowed(layer, arguments, broken):
    layer(**arguments)
    for name, values in broken.items():
        for value in values:
            with pytest.raises(
                (TypeError, ValueError), match=rf"(?=.*\b{name}\b).*(needed|allowed|divisible)"
            ) as caught:
                layer(**{**arguments, name: value})
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 200


@pytest.mark.parametrize("x", [[1], None, np.zeros((1, 4, 4, 4))], ids=lambda x: type(x).__name__)
def test_an_input_that_is_no_tensor_is_refused(x):
    for layer in (Conv2d(4, 4, 1), Linear(4, 4), Conv3x3(4, 4), Conv3x3(4, 4, 1), GroupNormSiLU(2, 4)):
        with pytest.raises(TypeError, match=f"^x is a {type(x).__name__}; a torch.Tensor is needed$"):
            layer(x)
