"""Encoded data sets: folders of posterior moments, which are encoded once and read in every epoch."""

from litevae.latents.encode import Encoding, encode_images
from litevae.latents.folder import Settings
from litevae.latents.shards import Latent, LatentDataset, sample_latents, verify

__all__ = ["Encoding", "Latent", "LatentDataset", "Settings", "encode_images", "sample_latents", "verify"]
