"""Trains in several processes with gloo, and prints what `forks.run_jobs` prints.

The argument is a JSON list of jobs. A job is a list of the number of processes, the event of the second process at
step 2 ("dies", "nan", "term", "bad" or ""), and the settings.
"""

import json
import signal
import sys
from pathlib import Path

import torch

import litevae.training.trainer as trainer_module
from litevae.training import load_config, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from forks import kill, run_jobs

torch.set_num_threads(1)


def work(rank, event, settings):
    """Trains in one process."""
    update, finish = trainer_module.Trainer.update, trainer_module.Trainer.finish

    def update_with_event(self, batch, step, stop):
        if step == 2 and rank == 1:
            if event == "dies":
                kill()
            elif event == "term":
                signal.raise_signal(signal.SIGTERM)
            elif event == "bad":  # an unreadable image is found before step 3, and none is allowed
                bad_images, add = self.data.bad_images, self.data.bad_images.add
                bad_images.add = lambda _: add([("cut.png", "cut")])
            elif event == "nan":
                batch = batch.float().fill_(torch.nan)
        return update(self, batch, step, stop)

    def finish_and_save(self, *arguments):  # each process saves its weights, so that a test can compare them
        result = finish(self, *arguments)
        torch.save(self.model.state_dict(), self.output_dir / f"rank{rank}.pt")
        return result

    trainer_module.Trainer.update = update_with_event
    trainer_module.Trainer.finish = finish_and_save
    train(load_config("demo", settings))


run_jobs(json.loads(sys.argv[1]), work)
