"""For the scripts that tests start by path: child processes, some of which are to die.

Importing PyTorch takes seconds, so they are forks of the script's process, which computes nothing itself.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence


def run_jobs(jobs: Sequence[Sequence], work: Callable) -> None:
    """Each job, one after the other, in its number of processes; `work(rank, *rest of the job)` in each of them.

    Prints "JOB RANK STATUS" as each of them ends, and what `work` returns, if anything, or raises on stderr.
    """
    for job, (count, *arguments) in enumerate(jobs):
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
            status, told = 1, None
            try:
                told = work(rank, *arguments)
                status = 0
            except BaseException as error:
                told = repr(error)
            finally:
                if told is not None:
                    os.write(sys.stderr.fileno(), f"job {job}, rank {rank}: {told}\n".encode())
                os._exit(status)
        while children:
            child, status = os.wait()
            print(job, children.pop(child), os.waitstatus_to_exitcode(status), flush=True)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_sync(writes: int) -> None:
    """This process kills itself when it has written through to the disk so many times."""
    sync, count = os.fsync, iter(range(writes))

    def fsync(descriptor):
        sync(descriptor)
        if next(count, None) is None:
            kill()

    os.fsync = fsync
