"""Reports the build and the backend that serves each operator: ``python -m litevae_kernels.info``."""

import importlib
import importlib.metadata
import os
import platform

import torch

from litevae_kernels import backend
from litevae_kernels.backend import core
from litevae_kernels.core_interface import OPERATORS


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe_backend(device_type: str) -> str:
    try:
        chosen = backend.choose(device_type)
    except RuntimeError as error:
        return f"none: {error}"
    reasons = [
        f"not {name}: {reason}"
        for name in backend.BACKENDS
        if (reason := backend.why_not(name, device_type)) is not None
    ]
    return chosen + (f"   ({'; '.join(reasons)})" if reasons else "")


def report() -> list[tuple[str, str]]:
    """Returns rows of (subject, value): versions, the build, the instruction set, and each operator's backends.

    An operator whose package has a function ``describe_backend(device_type)`` describes its backend itself.
    """
    rows = [
        ("litevae", _version("litevae")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
        ("triton", _version("triton")),
    ]
    if core is None:
        rows.append(("core", f"not loaded: {backend.core_error}"))
    else:
        threads = "OpenMP" if core.openmp else "no OpenMP (one thread)"
        rows.append(("core", f"built with {core.compiler}, {threads}"))
        rows.append(("CPU instruction set", core.isa()))
        cuda = f"CUDA {core.cuda_version} for {core.cuda_architectures}" if core.cuda_version else ""
        rows.append(("CUDA kernels", cuda or f"not built: {core.cuda_reason}"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("GPUs", ", ".join(gpus) or "none visible to torch"))
    rows.append(("LITEVAE_BACKEND", os.environ.get("LITEVAE_BACKEND", "not set")))
    for operator in OPERATORS:
        package = importlib.import_module(f"litevae_kernels.{operator}")
        describe = getattr(package, "describe_backend", _describe_backend)
        rows.append((f"{operator} on cpu", describe("cpu")))
        rows.append(
            (f"{operator} on cuda", describe("cuda") + ("" if gpus else "   (no GPU on this machine)"))
        )
    return rows


if __name__ == "__main__":
    rows = report()
    width = max(len(subject) for subject, _ in rows)
    for subject, value in rows:
        print(f"{subject:{width}}  {value}")
