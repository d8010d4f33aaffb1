"""Child processes, some of which are killed, for the scripts that tests start by path.

Importing PyTorch takes seconds. The children are therefore forks of the script's process, which computes nothing
itself.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence


def run_jobs(jobs: Sequence[Sequence], work: Callable) -> None:
    """Runs the jobs one after the other, each in its own number of processes.

    Each process of a job calls `work(rank, *arguments)`. "JOB RANK STATUS" is printed when a process ends; the result
    of `work`, if any, or its exception goes to stderr.

    Args:
        jobs: Per job the number of processes, followed by the arguments of `work`.
        work: Function to call.
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
            status, result = 1, None
            try:
                result = work(rank, *arguments)
                status = 0
            except BaseException as error:
                result = repr(error)
            finally:
                if result is not None:
                    os.write(sys.stderr.fileno(), f"job {job}, rank {rank}: {result}\n".encode())
                os._exit(status)
        while children:
            child, status = os.wait()
            print(job, children.pop(child), os.waitstatus_to_exitcode(status), flush=True)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_sync(writes: int) -> None:
    """Makes this process kill itself after its flush number `writes` + 1 to the disk."""
    sync, count = os.fsync, iter(range(writes))

    def fsync(descriptor):
        sync(descriptor)
        if next(count, None) is None:
            kill()

    os.fsync = fsync
