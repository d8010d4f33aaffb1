import pytest
import torch

from litevae_kernels.backend import core
from litevae_kernels.tensors import (
    DTYPES,
    accumulate_dtype,
    check_dtype,
    check_memory_format,
    check_tensor,
    differentiable_gradients,
    is_channels_last,
    memory_format_of,
    native_view,
    scratch_memory,
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
    with pytest.raises(TypeError, match=r"^dtype is float32; allowed: float32, "):
        check_dtype("float32", "dtype is")


def test_check_memory_format():
    for memory_format in (None, torch.contiguous_format, torch.channels_last):
        check_memory_format(memory_format)
    for memory_format in (torch.preserve_format, "channels_last"):
        with pytest.raises(ValueError, match=r"; allowed: torch\.contiguous_format, torch\.channels_last$"):
            check_memory_format(memory_format)


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
    for x in (torch.zeros(2, 3, 4, 5)[:, ::2], torch.zeros(7)[::3]):
        assert isinstance(native_view(x), core.TensorView)


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
