"""LiteVAE: lightweight autoencoders for latent diffusion, in the clothes of `diffusers.AutoencoderKL`."""

from litevae.models import LiteVAE

__all__ = ["LiteVAE"]
