import os
import subprocess
import sys

import pytest
import torch

import litevae_kernels
from litevae_kernels import backend, haar_dwt2d, use_backend
from litevae_kernels.haar import reference


def test_the_core_is_built():
    assert backend.core is not None, backend.core_error
    assert backend.choose("cpu") == "native"


def test_use_backend_forces_and_restores(monkeypatch):
    calls = []
    original = reference.analysis
    monkeypatch.setattr(reference, "analysis", lambda *a: calls.append(1) or original(*a))
    image = torch.zeros(1, 1, 4, 4)
    with use_backend("reference"):
        haar_dwt2d(image)
        with use_backend("native"):
            haar_dwt2d(image)
    haar_dwt2d(image)
    assert len(calls) == 1

    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert backend.choose("cpu") == "native"


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend is 'cuda'; allowed: reference, native, triton"),
        use_backend("cuda"),
    ):
        pass


@pytest.mark.skipif(backend.triton_interpreted, reason="the interpreter runs Triton on the CPU")
def test_a_forced_backend_that_cannot_serve_says_why():
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' cannot serve a cpu tensor: Triton"),
    ):
        haar_dwt2d(torch.zeros(1, 1, 4, 4))


def test_devices_without_kernels_use_the_reference():
    out = haar_dwt2d(torch.zeros(1, 3, 5, 4, device="meta"))
    assert out.shape == (1, 12, 3, 2)
    assert out.device.type == "meta"
    with use_backend("native"), pytest.raises(RuntimeError, match="does not know device 'meta'"):
        haar_dwt2d(torch.zeros(1, 3, 5, 4, device="meta"))


def test_a_missing_core_warns_once(monkeypatch):
    monkeypatch.setattr(backend, "core", None)
    monkeypatch.setattr(backend, "core_error", "no such file")
    backend._warn_slow.cache_clear()
    image = torch.zeros(1, 1, 4, 4)
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch, several times slower.*no such file"):
        haar_dwt2d(image)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        haar_dwt2d(image)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(litevae_kernels.__file__)),
        check=False,
    )


def test_environment_variable():
    code = "from litevae_kernels import backend; print(backend.choose('cpu'))"
    assert run(code, LITEVAE_BACKEND="reference").stdout.strip() == "reference"
    assert run(code).stdout.strip() == "native"
    wrong = run(code, LITEVAE_BACKEND="fast")
    assert wrong.returncode != 0
    assert "LITEVAE_BACKEND is 'fast'; allowed: reference, native, triton" in wrong.stderr


def test_public_names():
    assert sorted(litevae_kernels.__all__) == [
        "haar_dwt2d",
        "haar_idwt2d",
        "haar_pyramid",
        "use_backend",
        "wavedec2",
        "waverec2",
    ]


def test_kernels_do_not_import_the_model():
    code = "import sys, litevae_kernels; print(any(m == 'litevae' or m.startswith('litevae.') for m in sys.modules))"
    assert run(code).stdout.strip() == "False"
