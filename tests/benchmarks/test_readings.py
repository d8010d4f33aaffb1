"""What the readings on a GPU run, without their timing."""

import pytest
import torch

from benchmarks.gpu import test_readings as readings
from litevae_kernels.backend import forced_backend
from litevae_kernels.conv3x3 import gpu


@pytest.fixture
def state(monkeypatch):
    """Replaces each encoder by a function that returns the settings it is called with."""

    def call(_):
        return torch.is_inference_mode_enabled(), forced_backend(), gpu.mode

    monkeypatch.setattr(readings, "make_model", lambda *_: None)
    monkeypatch.setattr(readings, "deploy", lambda *_: call)


def test_encoders_launched_by_python_run_in_inference_mode(state, monkeypatch):
    """`litevae encode` does, and a call skips the dispatcher only then."""
    found = {}
    monkeypatch.setattr(readings, "race", lambda *arguments, **_: found.update(arguments[3]))
    readings.test_launched_by_python(None, None, "cpu", True, lambda _: (), 8)
    assert set(found) == set(readings.COMPARED)
    assert all(call(None)[0] for call in found.values())


def test_the_fused_encoders_are_measured(state, monkeypatch):
    """The Triton convolution is forced in one form of each encoder, and competes in another one."""
    found = {}

    class Field:
        def __init__(self, *_):
            self.inputs = [torch.empty(1, 3, 2, 2)]
            self.providers = {}

        def gate(self, model):
            return None

        def enter(self, model, configuration, name, gate, call=None):
            self.providers[name] = call
            if call is not None:
                found[name] = call(None)[1:]

    monkeypatch.setattr(readings, "Field", Field)
    monkeypatch.setattr(readings, "served_dtypes", lambda _: [torch.float32, torch.bfloat16])
    entered = []
    monkeypatch.setattr(readings, "contest", lambda *arguments, **_: entered.extend(arguments[4]))
    readings.test_fused_encoders(None, None, "cuda", False, lambda _: (1, 3, 2, 2), 32)
    for name in ("LiteVAE-B", "LiteVAE-S"):
        assert found[f"{name}, PyTorch's convolution"] == (None, "off")
        assert found[f"{name}, all in Triton"] == ("triton", "off")
        assert found[f"{name}, {readings.FASTER}"] == (None, "measure")
    assert entered == [*found, readings.SD_VAE]
