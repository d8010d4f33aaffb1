"""LiteVAE: lightweight autoencoders for latent diffusion models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litevae.models import LiteVAE

__all__ = ["LiteVAE"]


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import, which `litevae --help` need not wait for
    if name == "LiteVAE":
        from litevae.models import LiteVAE

        return LiteVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
