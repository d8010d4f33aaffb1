"""Tests the core's kernels with numbers for which every rounding but that of the result is exact.

Values of x and the gradient are whole numbers below 8, and taps are multiples of 4 below 8: sums of four values, and
quarters of sums of nine taps, fit into the 8 bits of bfloat16.
"""

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels.conv3x3 import native


def whole_numbers(*shape, factor=1, largest=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (factor * torch.randint(-largest, largest + 1, shape, generator=generator)).to(torch.bfloat16)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def nan(*shape):
    return channels_last(torch.full(shape, float("nan"), dtype=torch.bfloat16))


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("inputs", [5, 32, 40])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (6, 9), (7, 130)])
def test_forward_is_exact_for_whole_numbers(height, width, inputs, dtype):
    x = channels_last(whole_numbers(2, inputs, height, width))
    weight = whole_numbers(50, inputs, 3, 3, factor=4, largest=1, seed=1).to(dtype)
    bias, residual = whole_numbers(50, seed=2), channels_last(whole_numbers(2, 50, height, width, seed=3))
    y = nan(2, 50, height, width)
    native.forward(x, weight, bias, residual, False, y)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    assert torch.equal(y, expected.bfloat16())


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_input_gradient_is_exact_for_whole_numbers(memory_format):
    grad = channels_last(whole_numbers(2, 50, 9, 7))
    weight = whole_numbers(50, 40, 3, 3, factor=4, largest=1, seed=1).contiguous(memory_format=memory_format)
    grad_x = nan(2, 40, 9, 7)
    native.input_gradient(grad, weight, grad_x)
    expected = F.conv_transpose2d(grad.double(), weight.double(), padding=1)
    assert torch.equal(grad_x, expected.bfloat16())


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weight_gradient_is_exact_for_whole_numbers(memory_format):
    x, grad = channels_last(whole_numbers(2, 40, 9, 7)), channels_last(whole_numbers(2, 50, 9, 7, seed=1))
    grad_weight = torch.full((50, 40, 3, 3), float("nan")).contiguous(memory_format=memory_format)
    native.weight_gradient(x, grad, grad_weight)
    expected = torch.nn.grad.conv2d_weight(x.double(), (50, 40, 3, 3), grad.double(), padding=1)
    assert torch.equal(grad_weight, expected.float())


@pytest.mark.parametrize(
    ("weight", "bias", "y", "message"),
    [
        ((8, 5, 3, 3), 8, (1, 8, 4, 4), "weight does not fit the other tensors"),
        ((8, 6, 1, 3), 8, (1, 8, 4, 4), "weight does not fit the other tensors"),
        ((8, 6, 3, 3), 7, (1, 8, 4, 4), "bias does not fit the other tensors"),
        ((8, 6, 3, 3), 8, (1, 8, 4, 5), "y does not fit the other tensors"),
    ],
)
def test_the_core_refuses_tensors_that_do_not_fit(weight, bias, y, message):
    x = channels_last(whole_numbers(1, 6, 4, 4))
    with pytest.raises(ValueError, match=message):
        native.forward(x, whole_numbers(*weight), whole_numbers(bias), None, False, nan(*y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_core_refuses_other_dtypes_and_layouts(isa, dtype):
    weight, x = (whole_numbers(*shape).to(dtype) for shape in ((8, 6, 3, 3), (1, 6, 4, 4)))
    y = nan(1, 8, 4, 4).to(dtype)
    for wrong in (x.double(), x.bfloat16(), x.repeat(1, 2, 1, 2)[:, ::2, :, ::2]):
        with pytest.raises(ValueError, match="3x3 convolution"):
            native.forward(wrong, weight, None, None, False, y)
        with pytest.raises(ValueError, match="3x3 convolution"):
            native.forward(x, weight, None, wrong[:, :1].expand(1, 8, 4, 4), False, y)


@pytest.mark.parametrize(
    ("inputs", "skipped", "norm", "groups", "message"),
    [
        (7, 2, 8, 2, "weight does not fit the other tensors"),
        (6, 2, 8, 2, "weight does not fit the other tensors"),
        (8, None, 8, 2, "weight does not fit the other tensors"),
        (8, 2, 6, 2, "norm_weight does not fit the other tensors"),
        (8, 2, 8, 3, "groups do not divide the channels"),
    ],
)
def test_the_normed_convolution_refuses_channels_that_do_not_fit(inputs, skipped, norm, groups, message):
    x, weight, scale = torch.zeros(1, 6, 4, 4), torch.zeros(8, inputs, 3, 3), torch.ones(norm)
    skip = None if skipped is None else torch.zeros(1, skipped, 4, 4)
    stats = torch.zeros(1, groups, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        native.norm_forward(x, skip, scale, scale, stats, weight, None, None, torch.zeros(1, 8, 4, 4))
