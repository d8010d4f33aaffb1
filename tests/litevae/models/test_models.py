"""Tests of the package's deferred imports."""

import subprocess
import sys

import pytest

import litevae.models
from litevae.models.autoencoder import LiteVAE
from litevae.models.baseline import SmallEncoderVAE
from litevae.models.presets import PRESETS


def test_names_of_the_package():
    assert litevae.models.LiteVAE is LiteVAE
    assert litevae.models.PRESETS is PRESETS
    assert litevae.models.SmallEncoderVAE is SmallEncoderVAE
    with pytest.raises(AttributeError, match=r"module 'litevae\.models' has no attribute 'LightVAE'"):
        _ = litevae.models.LightVAE


def test_loading_imports_neither_diffusers_nor_torch():
    code = "import sys, litevae.models.loading; print(sys.modules.keys() & {'diffusers', 'torch'})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
