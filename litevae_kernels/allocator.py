"""Memory of CPU users: settings, and the peak of a call."""

import ctypes
import gc
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory in the process instead of returning it to the kernel.

    By default glibc maps each large block anew and unmaps it when freed; the page faults cost PyTorch models
    on the CPU 10 to 40% of their time. The price is that the process holds on to its peak memory, and a block
    that is still in use can keep the ones below it. Acts on the whole process and cannot be undone.

    Returns:
        Whether the settings took effect: False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**30))
    accepted = [mallopt(name, value) for name, value in settings]  # all of them, even if one is refused
    return all(result == 1 for result in accepted)


def peak_resident_memory(function: Callable[[], Any]) -> int | None:
    """By how many bytes a call makes the process grow at most; None where the kernel does not tell.

    The call runs in a thread of its own, whose heap has no free memory, and large blocks are mapped each on its own
    meanwhile. Among the memory that a process has kept, the same call would grow it by up to three
    times as much, differently each time, for the gaps between blocks. Of PyTorch's settings that a thread has for
    itself, the call gets the modes of autograd. Afterwards `keep_freed_memory` is in force.
    """
    import torch

    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        peak.write_text("5")  # Linux: VmHWM starts again from here
        for setting, value in (
            (_M_MMAP_THRESHOLD, 2**17),
            (_M_MMAP_MAX, 2**16),
            (_M_TOP_PAD, 0),
            (_M_TRIM_THRESHOLD, 0),
        ):
            libc.mallopt(setting, value)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    except (OSError, AttributeError):
        return None

    def kilobytes(field: str) -> int:
        return int(re.findall(rf"{field}:\s+(\d+) kB", status.read_text())[0])

    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run() -> int:
        with torch.inference_mode(modes[0]), torch.set_grad_enabled(modes[1]):
            torch.ones(2**20).add_(1)  # starts the thread's team of workers
            # The heap may be that of a thread that has ended, and what that one has freed would hide a peak: freeing
            # a block of this size at its end returns it all.
            libc.free(libc.malloc(2**16))
            peak.write_text("5")
            before = kilobytes("VmRSS")
            function()
            return max(0, kilobytes("VmHWM") - before) * 1024

    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(run).result()
    finally:
        keep_freed_memory()
