"""Tests which calls the kernels serve, and what `describe_backend` says about it."""

import sys

import pytest
import torch

from litevae_kernels import arithmetic, use_backend
from litevae_kernels.conv3x3 import describe_backend, dispatch
from litevae_kernels.conv3x3.dispatch import is_small, serves, why_not

conv = sys.modules["litevae_kernels.conv3x3"]  # The package has the function under this name.
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def x86_cpu_with_bfloat16(monkeypatch):
    """Makes this machine one with AVX512-BF16, and without AMX and float16 arithmetic."""
    monkeypatch.setattr(arithmetic, "_X86", True)
    monkeypatch.setattr(arithmetic, "_BFLOAT16", True)
    monkeypatch.setattr(arithmetic, "_FLOAT16", False)
    monkeypatch.setattr(dispatch, "AMX", False)


@pytest.mark.parametrize("isa_name", ["baseline", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_what_serves_a_dtype(dtype, isa_name):
    for innermost in (False, True):
        expected = dtype != F64 and (innermost or (dtype, isa_name) != (BF16, "avx512bf16"))
        assert serves(dtype, isa_name, innermost, channels=96, pixels=4096) == expected
        assert not serves(dtype, isa_name, innermost, channels=2, pixels=4096)


def test_pytorch_uses_the_arithmetic_that_the_kernels_do_not(monkeypatch):
    monkeypatch.setattr(arithmetic, "_FLOAT16", True)
    monkeypatch.setattr(dispatch, "AMX", True)
    for dtype, reason in ((F16, "float16 arithmetic"), (BF16, "AMX")):
        assert not serves(dtype, "avx512bf16", True, channels=96, pixels=4096)
        assert reason in why_not(dtype, "avx512bf16")
        assert serves(dtype, "avx512", True, channels=96, pixels=4096)
    assert serves(F32, "avx512bf16", True, channels=96, pixels=4096)


def test_an_arm_cpu_with_bfloat16(monkeypatch):
    monkeypatch.setattr(arithmetic, "_X86", False)
    assert "bfloat16 arithmetic" in why_not(BF16, "baseline")
    assert serves(F32, "baseline", False, channels=96, pixels=4096)
    assert serves(F16, "baseline", False, channels=96, pixels=4096)


def test_descriptions(monkeypatch):
    monkeypatch.setattr(conv, "current_isa", lambda: "avx512bf16")
    assert describe_backend("cpu", F32).startswith("native, from")
    assert "channels are innermost" in describe_backend("cpu", BF16)
    assert describe_backend("cpu", F16).startswith("native in float32, from")
    assert "not native" in describe_backend("cpu", F64)
    assert describe_backend("cuda", F32) == "PyTorch's convolution"
    monkeypatch.setattr(conv, "current_isa", lambda: "avx2")
    assert describe_backend("cpu", BF16) == describe_backend("cpu", F16)
    with use_backend("reference"):
        assert describe_backend("cpu", F32) == "PyTorch's convolution"


def test_without_a_core(monkeypatch):
    monkeypatch.setattr(dispatch, "core", None)
    monkeypatch.setattr(dispatch, "core_error", "gone")
    assert not serves(F32, None, True, channels=96, pixels=4096)
    assert (
        describe_backend("cpu", F32)
        == "PyTorch's convolution   (not native: the compiled core did not load (gone))"
    )


def test_small_images():
    for dtype, isa_name in ((F32, "avx2"), (F32, "avx512bf16"), (BF16, "avx512"), (F16, "baseline")):
        assert is_small(dtype, isa_name, channels=96, pixels=63)
        assert not is_small(dtype, isa_name, channels=16, pixels=64)
        assert is_small(dtype, isa_name, channels=15, pixels=255)
        assert not is_small(dtype, isa_name, channels=3, pixels=256)
    assert not is_small(BF16, "avx512bf16", channels=96, pixels=128)
    assert serves(BF16, "avx512bf16", True, channels=32, pixels=128)
    assert not serves(BF16, "avx512bf16", True, channels=32, pixels=127)
