"""The second stage: diffusion models on latents (Tables 7 and 13)."""

from litevae.diffusion.config import DiffusionConfig, load_config
from litevae.diffusion.pipeline import LatentDiffusionPipeline
from litevae.diffusion.trainer import DiffusionResult, train

Result = DiffusionResult  # the name until version 0.1

__all__ = ["DiffusionConfig", "DiffusionResult", "LatentDiffusionPipeline", "Result", "load_config", "train"]
