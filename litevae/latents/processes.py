"""The processes of `torchrun` that share a run, and the lock that keeps other runs out of its folder."""

import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from litevae.errors import UserError

T = TypeVar("T")

AHEAD = 2  # rounds that a process may be ahead of the slowest
# A process that dies is noticed at once, by its connections. One that is silent is at work: checking an encoded
# data set takes hours where it is large.
SILENCE = timedelta(days=1)
LOCK = ".lock"


class ProcessDied(ConnectionError):
    """Another process of the run has ended without a word."""


@contextmanager
def noticing_death() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's
        raise ProcessDied("another process of this run has died: the same command goes on") from error


class Processes:
    """The processes of a run, this one being number `index` of `count`; one, where there is no `torchrun`.

    They speak over gloo whatever device they have: all they exchange is a few numbers. All must make the same
    calls in the same order. A call raises `ProcessDied` when one of them has died.
    """

    def __init__(self) -> None:
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.group: Any = None
        if self.count > 1:
            with noticing_death():
                self.group = dist.new_group(backend="gloo", timeout=SILENCE)
        self.under_way: deque[tuple[torch.Tensor, Any]] = deque()

    def gather(self, value: T) -> list[T]:
        """Every process's value, by its number."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        with noticing_death():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def first_does(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises in the first process, in all.

        Raises:
            UserError, OSError: of the function.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.index == 0:
            try:
                result = function()
            except (UserError, OSError) as error:
                failure = error
        result, message = self.gather((result, error_message(failure)))[0]
        raise_first([message], failure)
        return result  # type: ignore[return-value]

    def add(self, numbers: Sequence[int]) -> list[int]:
        """The sums of each number over the processes, of a round that may lie up to `AHEAD` rounds back: zeros
        in the first of them. The same in all processes."""
        if self.group is None:
            return list(numbers)
        tensor = torch.tensor(numbers)
        with noticing_death():
            self.under_way.append((tensor, dist.all_reduce(tensor, group=self.group, async_op=True)))
        return self.next_sums() if len(self.under_way) > AHEAD else [0] * len(numbers)

    def next_sums(self) -> list[int]:
        tensor, work = self.under_way.popleft()
        with noticing_death():
            work.wait()
        sums: list[int] = tensor.tolist()
        return sums

    def finish(self) -> list[list[int]]:
        """The sums of the rounds that `add` has not yet returned."""
        return [self.next_sums() for _ in range(len(self.under_way))]

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)


ErrorMessage = tuple[str, str, str] | None  # an exception as other processes get it: kind, type and message


def error_message(failure: Exception | None) -> ErrorMessage:
    if failure is None:
        return None
    kind = next((each.__name__ for each in (UserError, OSError) if isinstance(failure, each)), "")
    return kind, type(failure).__name__, str(failure)


def raise_first(messages: Sequence[ErrorMessage], own: Exception | None) -> None:
    """Raises what has gone wrong in this process, or else in the first one that something went wrong in."""
    if own is not None:
        raise own
    for index, error in enumerate(messages):
        if error is not None:
            kind, name, message = error
            if kind == UserError.__name__:
                raise UserError(message)
            raise OSError(message if kind else f"process {index} failed: {name}: {message}")


@contextmanager
def locked(folder: Path, process: int = 0) -> Iterator[None]:
    """Keeps `folder` for one run, until the end of the context or of the process, whatever ends it.

    The lock is advisory, of POSIX: on the file .lock, which stays. Unlike one of `flock`, it is none of the worker
    processes', which outlive a killed run for seconds. The first process takes all bytes of it, and then lets go
    of all but byte 0; process number i takes byte i. So a new run has to wait for all processes of an old one.
    Where the file system or the system knows no such locks, a line on stderr says so.

    Args:
        process: number of this process. The others must come when the first one is in the context.

    Raises:
        UserError: another run has the folder.
        OSError: the file cannot be opened.
    """
    with open(folder / LOCK, "ab") as file:
        try:
            take(file.fileno(), process)
        except (OSError, ImportError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{folder}: another litevae encode is writing there: wait until it has ended, "
                    "or give another folder"
                ) from None
            if process == 0:
                reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
                print(
                    f"{folder}: cannot be locked here ({reason}): see that no other run writes there",
                    file=sys.stderr,
                )
        yield


def take(descriptor: int, process: int) -> None:
    import fcntl  # not on Windows

    if process:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, process)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, 1)
