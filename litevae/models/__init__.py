"""The LiteVAE autoencoder and its parts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litevae.models.autoencoder import LiteVAE
    from litevae.models.presets import PRESETS

__all__ = ["PRESETS", "LiteVAE"]


def __getattr__(name: str) -> Any:
    # The import is deferred because diffusers takes seconds to import, and commands that only import
    # `litevae.models.loading` must not wait for it.
    if name == "LiteVAE":
        from litevae.models.autoencoder import LiteVAE

        return LiteVAE
    if name == "PRESETS":
        from litevae.models.presets import PRESETS

        return PRESETS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
