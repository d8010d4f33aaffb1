"""Training of autoencoders: `load_config` and `train`."""

from litevae.training.config import Config, load_config
from litevae.training.trainer import TrainingResult, train

Result = TrainingResult  # the name until version 0.1

__all__ = ["Config", "Result", "TrainingResult", "load_config", "train"]
