"""The machine's memory: what it has, and messages for requests that exceed it."""

import contextlib
import re
import sys
from pathlib import Path

import psutil

from litevae.errors import UserError

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, 1

# Messages of allocators that fail: PyTorch's for the CPU, PyTorch's for a size above 2^63, and NumPy's.
ASKED = re.compile(r"you tried to allocate (\d+) bytes|sizes=(\[[\d, ]+\])|Unable to allocate (\d\S* \w+)")


def total_memory() -> int:
    """Returns how many bytes this process may use at most: the machine's, or less in a container or under ulimit."""
    limits = [psutil.virtual_memory().total + psutil.swap_memory().total]
    for path in CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    address_space = address_space_limit()
    return min(limits if address_space is None else [*limits, address_space])


def address_space_limit() -> int | None:
    """Returns the bytes of address space that this process may have (`ulimit -v`); None without a limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def free_memory() -> int:
    """Returns how many bytes this process may still allocate: those that are free, or fewer under `ulimit -v`."""
    free = min(psutil.virtual_memory().available, total_memory())
    if (limit := address_space_limit()) is not None:  # it counts what is reserved, even if it is not used
        free = min(free, max(limit - psutil.Process().memory_info().vms, 0))
    return free


def format_bytes(count: int) -> str:
    """Returns a number of bytes in the largest unit in which it is 1 or more, such as "3.5 GiB"."""
    value, unit = float(count), 0
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {units[unit]}"


def check_memory(count: int, purpose: str) -> None:
    """Checks that the machine has `count` bytes.

    An operating system may grant more than there is and kill the process later, so a request whose size is known
    is checked before it is made.

    Args:
        count: bytes that are certainly needed.
        purpose: what they are for, such as "model: its weights", for the message.

    Raises:
        UserError: they exceed the memory of the machine.
    """
    total = total_memory()
    if count > total:
        needed, there = format_bytes(count), format_bytes(total)
        raise UserError(f"{purpose}: at least {needed} of memory needed, {there} there")


def check_batch(
    images: int, size: int, channels: int, device_type: str, name: str = "data.batch_size"
) -> None:
    """Checks that the machine has the memory for the largest activations of a batch, in 16 bits.

    A GPU's allocator, unlike the operating system's, refuses at once what does not fit.

    Args:
        images: images that are processed at a time.
        size: side of an image, or of its latent, in pixels.
        channels: channels of the activations at full size.
        device_type: type of the device that they are processed on.
        name: name of the setting, for the message.

    Raises:
        UserError: they exceed the memory of the machine.
    """
    if device_type == "cpu":
        check_memory(2 * images * size**2 * channels, f"{name}: {images} of {size} x {size} pixels at a time")


def explain_out_of_memory(error: BaseException) -> str | None:
    """Returns the message for an allocation that failed, or None if the error is another one."""
    text = str(error)
    if (
        type(error).__name__ == "OutOfMemoryError"
    ):  # PyTorch's for GPUs says what was asked for and what there is
        return f"{text.split('. If reserved')[0]}: use smaller batches, images or widths"
    asked = ASKED.search(text)
    if not isinstance(error, MemoryError) and not (asked and isinstance(error, RuntimeError)):
        return None
    wanted = "more memory than there is"
    if asked:
        count, sizes, amount = asked.groups()
        wanted = format_bytes(int(count)) if count else amount or f"a tensor of {sizes}"
        wanted = f"{wanted} at once"
    there = ""
    with contextlib.suppress(MemoryError, OSError):  # reading /proc takes memory too
        there = f"; {format_bytes(free_memory())} of {format_bytes(total_memory())} are free"
    return f"out of memory: asked for {wanted}{there}: use smaller batches, images or widths"
