"""LiteVAE: lightweight autoencoders for latent diffusion models."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litevae.models import LiteVAE

__all__ = ["LiteVAE", "__version__"]

try:
    __version__ = version("litevae")
except PackageNotFoundError:  # Python runs in a source tree, and the package is not installed.
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    # The import of diffusers takes seconds, which `litevae --help` need not wait for.
    if name == "LiteVAE":
        from litevae.models import LiteVAE

        return LiteVAE
    # Diffusers looks here for the classes that a pipeline's model_index.json names, and for their base.
    if name == "SmallEncoderVAE":
        from litevae.models import SmallEncoderVAE

        return SmallEncoderVAE
    if name == "ModelMixin":
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
