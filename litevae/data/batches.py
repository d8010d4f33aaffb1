"""Iteration over a data loader, with one clear error for a worker process that dies."""

import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any, Self

from torch.utils.data import DataLoader

from litevae.errors import WorkerDied


class Batches:
    """An iterator over the batches of `loader`, whose workers start at once.

    PyTorch reports the death of a worker from a handler of SIGCHLD, which raises an error wherever the main thread
    happens to be, even halfway through an update of the weights. Here the handler is not used. The death is
    noticed while a batch is waited for, after 5 seconds at most.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        self.loader = loader
        self.batches: Iterator[Any] = iter(loader)
        if in_main_thread and before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """Returns the next batch.

        Raises:
            WorkerDied: a worker was killed, or crashed.
            StopIteration: there are no more batches.
        """
        try:
            return next(self.batches)
        except (RuntimeError, OSError, EOFError) as error:
            # A connection to a worker that is being killed may break a moment before the worker has ended.
            death = self.find_death(seconds=0 if isinstance(error, RuntimeError) else 1)
            if death is None:  # an exception that code in the worker has raised
                raise
            raise WorkerDied(death) from None

    def find_death(self, seconds: float) -> str | None:
        """Describes a worker that ends within some seconds, or returns None."""
        workers = {worker.sentinel: worker for worker in getattr(self.batches, "_workers", ())}
        for sentinel in wait(list(workers), seconds):
            worker = workers[sentinel]
            worker.join()
            how = f"exited with status {worker.exitcode}"
            if worker.exitcode < 0:
                how = f"was killed by {signal.Signals(-worker.exitcode).name}"
            return f"a process that reads data (process {worker.pid}) {how}; if memory ran out, use fewer workers"
        return None
