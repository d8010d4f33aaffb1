"""The second stage: diffusion models on latents (Tables 7 and 13)."""

from litevae.diffusion.config import DiffusionConfig, load_diffusion_config
from litevae.diffusion.pipeline import LatentDiffusionPipeline
from litevae.diffusion.trainer import DiffusionResult, train

# The names until version 0.1.
load_config = load_diffusion_config
Result = DiffusionResult

__all__ = [
    "DiffusionConfig",
    "DiffusionResult",
    "LatentDiffusionPipeline",
    "Result",
    "load_config",
    "load_diffusion_config",
    "train",
]
