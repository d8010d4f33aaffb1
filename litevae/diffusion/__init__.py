"""The second stage (Tables 7 and 13): diffusion models on latents."""

from litevae.diffusion.config import DiffusionConfig, load_diffusion_config
from litevae.diffusion.pipeline import LatentDiffusionPipeline
from litevae.diffusion.trainer import Result, train

load_config = load_diffusion_config  # the name until version 0.1

__all__ = [
    "DiffusionConfig",
    "LatentDiffusionPipeline",
    "Result",
    "load_config",
    "load_diffusion_config",
    "train",
]
