"""Trains diffusion models in child processes. The argument: a JSON list of jobs, each a list of how many
processes, after how many writes through to the disk the first kills itself (or null), and the settings.

Prints "JOB RANK STATUS" as each of them ends. Importing PyTorch takes seconds, so they are forks of this
process, which computes nothing itself.
"""

import json
import os
import signal
import socket
import sys

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import litevae.diffusion.fid as fid_module
import litevae.diffusion.trainer as trainer_module
from litevae.diffusion import load_config, train
from litevae.models import LiteVAE

torch.set_num_threads(1)
trainer_module.draw_loss = lambda _, path: path.touch()  # spares the time that Matplotlib takes


class Means(nn.Module):
    """Of an image's colours, in place of Inception's features."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3))


fid_module.make_fid = lambda _: FrechetInceptionDistance(feature=Means())


def work(writes, settings):
    """The run of one process."""
    if writes is not None:
        sync, count = os.fsync, iter(range(writes))

        def fsync(descriptor):
            sync(descriptor)
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
    config = load_config("small", settings)
    train(config, LiteVAE.from_pretrained(config.model))


for job, (processes, writes, settings) in enumerate(json.loads(sys.argv[1])):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = {}
    for rank in range(processes):
        child = os.fork()
        if child:
            children[child] = rank
            continue
        if processes > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        status = 1
        try:
            work(writes, settings)
            status = 0
        except BaseException as error:
            print(f"job {job}, rank {rank}: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    while children:
        child, status = os.wait()
        print(job, children.pop(child), os.waitstatus_to_exitcode(status), flush=True)
