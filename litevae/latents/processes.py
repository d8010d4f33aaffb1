"""Communication between the processes of `torchrun` that share an encoding run."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from litevae.errors import UserError

T = TypeVar("T")

MAX_ROUNDS_AHEAD = 2  # rounds that a process may be ahead of the slowest
# The death of a process closes its connections, which is noticed at once. A silent process is busy: checking a large
# encoded data set takes hours.
TIMEOUT = timedelta(days=1)


class ProcessDied(ConnectionError):
    """Another process of the run has ended without reporting an error."""


@contextmanager
def noticing_death() -> Iterator[None]:
    """Converts gloo's errors to `ProcessDied`."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessDied(
            "another process of this run has died: run the same command again to continue"
        ) from error


class Processes:
    """The processes of a run; this one has number `index` of `count`. Without `torchrun` there is one.

    They communicate over gloo on any device, because they exchange only a few numbers. All processes must make the
    same calls in the same order. A call raises `ProcessDied` when one of them has died.
    """

    def __init__(self) -> None:
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.group: Any = None
        if self.count > 1:
            with noticing_death():
                self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.pending: deque[tuple[torch.Tensor, Any]] = deque()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, by their numbers."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        with noticing_death():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def first_does(self, function: Callable[[], T]) -> T:
        """Calls `function` in the first process; all processes return its result or raise its error.

        Raises:
            UserError, OSError: `function` raises it.
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
        """Adds up each number over the processes, without waiting for the slowest one.

        Returns:
            The sums of the round that lies `MAX_ROUNDS_AHEAD` rounds back, which are the same in all processes; zeros
            in the first rounds. A single process gets its own numbers at once.
        """
        if self.group is None:
            return list(numbers)
        tensor = torch.tensor(numbers)
        with noticing_death():
            self.pending.append((tensor, dist.all_reduce(tensor, group=self.group, async_op=True)))
        return self.next_sums() if len(self.pending) > MAX_ROUNDS_AHEAD else [0] * len(numbers)

    def next_sums(self) -> list[int]:
        """Waits for the oldest pending round and returns its sums."""
        tensor, work = self.pending.popleft()
        with noticing_death():
            work.wait()
        sums: list[int] = tensor.tolist()
        return sums

    def finish(self) -> list[list[int]]:
        """Returns the sums of the rounds that `add` has not returned yet."""
        return [self.next_sums() for _ in range(len(self.pending))]

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)


ErrorMessage = tuple[str, str, str] | None  # kind, type and message of an exception, for other processes


def error_message(failure: Exception | None) -> ErrorMessage:
    """Describes an exception for `raise_first` in other processes."""
    if failure is None:
        return None
    kind = next((each.__name__ for each in (UserError, OSError) if isinstance(failure, each)), "")
    return kind, type(failure).__name__, str(failure)


def raise_first(messages: Sequence[ErrorMessage], own: Exception | None) -> None:
    """Raises this process's own error, or else that of the first process that has one.

    Raises:
        UserError, OSError: the process failed with such an error; `OSError` stands for all other types.
    """
    if own is not None:
        raise own
    for index, error in enumerate(messages):
        if error is not None:
            kind, name, message = error
            if kind == UserError.__name__:
                raise UserError(message)
            raise OSError(message if kind else f"process {index} failed: {name}: {message}")
