"""The switch of the kernel for thread-block clusters; tests/gpu_emulator runs the kernel itself."""

import contextlib
import types

import pytest
import torch

from litevae_kernels import info
from litevae_kernels.backend import read_mode
from litevae_kernels.group_norm_silu import native


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Forgets the answers, which are kept per GPU, and returns a list of the GPUs that were made the current one."""
    devices = []

    def guard(device):
        devices.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(native, "device_guard", guard)

    def forget():
        native.why_no_clusters.cache_clear()
        native._may_use_clusters.cache_clear()

    forget()
    yield devices
    forget()


def core(blocks):
    return types.SimpleNamespace(group_norm_silu_card=lambda device: (132, 232448, blocks))


def test_only_known_modes_are_allowed():
    assert read_mode("LITEVAE_GPU_NORM", None, native.MODES) == "off"
    with pytest.raises(ValueError, match=r"^LITEVAE_GPU_NORM is 'on'; allowed: off, clusters$"):
        read_mode("LITEVAE_GPU_NORM", "on", native.MODES)


def test_the_variable_turns_it_on(monkeypatch):
    monkeypatch.setenv("LITEVAE_GPU_NORM", "clusters")
    assert dict(info.report())["LITEVAE_GPU_NORM"] == "clusters"
    assert read_mode("LITEVAE_GPU_NORM", "clusters", native.MODES) == "clusters"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (types.SimpleNamespace(), "the core was not built for a GPU of sm_90 or newer"),
        (core(0), "GPU 0 has no thread-block clusters, or the core was not built for it"),
    ],
    ids=["core", "GPU"],
)
def test_a_switch_without_effect_says_so(monkeypatch, found, reason):
    monkeypatch.setattr(native, "core", found)
    with pytest.warns(RuntimeWarning, match=f"^LITEVAE_GPU_NORM=clusters has no effect: {reason}$"):
        assert not native._may_use_clusters(0)


def test_info_says_whether_it_is_on(monkeypatch, guarded):
    assert dict(info.report())["norms in clusters"] == "off"
    monkeypatch.setattr(native, "mode", "clusters")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert native.describe_clusters() == "no GPU is visible"
    monkeypatch.setattr(native, "core", core(16))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert native.describe_clusters() == "on for GPU 0"
    assert guarded == [torch.device("cuda", 0)]  # The core changes the current GPU.
    assert native._may_use_clusters(0)
