"""The lock of an output folder: one run at a time writes there."""

import errno
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from litevae.errors import UserError
from litevae.files import NO_FOLLOW, make_folder

LOCK = ".lock"


@contextmanager
def locked(folder: Path, command: str, process: int = 0) -> Iterator[None]:
    """Locks `folder` for one run until the context or the process ends.

    The lock is an advisory POSIX lock on the file .lock, which remains in the folder. Unlike a lock of `flock`, it is
    not inherited by worker processes, which outlive a killed run for seconds. The first process locks all bytes of the
    file, and then releases all but byte 0; process i locks byte i. A new run therefore waits for all processes of an
    old one. While the folder is locked, the file names the command, the first process, its host and the time. If the
    system or the file system does not support such locks, a line on stderr says so.

    Args:
        folder: folder to lock.
        command: name of the command, such as "litevae encode", for the message that another run gets.
        process: number of this process. The others must enter after the first one.

    Raises:
        UserError: another run has locked the folder; the message names it.
        OSError: the file cannot be opened, or is a link or another special file.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:  # planted by others
            raise OSError(errno.EINVAL, f"{LOCK} is not a file of its own", str(folder))
        try:
            lock_file(descriptor, process)
            if process == 0:
                since = datetime.now().astimezone().isoformat(" ", "seconds")
                holder = f"{command} (process {os.getpid()} on {socket.gethostname()}, since {since})"
                file.truncate(0)
                file.write(holder.encode())
        except (OSError, ImportError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EAGAIN):
                holder = " ".join(file.read(200).decode(errors="replace").split()) or "another run"
                raise UserError(
                    f"{folder}: {holder} is writing there: wait until it has ended, or give another folder"
                ) from None
            if process == 0:
                reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
                print(
                    f"{folder}: cannot be locked here ({reason}): make sure that no other run writes there",
                    file=sys.stderr,
                )
        try:
            yield
        finally:
            if process == 0:
                file.truncate(0)


@contextmanager
def locked_by_run(folder: Path, command: str, prepare: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Creates `folder` and locks it for all processes of a run until the context ends.

    The first process goes ahead; the others raise its error.

    Args:
        folder: folder to create and to lock.
        command: name of the command, for the message that another run gets.
        prepare: function that the first process calls when it has the lock.

    Raises:
        UserError: files cannot be written to the folder, another run has locked it, or `prepare` raises it.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    with ExitStack() as until_end:
        failure: list[UserError | None] = [None]
        try:
            if state.is_main_process:
                make_writable(folder)
                until_end.enter_context(locked(folder, command))
                prepare()
        except OSError as error:
            failure = [UserError(f"cannot write to {folder}: {error.strerror}")]
        except UserError as error:
            failure = [error]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]
        if not state.is_main_process:
            make_writable(folder)  # on a computer that does not share it
            until_end.enter_context(locked(folder, command, state.process_index))
        yield


def make_writable(folder: Path) -> None:
    """Creates a folder; raises OSError if that is not possible, or if files cannot be written there."""
    make_folder(folder)
    with tempfile.TemporaryFile(dir=folder):
        pass


def lock_file(descriptor: int, process: int) -> None:
    """Takes the lock of process number `process`, as `locked` describes; `ImportError` on Windows."""
    import fcntl

    if process:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, process)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, 1)
