"""The LiteVAE autoencoder and its parts."""

from litevae.models.autoencoder import LiteVAE
from litevae.models.presets import PRESETS

__all__ = ["PRESETS", "LiteVAE"]
