"""`litevae` itself: the version and the lazy import of the model."""

import importlib
import importlib.metadata

import pytest

import litevae


def test_version_is_the_installed_package_s():
    assert litevae.__version__ == importlib.metadata.version("litevae")


def test_version_of_a_source_tree_that_is_not_installed(monkeypatch):
    def fail(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", fail)
        assert importlib.reload(litevae).__version__ == "unknown"
    importlib.reload(litevae)


def test_model_is_found_by_its_name():
    from litevae.models import LiteVAE

    assert litevae.LiteVAE is LiteVAE


def test_other_names_are_unknown():
    with pytest.raises(AttributeError, match="has no attribute 'LightVAE'"):
        litevae.LightVAE  # noqa: B018
