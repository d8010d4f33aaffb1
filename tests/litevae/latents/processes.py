"""Encodes in several processes with gloo. Arguments: model, images, and a JSON list of jobs: how many processes,
an event, the output folder, and settings. Events: at its first image the second process "dies" or gets a "term";
it has "other" images; all run the "command".

Prints "JOB RANK STATUS" as each of them ends, and what they return, print or raise on stderr. Importing PyTorch
takes seconds, so they are forks of this process, which computes nothing itself.
"""

import contextlib
import io
import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from litevae import LiteVAE
from litevae.cli import main
from litevae.latents import Settings, encode_images
from litevae.training.sources import open_images

model, photographs, jobs = sys.argv[1:]
torch.set_num_threads(1)


class Images:
    """Images of which the first that is loaded brings a signal with it."""

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
            told = work(rank, event, folder, settings)
            status = 0
        except BaseException as error:
            told = repr(error)
        finally:
            os.write(2, f"job {job}, rank {rank}: {told}\n".encode())
            os._exit(status)
    while children:
        child, status = os.wait()
        print(job, children.pop(child), os.waitstatus_to_exitcode(status), flush=True)
