"""The software versions, the device and its precision, which are recorded with results."""

import functools
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae_kernels import arithmetic

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def choose_precision(precision: str, device: torch.device, has_range: bool = False) -> str:
    """Returns the precision to compute in.

    The first time that "bf16" or "fp16" is asked for on a CPU without its arithmetic, a line on stderr says what it
    costs.

    Args:
        precision: "fp32", "bf16", "fp16", or "auto", which is "bf16" on a GPU with bfloat16 tensor cores (compute
            capability 8.0 or above) and on a CPU with AVX512-BF16, AMX-BF16 or Arm's BF16, otherwise "fp32".
        device: device to compute on.
        has_range: whether the images have a range of values. bfloat16 has 8 significant bits, and would round them:
            "auto" is then "fp32".
    """
    if precision == "auto":
        return "bf16" if not has_range and multiplies("bf16", device) else "fp32"
    if device.type == "cpu" and not multiplies(precision, device):
        _warn_emulated(precision)
    return precision


def multiplies(precision: str, device: torch.device) -> bool:
    """Returns whether the hardware of `device` multiplies numbers of a precision.

    An instruction set lowered by LITEVAE_CPU_ISA stands for a CPU with nothing better.
    """
    if device.type == "cuda":
        return (
            precision != "bf16"
            or torch.cuda.get_device_capability(device) >= (8, 0)
            or bool(torch.version.hip)
        )
    return device.type == "cpu" and arithmetic.multiplies(DTYPES[precision], arithmetic.current_isa())


@functools.cache
def _warn_emulated(precision: str) -> None:
    if int(os.environ.get("RANK", "0")):  # only the first process prints
        return
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    tqdm.write(
        f"precision {precision}: this CPU has no {dtype} arithmetic. The model computes in float32 and rounds the "
        "results, so it is no faster than fp32; layers of other libraries emulate it and are many times slower.",
        file=sys.stderr,
    )
