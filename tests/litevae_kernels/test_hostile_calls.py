"""Generated hostile calls of every operator: each agrees with the reference backend, or is refused in one line."""

import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import litevae_kernels as kernels
from litevae_kernels import use_backend
from litevae_kernels.conv3x3.normed import norm_silu_conv3x3
from litevae_kernels.nn import Conv2d, Conv3x3, GroupNormSiLU, Linear, SelfModulatedConv2d

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = dict(zip(DTYPES, (1e-9, 1e-4, 1e-2, 6e-2), strict=True))


class Subclass(Tensor):
    pass


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def waverec2(cA, cH, cV, cD, axes=(-2, -1), output_size=None):
    return kernels.waverec2([cA, (cH, cV, cD)], axes=axes, output_size=output_size)


def module(layer, call, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer(**call)


def norm_module(input, skip, num_groups, eps):
    return module(GroupNormSiLU(2, 8), {"input": input, "skip": skip}, num_groups=num_groups, eps=eps)


def smc_module(input, eps, silu_input):
    torch.manual_seed(0)
    layer = SelfModulatedConv2d(4, 6, 5, padding=3, padding_mode="reflect")
    return module(layer, {"input": input}, eps=eps, silu_input=silu_input)


def conv_module(input, residual):
    torch.manual_seed(0)
    return Conv3x3(4, 6)(input, residual)


def other_conv_module(input, residual, silu_input, padding_mode):
    """A convolution that PyTorch computes."""
    torch.manual_seed(0)
    layer = Conv3x3(4, 6, 5, padding=2, padding_mode=padding_mode)
    return layer(input, residual, silu_input=silu_input)


def plain_conv_module(input, padding, groups):
    torch.manual_seed(0)
    return Conv2d(4, 6, 3, padding=padding, groups=groups)(input)


def linear_module(input, in_features):
    torch.manual_seed(0)
    return Linear(in_features, 6)(input)


def in_place_norm(x, weight, bias, overwrite):
    """A call that may overwrite a copy of its input."""
    with torch.no_grad():
        copy = x.clone() if isinstance(x, Tensor) else x
        return kernels.group_norm_silu(copy, 2, weight, bias, overwrite=overwrite)


def fused_norm(x, num_groups, norm_weight, weight, bias, skip, residual):
    with torch.no_grad():
        return norm_silu_conv3x3(x, num_groups, norm_weight, None, weight, bias, skip=skip, residual=residual)


def wide_conv(x, weight, bias, silu_input):
    """A call that the compiled kernel serves, where the CPU has its instructions."""
    return kernels.conv3x3(x, weight, bias, silu_input=silu_input)


# A call that is served, and its arguments; each generated call changes one or two of them.
x, weight, scale = values(2, 4, 6, 8), values(6, 4, 3, 3, seed=1), values(4, seed=2)
wide = values(2, 32, 12, 12).bfloat16().contiguous(memory_format=torch.channels_last)
residual = values(2, 6, 6, 8, seed=3)
band = values(2, 4, 5, 3)
modulation = {"weight": weight, "scale": scale, "gain": values(1), "eps": 1e-8}
storage = {"dtype": None, "memory_format": None}
geometry = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
CALLS = {
    kernels.haar_dwt2d: {"image": x, "mode": "symmetric"},
    kernels.haar_idwt2d: {"coeffs": x, "output_size": None},
    kernels.haar_pyramid: {"image": x, "levels": 2, "mode": "symmetric", **storage},
    kernels.wavedec2: {"image": x, "level": 2, "mode": "symmetric", "axes": (-2, -1)},
    waverec2: {
        "cA": band,
        "cH": band + 1,
        "cV": band + 2,
        "cD": band + 3,
        "axes": (1, 2),
        "output_size": None,
    },
    kernels.group_norm_silu: {
        "x": x,
        "num_groups": 2,
        "weight": values(8),
        "bias": values(8),
        "eps": 1e-6,
        "skip": x + 1,
    },
    kernels.modulate_weight: modulation | storage,
    kernels.self_modulated_conv2d: {"x": x, **modulation, "bias": values(6), **geometry, "silu_input": True},
    kernels.conv3x3: {"x": x, "weight": weight, "bias": values(6), "residual": residual, "silu_input": False},
    wide_conv: {"x": wide, "weight": values(32, 32, 3, 3).bfloat16(), "bias": None, "silu_input": True},
    norm_module: {"input": x, "skip": x + 1, "num_groups": 2, "eps": 1e-6},
    smc_module: {"input": x, "eps": 1e-8, "silu_input": False},
    conv_module: {"input": x, "residual": residual},
    other_conv_module: {"input": x, "residual": residual, "silu_input": None, "padding_mode": "reflect"},
    plain_conv_module: {"input": x, "padding": 1, "groups": 2},
    linear_module: {"input": x, "in_features": 8},
    in_place_norm: {"x": x, "weight": values(4), "bias": values(4), "overwrite": True},
    fused_norm: {
        "x": x,
        "num_groups": 2,
        "norm_weight": values(8),
        "weight": values(6, 8, 3, 3),
        "bias": values(6),
        "skip": x + 1,
        "residual": residual,
    },
}
# Calls with weights in float32, and calls without gradients.
WITHOUT = (conv_module, other_conv_module, plain_conv_module, linear_module, in_place_norm, fused_norm)
NAMES = {name for arguments in CALLS.values() for name in arguments} | {"groups", "details"}

VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        17,
        2**31,
        2**63,
        10**30,
        -(10**30),
        10**5000,
        1.0,
        0.0,
        1e-60,
        1e300,
        1j,
    ),
    *(float("nan"), float("inf"), "", "x", "same", "sym", "periodization", "a\nb" * 300, b"x", object(), int),
    *(
        [],
        (),
        [1, 2],
        (1, 1),
        (1, 2, 3),
        (-1, 1),
        (1.0, 1),
        (True, 1),
        (10**20, 1),
        [[1, 2]],
        {},
        [torch.ones(2)],
    ),
    *(torch.float64, torch.int8, torch.channels_last, torch.preserve_format, torch.device("cpu"), nn.ReLU()),
    *(
        np.float32(1),
        np.int64(2),
        np.ones(2),
        torch.tensor(1),
        torch.ones(()),
        torch.ones(2),
        torch.ones(40, 40),
    ),
)
TENSORS = (
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in (*DTYPES, torch.int32, torch.bool, torch.complex64)),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: torch.nested.nested_tensor([t]),
    lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    lambda t: t.float().to_mkldnn(),
    lambda t: t[None],
    lambda t: t[0],
    lambda t: t[:0],
    lambda t: t[..., :0],
    lambda t: t[..., :-1],
    lambda t: torch.cat([t, t]),
    lambda t: t.transpose(0, -1),
    lambda t: t.transpose(-2, -1) if t.ndim > 1 else t,
    lambda t: t[..., :1].expand(t.shape),
    lambda t: torch.linspace(-1, 1, t.numel() + 9).as_strided(t.shape, [1] * t.ndim),
    lambda t: t.as_subclass(Subclass),
    lambda t: torch.complex(t.float(), t.float()).conj().imag,  # a float tensor whose negation is pending
    lambda t: t.reshape((1,) * 60 + t.shape),
    lambda t: t[..., 0],
)


