import os
import signal

import pytest
from torch.utils.data import DataLoader, Dataset

from litevae.data.batches import Batches
from litevae.errors import UserError, WorkerDied


class Numbers(Dataset):
    """Items 0 to 9, with an event when item 3 is read."""

    def __init__(self, event):
        self.event = event

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 3:
            self.event()
        return index


def load(event, workers):
    return Batches(DataLoader(Numbers(event), 2, num_workers=workers, collate_fn=list))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise UserError("no such item")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_loader(workers):
    batches = load(lambda: None, workers)
    assert len(batches) == 5
    assert list(batches) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_a_worker_that_is_killed_raises_one_line_where_its_batch_is_waited_for():
    handler = signal.getsignal(signal.SIGCHLD)
    batches = load(kill, workers=1)
    assert signal.getsignal(signal.SIGCHLD) is handler
    with pytest.raises(WorkerDied) as caught:
        list(batches)
    assert "was killed by SIGKILL; if memory ran out, use fewer workers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_in_a_worker_keeps_its_type():
    batches = load(fail, workers=1)
    next(batches)
    with pytest.raises(UserError, match="no such item"):
        next(batches)
