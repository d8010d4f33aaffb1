"""Encoded data sets: folders of posterior moments, which are encoded once and read in every epoch."""

from litevae.latents.dataset import Latent, LatentDataset, ShapeBatchSampler, sample_latents
from litevae.latents.encode import Encoding, encode_images
from litevae.latents.folder import Settings
from litevae.latents.index import Part
from litevae.latents.merge import merge_parts
from litevae.latents.shards import verify

__all__ = [
    "Encoding",
    "Latent",
    "LatentDataset",
    "Part",
    "Settings",
    "ShapeBatchSampler",
    "encode_images",
    "merge_parts",
    "sample_latents",
    "verify",
]
