"""What was built and what serves a call: ``python -m litevae_kernels.info``."""

import importlib.metadata
import os
import platform

import torch

from litevae_kernels import backend
from litevae_kernels.backend import core
from litevae_kernels.conv3x3 import WHY_NOT as WHY_NO_CONV3X3

OPERATORS = ("haar", "group_norm_silu", "smc")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _serves(device_type: str) -> str:
    try:
        chosen = backend.choose(device_type)
    except RuntimeError as error:
        return f"none: {error}"
    reasons = [
        f"{name}: {reason}"
        for name in backend.BACKENDS
        if (reason := backend.why_not(name, device_type)) is not None
    ]
    return chosen + (f"   (not {'; not '.join(reasons)})" if reasons else "")


def report() -> list[tuple[str, str]]:
    """Rows of (what, value): versions, the build, the instruction set, and each operator's backends."""
    rows = [
        ("litevae", _version("litevae")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
        ("triton", _version("triton")),
    ]
    if core is None:
        rows.append(("core", f"not loaded: {backend.core_error}"))
    else:
        threads = "OpenMP" if core.openmp else "no OpenMP: one thread"
        rows.append(("core", f"built with {core.compiler}, {threads}"))
        rows.append(("CPU instruction set", core.isa()))
        cuda = f"CUDA {core.cuda_version} for {core.cuda_architectures}" if core.cuda_version else ""
        rows.append(("CUDA kernels", cuda or f"not built: {core.cuda_reason}"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("GPUs", ", ".join(gpus) or "none visible to torch"))
    rows.append(("LITEVAE_BACKEND", os.environ.get("LITEVAE_BACKEND", "not set")))
    for operator in OPERATORS:
        rows.append((f"{operator} on cpu", _serves("cpu")))
        rows.append((f"{operator} on cuda", _serves("cuda") + ("" if gpus else "   (no GPU here)")))
    served = "PyTorch's"
    if WHY_NO_CONV3X3 is not None:
        served += f"   (not native: {WHY_NO_CONV3X3})"
    elif _serves("cpu").startswith("native"):
        served = "native for bfloat16, else PyTorch's"
    rows.append(("conv3x3 on cpu", served))
    rows.append(("conv3x3 on cuda", "PyTorch's"))
    return rows


if __name__ == "__main__":
    for name, value in report():
        print(f"{name:20} {value}")
