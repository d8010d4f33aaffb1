"""Trains diffusion models in child processes. The argument: a JSON list of jobs, each a list of how many
processes, after how many writes through to the disk the first kills itself (or null), and the settings.

Prints what `forks.run_jobs` does.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import litevae.diffusion.fid as fid_module
import litevae.diffusion.trainer as trainer_module
from litevae.diffusion import load_diffusion_config, train
from litevae.models import LiteVAE

sys.path.insert(0, str(Path(__file__).parents[1]))
from forks import die_at_sync, run_jobs

torch.set_num_threads(1)
trainer_module.draw_loss = lambda _, path: path.touch()  # saves the time that Matplotlib takes


class Means(nn.Module):
    """Features from an image's colours, instead of Inception's."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3))


fid_module.make_fid = lambda _: FrechetInceptionDistance(feature=Means())


def work(_, writes, settings):
    """The run of one process."""
    if writes is not None:
        die_at_sync(writes)
    config = load_diffusion_config("small", settings)
    train(config, LiteVAE.from_pretrained(config.model))


run_jobs(json.loads(sys.argv[1]), work)
