import pytest

from litevae_kernels import backend, info, use_backend


def test_report():
    rows = dict(info.report())
    assert rows["CPU instruction set"] in ("baseline", "avx2", "avx512")
    assert rows["haar on cpu"].startswith("native")
    assert backend.core is not None
    if backend.cuda_built:
        assert backend.core.cuda_version in rows["CUDA kernels"]
        assert backend.core.cuda_architectures.split()
    else:
        assert rows["CUDA kernels"] == f"not built: {backend.core.cuda_reason}"
        assert backend.core.cuda_reason


def test_report_of_a_forced_backend():
    with use_backend("reference"):
        assert dict(info.report())["haar on cpu"].startswith("reference")


def test_report_without_a_core(monkeypatch):
    monkeypatch.setattr(info, "core", None)
    monkeypatch.setattr(backend, "core", None)
    monkeypatch.setattr(backend, "core_error", "gone")
    backend._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain PyTorch"):
        rows = dict(info.report())
    assert rows["core"] == "not loaded: gone"
    assert rows["haar on cpu"].startswith("reference")
