"""Encodes in several processes with gloo. Arguments: model, images, and a JSON list of jobs: how many processes,
what happens to the second at its third image ("dies", "term" or nothing), the output folder, and settings.

Prints "JOB RANK STATUS" as each of them ends, and what they return or raise on stderr. Importing PyTorch takes
seconds, so they are forks of this process, which computes nothing itself.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from litevae import LiteVAE
from litevae.latents import Settings, encode_images
from litevae.training.sources import open_images

model, photographs, jobs = sys.argv[1:]
torch.set_num_threads(1)


class Images:
    """Images of which the third that is loaded brings a signal with it."""

    def __init__(self, signal):
        self.images, self.signal, self.loaded = open_images(photographs), signal, 0

    def __len__(self):
        return len(self.images)

    def __getattr__(self, name):
        return getattr(self.images, name)

    def load(self, index):
        self.loaded += 1
        if self.loaded == 3 and self.signal:
            os.kill(os.getpid(), self.signal)
        return self.images.load(index)


def work(rank, event, folder, settings):
    images = Images({"dies": signal.SIGKILL, "term": signal.SIGTERM}.get(event) if rank == 1 else None)
    fraction = settings.pop("max_bad_fraction", 0.1)
    settings = Settings(**{"size": 32, "mirror": True, "shard_size": 4} | settings)
    return encode_images(LiteVAE.from_pretrained(model), images, Path(folder), settings, 2, 0, fraction)


for job, (count, event, folder, settings) in enumerate(json.loads(jobs)):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = {}
    for rank in range(count):
        child = os.fork()
        if child:
            children[child] = rank
            continue
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        status = 1
        try:
            result = work(rank, event, folder, settings)
            told = f"{result.total} {result.before} {result.done} {result.bad} {result.stopped_by}"
            status = 0
        except BaseException as error:
            told = repr(error)
        finally:
            os.write(2, f"job {job}, rank {rank}: {told}\n".encode())
            os._exit(status)
    while children:
        child, status = os.wait()
        print(job, children.pop(child), os.waitstatus_to_exitcode(status), flush=True)
