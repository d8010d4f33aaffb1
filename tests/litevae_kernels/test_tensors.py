import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from litevae_kernels import conv3x3, group_norm_silu, haar_dwt2d, haar_idwt2d, modulate_weight, use_backend
from litevae_kernels.backend import core
from litevae_kernels.tensors import (
    DTYPES,
    accumulate_dtype,
    check_bias,
    check_device,
    check_dtype,
    check_eps,
    check_flag,
    check_memory_format,
    check_operand,
    check_residual,
    check_tensor,
    differentiable_gradients,
    is_channels_last,
    is_integer,
    memory_format_of,
    native_view,
    scratch_memory,
    shape_of,
    shown,
    to_format,
)


def test_check_tensor():
    for dtype in DTYPES:
        check_tensor(torch.zeros(2, dtype=dtype), "x")
        check_tensor(torch.zeros(0, 3, dtype=dtype), "x")
    with pytest.raises(TypeError, match=r"^x is a int; a torch\.Tensor is needed$"):
        check_tensor(1, "x")
    allowed = "allowed: float32, float64, float16, bfloat16"
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"^x has dtype {dtype}; {allowed}$"):
            check_tensor(torch.zeros(2, dtype=dtype), "x")
    with pytest.raises(TypeError, match=r"^x is torch\.sparse_coo; a dense \(strided\) tensor is needed$"):
        check_tensor(torch.eye(2).to_sparse(), "x")


def test_check_dtype():
    check_dtype(torch.bfloat16, "dtype is")
    for dtype, text in (("float32", "'float32'"), ([torch.float32], r"\[torch\.float32\]")):
        with pytest.raises(TypeError, match=f"^dtype is {text}; allowed: float32, "):
            check_dtype(dtype, "dtype is")


def test_check_memory_format():
    for memory_format in (None, torch.contiguous_format, torch.channels_last):
        check_memory_format(memory_format)
    for memory_format in (torch.preserve_format, "channels_last", torch.ones(2), np.ones(2)):
        with pytest.raises(ValueError, match=r"; allowed: torch\.contiguous_format, torch\.channels_last$"):
            check_memory_format(memory_format)


LONG = [
    1,
    -(10**5000),
    "a\nb" * 1000,
    torch.ones(50, 50),
    [torch.ones(9, 9)] * 99,
    np.ones((40, 40)),
    object(),
]


@pytest.mark.parametrize("value", LONG, ids=lambda value: type(value).__name__)
def test_values_are_shown_in_one_short_line(value):
    text = shown(value)
    assert text
    assert "\n" not in text
    assert len(text) <= 100


def test_values_are_shown_as_they_are_written():
    assert [shown(x) for x in (1.5, "a", (1, 2), torch.int8, torch.ones(2))] == [
        *("1.5", "'a'", "(1, 2)", "torch.int8", "a Tensor")
    ]
    assert shape_of(torch.ones(2, 3)) == "(2, 3)"
    assert len(shape_of(torch.ones((1,) * 500))) <= 100


def test_is_integer():
    assert all(is_integer(x) for x in (0, -3, 10**30, np.int64(2)))
    assert not any(
        is_integer(x) for x in (True, 1.0, "1", None, np.float32(1), np.bool_(True), torch.tensor(1))
    )


def test_check_device():
    x, other = torch.ones(2), torch.ones(2, device="meta")
    check_device(x, "weight", x, "x")
    with pytest.raises(ValueError, match=r"^weight is on meta; allowed: x's device, cpu$"):
        check_device(other, "weight", x, "x")


def test_check_operand():
    x, half, double = torch.ones(2), torch.ones(2).half(), torch.ones(2).double()
    check_operand(x, "weight", x)
    for other in (half, double):
        with pytest.raises(
            TypeError, match=rf"^weight has dtype {other.dtype}; .* x's is needed, torch\.float32$"
        ):
            check_operand(other, "weight", x)
    with pytest.raises(ValueError, match=r"^weight is on meta; allowed: x's device, cpu$"):
        check_operand(x.to("meta"), "weight", x)
    with torch.autocast("cpu", torch.bfloat16):
        check_operand(half, "weight", x)
        for pair in ((double, x), (x, double)):
            with pytest.raises(TypeError, match="weight has dtype"):
                check_operand(pair[0], "weight", pair[1])


def test_check_bias_and_residual():
    x = torch.ones(1, 2, 3, 3)
    check_bias(torch.ones(4), 4, x)
    check_residual(x, (1, 2, 3, 3), x)
    for check, name, shape in ((check_bias, "bias", 4), (check_residual, "residual", (4,))):
        for bad, error, message in (
            (None, TypeError, "is a NoneType"),
            (torch.ones(5), ValueError, "has shape"),
            (torch.ones(4, device="meta"), ValueError, "is on meta; allowed: x's device, cpu"),
        ):
            with pytest.raises(error, match=f"^{name} {message}"):
                check(bad, shape, x)


def test_check_flag():
    check_flag(True, "silu_input")
    for value in (1, None, torch.ones(2), np.bool_(True), "yes"):
        with pytest.raises(TypeError, match=r"^silu_input is .*; True or False is needed$"):
            check_flag(value, "silu_input")


def test_check_eps():
    for value in (1e-6, 1, np.float32(1e-3), 1e-60, 10**30):
        eps = check_eps(value)
        assert type(eps) is float
        assert eps == float(value)
    for value in (True, "1", None, 1j, torch.tensor(1e-6), torch.ones(2), np.ones(2)):
        with pytest.raises(TypeError, match=r"^eps is .*; a positive number is needed$"):
            check_eps(value)
    for value in (0, -1.0, float("nan"), float("inf"), 1e300, 10**5000):
        with pytest.raises(ValueError, match=r"^eps is .*; a positive number is needed, at most 3\.4e\+38$"):
            check_eps(value)


