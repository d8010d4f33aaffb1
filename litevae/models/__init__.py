"""The LiteVAE autoencoder and its parts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litevae.models.autoencoder import LiteVAE
    from litevae.models.baseline import SmallEncoderVAE
    from litevae.models.presets import PRESETS

__all__ = ["PRESETS", "LiteVAE", "SmallEncoderVAE"]


def __getattr__(name: str) -> Any:
    # The import is deferred because diffusers takes seconds to import, and commands that only import
    # `litevae.models.loading` must not wait for it.
    if name == "LiteVAE":
        from litevae.models.autoencoder import LiteVAE

        return LiteVAE
    if name == "SmallEncoderVAE":
        from litevae.models.baseline import SmallEncoderVAE

        return SmallEncoderVAE
    if name == "PRESETS":
        from litevae.models.presets import PRESETS

        return PRESETS
    if name == "ModelMixin":  # diffusers looks for it beside a class that a pipeline's model_index.json names
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
