"""The choice between the Triton kernel and PyTorch's operators, with a clock of the test's own."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from litevae_kernels import conv3x3, info, use_backend
from litevae_kernels.backend import read_mode
from litevae_kernels.conv3x3 import gpu
from litevae_kernels.conv3x3.normed import norm_silu_conv3x3

X = torch.randn(2, 16, 6, 5).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
WEIGHT = torch.randn(8, 16, 3, 3).to(torch.bfloat16)


class Clock:
    """Stands for the measurement: each call has a fixed time, and what was called is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ours: float, theirs: float) -> None:
        self.calls: list[str] = []
        self.times = {"ours": ours, "theirs": theirs}
        monkeypatch.setattr(gpu, "mode", "measure")
        monkeypatch.setattr(gpu, "_winners", {})
        monkeypatch.setattr(gpu, "_convolve", self.named("ours"))
        monkeypatch.setattr(gpu, "_convolve_in_pytorch", self.named("theirs"))
        monkeypatch.setattr(gpu, "_time", self.time)

    def named(self, name):
        def call(x: Tensor, *_: object) -> Tensor:
            self.calls.append(name)
            return torch.zeros(1)

        return call

    def time(self, call) -> float:
        call()
        return self.times[self.calls[-1]]

    def after(self, *arguments: object) -> list[str]:
        """Returns what a call of the operator called."""
        self.calls.clear()
        gpu.forward(*arguments)
        return list(self.calls)


@pytest.mark.parametrize(("ours", "winner"), [(0.9, "ours"), (1.0, "theirs"), (1.1, "theirs")])
def test_the_first_call_measures_and_the_next_ones_run_the_winner(ours, winner, monkeypatch):
    clock = Clock(monkeypatch, ours, 1.0)
    first = clock.after(X, WEIGHT, None, None, False)
    assert first.count("ours") >= gpu.ROUNDS
    assert first.count("theirs") >= gpu.ROUNDS
    assert first[-1] == winner
    for _ in range(2):
        assert clock.after(X, WEIGHT, None, None, False) == [winner]


def test_everything_that_matters_is_measured_on_its_own(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)
    bias, residual = torch.zeros(8), torch.zeros(2, 8, 6, 5)
    for arguments in (
        (X, WEIGHT, None, None, False),
        (X, WEIGHT, None, None, True),
        (X, WEIGHT, bias, None, False),
        (X, WEIGHT, None, residual, False),
        (X[:1], WEIGHT, None, None, False),
        (X[:, :, 1:], WEIGHT, None, None, False),
        (X[:, :8], WEIGHT[:, :8], None, None, False),
        (X[:, 1:9], WEIGHT[:, :8], None, None, False),  # other addresses
        (X.half(), WEIGHT, None, None, False),
        (X, WEIGHT[:4], None, None, False),
        (X, WEIGHT.contiguous(memory_format=torch.channels_last), None, None, False),
    ):
        assert len(clock.after(*arguments)) > 2
        assert clock.after(*arguments) == ["ours"]


def test_a_skip_is_measured_on_its_own(monkeypatch):
    monkeypatch.setattr(gpu, "_faster", lambda key, *_: key)
    skip = torch.randn(2, 9, 6, 5).bfloat16()
    innermost = skip.contiguous(memory_format=torch.channels_last)
    keys = [
        gpu.norm_forward(X, s, 4, None, None, 1e-6, WEIGHT, None, None)
        for s in (None, skip[:, :8], innermost[:, :8], innermost[:, 1:], innermost[:, :4])
    ]
    assert len(set(keys)) == len(keys)


def test_a_kernel_that_fails_loses_with_a_warning(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)

    def fail(*_):
        raise RuntimeError("out of resources\nmore")

    monkeypatch.setattr(gpu, "_convolve", fail)
    with pytest.warns(RuntimeWarning, match="RuntimeError: out of resources$"):
        assert clock.after(X, WEIGHT, None, None, False)[-1] == "theirs"
    assert clock.after(X, WEIGHT, None, None, False) == ["theirs"]


def test_a_forced_kernel_is_not_measured(monkeypatch):
    clock = Clock(monkeypatch, 2.0, 1.0)
    with use_backend("triton"):
        assert clock.after(X, WEIGHT, None, None, False) == ["ours"]
    assert not gpu._winners


class OnGPU:
    """What the choice reads of a tensor."""

    shape = (2, 16, 6, 5)

    def __init__(self, innermost: bool = True) -> None:
        self.innermost = innermost

    def stride(self, _: int) -> int:
        return 1 if self.innermost else 30


def test_what_the_kernel_serves(monkeypatch):
    pytest.importorskip("triton")
    with torch.no_grad():
        assert not gpu.serves(torch.bfloat16, OnGPU())
        with use_backend("triton"):
            assert gpu.serves(torch.bfloat16, OnGPU())
        monkeypatch.setattr(gpu, "mode", "measure")
        assert gpu.serves(torch.bfloat16, OnGPU())
        assert gpu.serves(torch.float16, OnGPU())
        assert not gpu.serves(torch.float32, OnGPU())
        assert not gpu.serves(torch.bfloat16, OnGPU(innermost=False))
        for backend in ("reference", "native"):
            with use_backend(backend):
                assert not gpu.serves(torch.bfloat16, OnGPU())
    with torch.enable_grad():
        assert not gpu.serves(torch.bfloat16, OnGPU())


def test_a_mode_is_off_or_measure():
    assert read_mode("LITEVAE_GPU_CONV", None, gpu.MODES) == "off"
    assert read_mode("LITEVAE_GPU_CONV", "measure", gpu.MODES) == "measure"
    with pytest.raises(ValueError, match=r"^LITEVAE_GPU_CONV is 'on'; allowed: off, measure$"):
        read_mode("LITEVAE_GPU_CONV", "on", gpu.MODES)


def test_info_says_what_serves_a_gpu(monkeypatch):
    monkeypatch.setenv("LITEVAE_GPU_CONV", "measure")
    assert dict(info.report())["LITEVAE_GPU_CONV"] == "measure"
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "mode", "measure")
    rows = {row[2]: row[3] for row in info.served() if row[:2] == ("cuda", "conv3x3")}
    assert rows["float32, float64"] == "PyTorch's convolution"
    assert rows["bfloat16, float16"].startswith("the faster of triton and PyTorch's convolution")


@torch.no_grad()
def test_pytorch_alone_is_right():
    y = gpu._convolve_in_pytorch(X, WEIGHT.float(), torch.zeros(8), None, True)
    torch.testing.assert_close(y, conv3x3(X, WEIGHT, silu_input=True), atol=0.2, rtol=0.02)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_calls_on_a_gpu_reach_the_operators():
    """Tensors without memory take the way of a GPU's; with gradients, and without the switch, they do not."""
    pytest.importorskip("triton")
    with FakeTensorMode(), Calls() as calls:
        x = torch.empty(2, 32, 6, 5, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
        weight = torch.empty(8, 32, 3, 3, dtype=torch.bfloat16, device="cuda")
        with use_backend("triton"):
            for y in (conv3x3(x, weight), norm_silu_conv3x3(x, 8, None, None, weight)):
                assert y.shape == (2, 8, 6, 5)
                assert y.is_contiguous(memory_format=torch.channels_last)
            assert calls.names == ["litevae::conv3x3", "litevae::norm_silu_conv3x3"]
            with torch.enable_grad():
                norm_silu_conv3x3(x, 8, None, None, weight)
        conv3x3(x, weight)
        assert calls.names[2:] == ["litevae::group_norm_silu"]


class Calls(TorchDispatchMode):
    """Notes the names of this package's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "litevae":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
