"""Trains in several processes with gloo. The argument: a JSON list of jobs, each a list of how many processes,
what happens to the second at step 2 ("dies", "nan", "term", "bad" or nothing), and the settings.

Prints "JOB RANK STATUS" as each of them ends. Importing PyTorch takes seconds, so they are forks of this
process, which computes nothing itself.
"""

import json
import os
import signal
import socket
import sys

import torch

import litevae.training.trainer as trainer_module
from litevae.training import load_config, train

torch.set_num_threads(1)


def work(rank, event, settings):
    """The run of one process."""
    update, finish = trainer_module.Trainer.update, trainer_module.Trainer.finish

    def update_or_else(self, batch, step, stop):
        if step == 2 and rank == 1:
            if event == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            elif event == "term":
                signal.raise_signal(signal.SIGTERM)
            elif event == "bad":  # finds an image before step 3 that cannot be read; none may
                bad_images, add = self.feed.bad_images, self.feed.bad_images.add
                bad_images.add = lambda _: add([("cut.png", "cut")])
            elif event == "nan":
                batch = batch.float().fill_(torch.nan)
        return update(self, batch, step, stop)

    def finish_and_save(self, *arguments):  # each of them shows its weights, not only the one that saves
        result = finish(self, *arguments)
        torch.save(self.model.state_dict(), self.output_dir / f"rank{rank}.pt")
        return result

    trainer_module.Trainer.update = update_or_else
    trainer_module.Trainer.finish = finish_and_save
    train(load_config("demo", settings))


for job, (count, event, settings) in enumerate(json.loads(sys.argv[1])):
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
            work(rank, event, settings)
            status = 0
        except BaseException as error:
            print(f"job {job}, rank {rank}: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    while children:
        child, status = os.wait()
        print(job, children.pop(child), os.waitstatus_to_exitcode(status), flush=True)
