import pytest

from litevae_kernels import backend, info, use_backend
from litevae_kernels.conv3x3 import describe_backend
from litevae_kernels.core_interface import OPERATORS

WITHOUT_CONV3X3 = ("haar", "group_norm_silu", "smc")


def test_report():
    rows = dict(info.report())
    assert rows["CPU instruction set"] in ("baseline", "avx2", "avx512", "avx512bf16")
    for operator in OPERATORS:
        assert f"{operator} on cuda" in rows
    for operator in WITHOUT_CONV3X3:
        assert rows[f"{operator} on cpu"].startswith("native")
    assert backend.core is not None
    if backend.cuda_built:
        assert backend.core.cuda_version in rows["CUDA kernels"]
        assert backend.core.cuda_architectures.split()
    else:
        assert rows["CUDA kernels"] == f"not built: {backend.core.cuda_reason}"
        assert backend.core.cuda_reason


def test_an_operator_describes_its_own_backend():
    rows = dict(info.report())
    assert rows["conv3x3 on cpu"] == describe_backend("cpu")
    assert rows["conv3x3 on cpu"].startswith("native for float32")
    assert rows["conv3x3 on cuda"].startswith("PyTorch's convolution")


def test_report_of_a_forced_backend():
    with use_backend("reference"):
        rows = dict(info.report())
    assert rows["conv3x3 on cpu"].startswith("PyTorch's convolution")
    assert all(rows[f"{operator} on cpu"].startswith("reference") for operator in WITHOUT_CONV3X3)


def test_report_without_a_core(monkeypatch):
    monkeypatch.setattr(info, "core", None)
    monkeypatch.setattr(backend, "core", None)
    monkeypatch.setattr(backend, "core_error", "gone")
    backend._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain PyTorch"):
        rows = dict(info.report())
    assert rows["core"] == "not loaded: gone"
    assert all(rows[f"{operator} on cpu"].startswith("reference") for operator in WITHOUT_CONV3X3)