X, W, G = torch.randn(3, 1, 4, 4, 4), torch.randn(3, 6, 4, 3, 3), torch.ones(4)
TRANSFORMED = {
    "haar_dwt2d": (haar_dwt2d, X),
    "haar_idwt2d": (haar_idwt2d, X),
    "group_norm_silu": (lambda x: group_norm_silu(x, 2), X),
    "modulate_weight": (lambda w: modulate_weight(w, G), W),
    "conv3x3": (lambda x: conv3x3(x, W[0]), X),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_the_reference_has_all_transforms(name):
    function, batch = TRANSFORMED[name]
    one = batch[0]
    gradient = torch.func.grad(lambda t: function(t).square().sum())
    transforms = (
        lambda: torch.func.vmap(function)(batch),
        lambda: torch.func.vmap(gradient)(batch),
        lambda: torch.func.jvp(function, (one,), (torch.ones_like(one),))[1],
    )
    with use_backend("reference"):
        each, gradients, tangent = (transform() for transform in transforms)
    torch.testing.assert_close(each, torch.stack([function(t) for t in batch]), rtol=1e-4, atol=1e-4)
    leaf = one.clone().requires_grad_()
    expected = torch.autograd.grad(function(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(gradients[0], expected, rtol=1e-3, atol=1e-3)
    step = 1e-2
    difference = (function(one + step) - function(one - step)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_tangent_is_never_lost(name):
    function, batch = TRANSFORMED[name]
    with forward_ad.dual_level(), use_backend("native"):
        plain = function(batch[0])  # Without a tangent, the kernels serve the call.
        dual = forward_ad.make_dual(batch[0], torch.ones_like(batch[0]))
        with pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'):
            function(dual)
    assert torch.equal(plain, function(batch[0]))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 3, 1, 5), (2, 3, 4, 1), (2, 3, 1, 1)])
def test_is_channels_last(shape):
    x = torch.zeros(shape)
    assert not is_channels_last(x)
    last = x.to(memory_format=torch.channels_last)
    if shape[2:] != (1, 1):  # otherwise both kinds of strides are possible
        assert is_channels_last(last)
        assert is_channels_last(last[:, :2])
    assert not is_channels_last(last[:, :1])
    assert not is_channels_last(x.transpose(2, 3))


def test_a_single_channel_is_contiguous():
    assert not is_channels_last(torch.zeros(2, 1, 4, 5).to(memory_format=torch.channels_last))
    # Overlapping pixels and channels have neither format.
    assert not is_channels_last(torch.zeros(40).as_strided((2, 3, 4, 5), (10, 1, 5, 1)))


def test_formats_and_arithmetic():
    assert memory_format_of(True) is torch.channels_last
    assert memory_format_of(False) is torch.contiguous_format
    assert accumulate_dtype(torch.float16, torch.bfloat16) is torch.float32
    assert accumulate_dtype(torch.float16, torch.float64) is torch.float64


def test_to_format():
    x = torch.randn(2, 3, 4, 5)
    assert to_format(x, torch.float32, False) is x
    last = to_format(x, torch.float32, True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert to_format(last, torch.float32, True) is last
    narrow = to_format(last, torch.bfloat16, False)
    assert narrow.is_contiguous()
    assert torch.equal(narrow, x.bfloat16())


def test_native_view():
    assert native_view(None) is None
    for x in (torch.zeros(2, 3, 4, 5)[:, ::2], torch.zeros(7)[::3].double()):
        assert native_view(x) == (x.data_ptr(), DTYPES[x.dtype], x.shape, x.stride())


@pytest.mark.parametrize(
    ("view", "error", "message"),
    [
        ((0, 0, (1, 4, 1), (4, 1, 1)), ValueError, "a tensor must have 4 dimensions, or 1"),
        ((0, 0, (1, 4, 1, 1), (4, 1, 1)), ValueError, "a tensor must have 4 dimensions, or 1"),
        ((0, 4, (4,), (1,)), ValueError, "unknown dtype code 4"),
        ((0, 0, (2**63,), (1,)), OverflowError, "too "),
        ((0, 0, (4.0,), (1,)), TypeError, "integer"),
        ((0, 0, [4], (1,)), TypeError, "incompatible function arguments"),
        ((0, 0, (4,)), TypeError, "incompatible function arguments"),
    ],
)
def test_the_core_refuses_what_is_no_view(view, error, message):
    x = native_view(torch.zeros(1, 4, 1, 1))
    with pytest.raises(error, match=message):
        core.group_norm_silu_cpu(x, None, view, None, None, x, torch.zeros(8).data_ptr(), 1, 1e-6, 1)


def test_scratch_memory_is_counted_in_bytes():
    scratch = scratch_memory(24, torch.device("cpu"))
    assert scratch.nbytes == 24
    assert scratch_memory(0, torch.device("cpu")).nbytes == 0


def test_differentiable_gradients():
    a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    first, none, second = differentiable_gradients(
        lambda a, _, b: a * b.square(), (a, None, b), (True, False, True), torch.ones(3, dtype=torch.float64)
    )
    assert none is None
    torch.testing.assert_close(first, b.square())
    torch.testing.assert_close(torch.autograd.grad(second.sum(), (a, b)), (2 * b, 2 * a))
