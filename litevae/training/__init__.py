"""Training autoencoders: `load_config` and `train`."""

from litevae.training.config import Config, load_config
from litevae.training.trainer import Result, train

__all__ = ["Config", "Result", "load_config", "train"]
