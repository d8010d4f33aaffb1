"""Inference mode, in which the operators skip PyTorch's dispatcher unless something needs it."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import litevae_kernels as kernels
from litevae_kernels.backend import core
from litevae_kernels.tensors import is_plain

pytestmark = pytest.mark.skipif(core is None, reason="the compiled core did not load")


class Subclass(Tensor):
    pass


class Names(TorchDispatchMode):
    """Records the operators of `litevae` that the dispatcher runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "litevae":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def image():
    return torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))


WEIGHT = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(1))
SCALE = torch.randn(16, generator=torch.Generator().manual_seed(2))
# Each operator as a function of one tensor, and the name by which the dispatcher knows it.
CALLS = {
    "haar_analysis": kernels.haar_dwt2d,
    "haar_synthesis": kernels.haar_idwt2d,
    "group_norm_silu": lambda x: kernels.group_norm_silu(x, 4, SCALE, SCALE),
    "modulate_weight": lambda x: kernels.modulate_weight(WEIGHT, x[0, :, 0, 0]),
    "conv3x3": lambda x: kernels.conv3x3(x, WEIGHT, SCALE, residual=x),
}
each = pytest.mark.parametrize("name", CALLS)


@each
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_result_is_that_of_the_dispatcher(name, memory_format):
    x = image().contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = CALLS[name](x)
    with torch.inference_mode():
        for given in (x, nn.Parameter(x), x.clone()):
            y = CALLS[name](given)
            assert y.is_inference()
            assert y.dtype == expected.dtype
            assert y.stride() == expected.stride()
            assert torch.equal(y, expected)


@each
def test_a_lazy_negation_counts(name):
    x = torch.complex(image(), image()).conj().imag
    assert x.is_neg()
    assert not is_plain(x)
    with torch.inference_mode():
        assert torch.equal(CALLS[name](x), CALLS[name](x.resolve_neg()))


@each
def test_modes_and_the_profiler_see_the_call(name):
    with torch.inference_mode():
        with Names() as names:
            CALLS[name](image())
        assert names.seen == [name]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            CALLS[name](image())
    assert f"litevae::{name}" in {event.key for event in profile.key_averages()}


@each
def test_subclasses_and_fake_tensors_stay_what_they_are(name):
    with torch.inference_mode():
        assert type(CALLS[name](image().as_subclass(Subclass))) is Subclass
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(CALLS[name](mode.from_tensor(image())), FakeTensor)


def test_what_is_plain():
    x = image()
    assert is_plain(x, None, nn.Parameter(x))
    assert not is_plain(None, x.as_subclass(Subclass))
    assert not is_plain(x.to("meta"))
    assert not is_plain(torch._to_functional_tensor(x))
    with torch.device("cpu"):  # a mode of __torch_function__
        assert not is_plain(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_are_plain():
    assert is_plain(image().cuda())
    with torch.inference_mode():
        assert is_plain(image().cuda())
