"""Trains in child processes that are killed.

The arguments are the output folder, the number of kills, a seed and the settings.

Importing PyTorch takes seconds, so the children are forks of this process, which computes nothing itself.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import skimage.data
import torch

from litevae.training import load_config, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from forks import die_at_sync

folder, kills, seed, *settings = sys.argv[1:]
log = Path(folder) / "metrics.jsonl"
torch.set_num_threads(1)
skimage.data.chelsea()


def count_lines():
    return log.read_bytes().count(b"\n") if log.exists() else 0


def start(writes=None):
    """Forks a run, which kills itself after `writes` writes to the disk unless that is None; returns its PID."""
    child = os.fork()
    if child:
        return child
    if writes is not None:
        die_at_sync(writes)
    status = 1
    try:
        train(load_config("demo", [*settings, f"output_dir={folder}", "resume=auto"]))
        status = 0
    finally:
        os._exit(status)


random = random.Random(int(seed))
for number in range(int(kills)):
    if number % 2:
        child = start(random.randrange(30))  # a checkpoint takes about 10 writes
    else:
        before, wanted = count_lines(), random.randrange(3)
        child = start()
        while count_lines() < before + wanted and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run ended before it could be killed"
    print(
        "killed at",
        count_lines(),
        *sorted(path.name for path in log.parent.glob("checkpoints/*")),
        flush=True,
    )
_, status = os.waitpid(start(), 0)
assert status == 0
