"""Encodes in child processes that are killed. Arguments: model, images, output folder, number of kills, seed.

Importing PyTorch takes seconds. The children are therefore forks of this process, which computes nothing itself.
"""

import os
import random
import sys
import threading
from pathlib import Path

import torch

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.latents import Settings, encode_images

sys.path.insert(0, str(Path(__file__).parents[1]))
from forks import die_at_sync, kill

model, images, folder, kills, seed = sys.argv[1:]
folder = Path(folder)
torch.set_num_threads(1)
random = random.Random(int(seed))


def start(writes=None, die_after=None, workers=0):
    """Forks a run, which kills itself after its flush number `writes` + 1 to the disk, or `die_after` seconds after its
    first renaming of a file."""
    child = os.fork()
    if child:
        return child
    if writes is not None:
        die_at_sync(writes)
    if die_after is not None:
        replace, timer = os.replace, threading.Timer(die_after, kill)

        def start_timer(source, target):
            replace(source, target)
            if not timer.ident:
                timer.start()

        os.replace = start_timer
    status = 1
    try:
        encode_images(
            LiteVAE.from_pretrained(model),
            open_images(images),
            folder,
            Settings(32, "fp32", mirror=True, shard_size=2),
            batch_size=2,
            workers=workers,
            max_bad_fraction=0.1,
        )
        status = 0
    finally:
        os._exit(status)


for number in range(int(kills)):
    # a shard takes three flushes
    when = {"writes": random.randrange(6)} if number % 2 else {"die_after": random.uniform(0, 0.02)}
    _, status = os.waitpid(start(**when, workers=number % 4 // 2), 0)
    if not os.WIFSIGNALED(status):  # the run had ended before
        break
    print("killed at", *sorted(path.name for path in folder.iterdir()), flush=True)
_, status = os.waitpid(start(), 0)
assert status == 0
