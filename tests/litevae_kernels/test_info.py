import pytest

from litevae_kernels import backend, info, use_backend


def test_report():
    rows = dict(info.report())
    assert rows["CPU instruction set"] in ("baseline", "avx2", "avx512", "avx512bf16")
    assert info.OPERATORS == ("haar", "group_norm_silu", "smc")
    for operator in info.OPERATORS:
        assert rows[f"{operator} on cpu"].startswith("native")
        assert f"{operator} on cuda" in rows
    assert backend.core is not None
    if backend.cuda_built:
        assert backend.core.cuda_version in rows["CUDA kernels"]
        assert backend.core.cuda_architectures.split()
    else:
        assert rows["CUDA kernels"] == f"not built: {backend.core.cuda_reason}"
        assert backend.core.cuda_reason


def test_report_of_a_forced_backend():
    with use_backend("reference"):
        rows = dict(info.report())
    assert all(rows[f"{operator} on cpu"].startswith("reference") for operator in info.OPERATORS)


def test_report_without_a_core(monkeypatch):
    monkeypatch.setattr(info, "core", None)
    monkeypatch.setattr(backend, "core", None)
    monkeypatch.setattr(backend, "core_error", "gone")
    backend._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain PyTorch"):
        rows = dict(info.report())
    assert rows["core"] == "not loaded: gone"
    assert all(rows[f"{operator} on cpu"].startswith("reference") for operator in info.OPERATORS)
