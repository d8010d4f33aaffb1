"""Encodes in several processes with gloo. Arguments: model, images, and a JSON list of jobs.

A job consists of the number of processes, an event, the output folder, and settings. The event is empty or one of
"dies" and "term" (the second process gets SIGKILL or SIGTERM at its first image), "other" (the second process has other
images) and "command" (all processes run `litevae encode`). The output is that of `forks.run_jobs`.
"""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch

from litevae import LiteVAE
from litevae.cli import main
from litevae.data.sources import open_images
from litevae.latents import Settings, encode_images

sys.path.insert(0, str(Path(__file__).parents[1]))
from forks import run_jobs

model, photographs, jobs = sys.argv[1:]
torch.set_num_threads(1)


class Images:
    """Images that send a signal to this process when the first one is loaded."""

    def __init__(self, signal):
        self.images, self.signal = open_images(photographs), signal

    def __len__(self):
        return len(self.images)

    def __getattr__(self, name):
        return getattr(self.images, name)

    def load(self, index):
        if self.signal:
            os.kill(os.getpid(), self.signal)
            self.signal = None
        return self.images.load(index)


def command(folder):
    options = "--mirror --shard-size 4 --batch-size 2 --workers 0 --max-bad-fraction 0.1 --precision fp32"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = main(["encode", model, photographs, folder, "--device", "cpu", *options.split()])
    return f"status {status}: {output.getvalue().splitlines()}"


def work(rank, event, folder, settings):
    if event == "command":
        return command(folder)
    images = Images({"dies": signal.SIGKILL, "term": signal.SIGTERM}.get(event) if rank == 1 else None)
    if event == "other" and rank == 1:
        images.images = open_images("demo")
    fraction = settings.pop("max_bad_fraction", 0.1)
    settings = Settings(**{"size": 32, "mirror": True, "shard_size": 4} | settings)
    result = encode_images(LiteVAE.from_pretrained(model), images, Path(folder), settings, 2, 0, fraction)
    return f"{result.total} {result.before} {result.done} {result.bad} {result.stopped_by}"


run_jobs(json.loads(jobs), work)
