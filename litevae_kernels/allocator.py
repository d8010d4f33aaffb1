"""Memory settings for CPU users."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


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
