"""Memory on the CPU: a setting of the C library, and the peak of a call."""

import ctypes
import gc
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory in the process instead of returning it to the kernel.

    By default, glibc maps memory for each large block and unmaps it when the block is freed. The page faults cost
    PyTorch models on the CPU 10 to 40% of their time. In return, the process keeps its peak memory, and a block that
    is still in use also holds on to freed ones below it. The setting applies to the whole process and
    cannot be undone.

    Returns:
        Whether the settings took effect: False if the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**30))
    accepted = [mallopt(name, value) for name, value in settings]  # Apply all, even if one is refused.
    return all(result == 1 for result in accepted)


def peak_resident_memory(function: Callable[[], Any]) -> int | None:
    """Returns the number of bytes by which a call makes the process grow at its peak.

    The call runs in its own thread, whose heap has no free memory, and every large block is mapped separately
    during the call. In memory that the process has kept, the same call would grow it by up to three times as much,
    and differently each time, because of the gaps between blocks. The thread inherits the modes of autograd, and
    no other settings that PyTorch keeps per thread. Afterwards `keep_freed_memory` is in force.

    Args:
        function: the call.

    Returns:
        The peak, or None if the operating system does not report it.
    """
    import torch

    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        peak.write_text("5")  # On Linux, this resets VmHWM.
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
            torch.ones(2**20).add_(1)  # Starts the thread's pool of workers.
            # The heap may be that of a thread that has ended, and the memory that it freed would hide a peak.
            # Freeing a block of this size at the end of the heap returns all of it.
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
