import os
import platform
import subprocess
import sys

# This runs in its own process, because the setting cannot be undone.
CODE = """
import resource, sys
import torch
from litevae_kernels.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16_000_000).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(10):
    faults()
# An aligned block does not always fit where the previous one was, but after some calls it does.
print(min(faults() for _ in range(10)))
"""


def run(argument: str) -> list[str]:
    command = [sys.executable, "-c", CODE, argument]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_keep_freed_memory():
    kept, faults = run("keep")
    if platform.libc_ver()[0] != "glibc":
        assert kept == "False"
        return
    assert kept == "True"
    assert int(faults) < 100
    # By default, each call has a page fault per 4 KB of its 64 MB, or fewer with huge pages.
    assert int(run("default")[1]) > int(faults)


PEAK = """
from threading import Thread
import torch
from litevae_kernels.allocator import keep_freed_memory, peak_resident_memory
keep_freed_memory()
torch.ones(40_000_000).sum()
# A thread that ends leaves its heap, including freed memory, to the next thread.
def hold_and_free():
    blocks = [torch.ones(size) for size in (4_000_000, 2_000_000, 1_000_000)]
thread = Thread(target=hold_and_free)
thread.start()
thread.join()
print(peak_resident_memory(lambda: torch.ones(2_000_000).sum()))
print(peak_resident_memory(lambda: torch.ones(16_000_000).sum()))
"""


def test_peak_is_what_a_call_allocates():
    peaks = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True
    ).stdout.split()
    if platform.libc_ver()[0] != "glibc" or not os.access("/proc/self/clear_refs", os.W_OK):
        assert peaks == ["None", "None"]
        return
    # Linux counts the pages of a process in batches of a few dozen per core.
    assert 7e6 < int(peaks[0]) < 10e6
    assert 63e6 < int(peaks[1]) < 66e6
