"""The software versions and the device, which results are recorded with."""

import functools
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@functools.cache
def versions() -> str:
    """Returns the versions of litevae and PyTorch, with litevae's git commit if it runs from a repository."""
    try:
        own = version("litevae")
    except PackageNotFoundError:  # run from a source tree
        own = "not installed"
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = ""
    if (root / ".git").exists():  # and not a repository that contains the Python environment
        try:
            commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            commit = "unknown"
    return f"litevae {own}" + (f" (commit {commit})" if commit else "") + f", torch {torch.__version__}"


def device_name() -> str:
    """Returns the name of the GPU, or else the CPU's model and thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        model = found[1]
    count = torch.get_num_threads()
    return f"{model}, {count} thread{'s' * (count != 1)}"
