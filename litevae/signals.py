"""Signal handling: a run ends early but cleanly, and its worker processes end with it."""

import os
import signal
import threading
from typing import Any, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Records SIGINT and SIGTERM, so that a loop can end after its current step. A second signal ends the process.

    Attributes:
        signal: name of the signal that was received, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            self._previous = {s: signal.signal(s, self._record) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number).name
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def obey_parent_only(_: int) -> None:
    """Makes a worker process ignore SIGINT, and every SIGTERM but its parent's.

    Ctrl-C and some schedulers signal the workers as well, which have to go on until the run ends. This is a
    `worker_init_fn` for a `DataLoader`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where any SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_on_parent_signal, daemon=True).start()


def exit_on_parent_signal() -> None:
    """Exits on a SIGTERM from the parent, which sends one on its own exit and then waits for its workers."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