def changed(arguments, rng):
    """Returns the arguments of a hostile call."""
    arguments = dict(arguments)
    for name in rng.sample(list(arguments), rng.choice([1, 1, 2])):
        value = arguments[name]
        tensor = isinstance(value, Tensor) and rng.random() < 0.75
        arguments[name] = rng.choice(TENSORS)(value) if tensor else rng.choice(VALUES)
    if rng.random() < 0.4:
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.dtype in DTYPES and value.layout is torch.strided:
                arguments[name] = value.detach().requires_grad_()
    return arguments


def tensors(nested):
    """Returns the tensors of a result, which is a tensor or a nested tuple of them."""
    return [nested] if isinstance(nested, Tensor) else [t for part in nested for t in tensors(part)]


def outcome(function, arguments):
    """Returns the results and the gradients of a call, or the error that refuses it."""
    try:
        results = tensors(function(**arguments))
    except (TypeError, ValueError, RuntimeError) as error:
        return error
    inputs = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    outputs = [t for t in results if t.requires_grad]
    if not inputs or not outputs:
        return results
    grads = [torch.ones_like(t) for t in outputs]
    return results + list(
        torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)
    )


def assert_same(actual, expected, tolerance):
    assert type(actual) is type(expected)
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    if actual.device.type != "meta" and actual.numel():
        a, b = (t.detach().as_subclass(Tensor).double() for t in (actual, expected))
        size = b.abs().nan_to_num().max().item()
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(size, 1.0), equal_nan=True)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns about nested and quantised tensors.
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_hostile_calls(function):
    rng = random.Random(function.__name__)
    agreed = refused = 0
    for _ in range(250):
        arguments = changed(CALLS[function], rng)
        actual = outcome(function, arguments)
        with use_backend("reference"):
            expected = outcome(function, arguments)
        assert isinstance(actual, Exception) == isinstance(expected, Exception), (actual, expected)
        if isinstance(actual, Exception):
            said = str(actual)
            assert (type(expected), str(expected)) == (type(actual), said)
            assert "\n" not in said, said
            assert len(said) <= 300, said
            assert any(re.search(rf"\b{name}\b", said) for name in NAMES), said
            refused += 1
            continue
        dtypes = {t.dtype for t in (*arguments.values(), *actual) if isinstance(t, Tensor)}
        tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b, tolerance)
        agreed += 1
    assert min(agreed, refused) >= 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [f for f in CALLS if f not in WITHOUT], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_of_an_empty_batch(backend, function, dtype):
    arguments = dict(CALLS[function])
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            batched = value.ndim == 4 and name != "weight"
            arguments[name] = value.to(dtype)[: 0 if batched else None].requires_grad_()
    inputs = [t for t in arguments.values() if isinstance(t, Tensor)]
    with use_backend(backend):
        results = tensors(function(**arguments))
    assert all(t.requires_grad and t.dtype == dtype for t in results)
    for gradient, t in zip(torch.autograd.grad([t.sum() for t in results], inputs), inputs, strict=True):
        assert (gradient.shape, gradient.dtype) == (t.shape, dtype)
        assert function is kernels.modulate_weight or not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_without_channels(backend, dtype):
    empty = torch.zeros(2, 4, 6, 8, dtype=dtype, requires_grad=True)[:, :0]
    with use_backend(backend):
        for function in (kernels.haar_dwt2d, kernels.haar_idwt2d, kernels.haar_pyramid, kernels.wavedec2):
            for result in tensors(function(empty)):
                (gradient,) = torch.autograd.grad(result.sum(), empty, create_graph=True)
                assert (gradient.shape, gradient.dtype) == (empty.shape, dtype)


@pytest.mark.parametrize("layer", [Conv2d(4, 4, 1), Linear(4, 4), Conv3x3(4, 4), Conv3x3(4, 4, 1)], ids=repr)
def test_an_input_of_another_dtype_or_device_is_refused_alike_by_every_layer(layer):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(TypeError, match=f"^weight has dtype torch.float32; .* x's is needed, {dtype}$"):
            layer(torch.zeros(1, 4, 4, 4, dtype=dtype))
    with pytest.raises(TypeError, match=r"^x has dtype torch.int64; allowed: float32"):
        layer(torch.zeros(1, 4, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^weight is on cpu; allowed: x's device, meta$"):
        layer(torch.zeros(1, 4, 4, 4, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.zeros(1, 4, 4, 4)).dtype == torch.bfloat16
        assert layer(torch.zeros(1, 4, 4, 4, dtype=torch.float16)).dtype == torch.bfloat16
