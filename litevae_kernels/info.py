"""Reports the build, and what serves each operator and dtype: ``python -m litevae_kernels.info``."""

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence

import torch

from litevae_kernels import backend
from litevae_kernels.backend import core
from litevae_kernels.core_interface import OPERATORS
from litevae_kernels.group_norm_silu import native

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe_backend(device_type: str, _: torch.dtype) -> str:
    try:
        return backend.choose(device_type)
    except RuntimeError:
        return f"none, because {backend.forced_backend()} is forced"


def _describe_isa() -> str:
    assert core is not None
    best = core.isas[-1]
    return best if core.isa() == best else f"{core.isa()}   (this CPU has {best}; LITEVAE_CPU_ISA lowers it)"


def report() -> list[tuple[str, str]]:
    """Returns rows of (subject, value): the versions, the build, the machine and the environment variables."""
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
        rows.append(("CPU instruction set", _describe_isa()))
        cuda = f"CUDA {core.cuda_version} for {core.cuda_architectures}" if core.cuda_version else ""
        rows.append(("CUDA kernels", cuda or f"not built: {core.cuda_reason}"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("GPUs", ", ".join(gpus) or "none visible to torch"))
    rows.append(("norms in clusters", native.describe_clusters()))
    for variable in ("LITEVAE_BACKEND", "LITEVAE_CPU_ISA", "LITEVAE_GPU_CONV", "LITEVAE_GPU_NORM"):
        rows.append((variable, os.environ.get(variable) or "not set"))
    return rows


def served() -> list[tuple[str, str, str, str]]:
    """Returns rows of (device, operator, dtypes, what serves them), with one row for all dtypes that agree.

    An operator whose package has a function ``describe_backend(device_type, dtype)`` says itself what serves it.
    """
    rows = []
    for device_type in DEVICES:
        for operator in OPERATORS:
            package = importlib.import_module(f"litevae_kernels.{operator}")
            describe = getattr(package, "describe_backend", _describe_backend)
            dtypes: dict[str, list[str]] = {}
            for dtype in DTYPES:
                dtypes.setdefault(describe(device_type, dtype), []).append(str(dtype).removeprefix("torch."))
            for description, names in dtypes.items():
                rows.append(
                    (device_type, operator, "all" if len(dtypes) == 1 else ", ".join(names), description)
                )
    return rows


def reasons() -> list[tuple[str, str]]:
    """Returns rows of (device and backend, why the backend does not serve the device)."""
    return [
        (f"{device_type}, not {name}", reason)
        for device_type in DEVICES
        for name in backend.BACKENDS
        if (reason := backend.why_not(name, device_type)) is not None
    ]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows with aligned columns; a cell of the first two that repeats the one above stays empty."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    above: Sequence[str] = ()
    for row in rows:
        same = next((i for i, (a, b) in enumerate(zip(row, above, strict=False)) if a != b), 0)
        cells = ["" if i < same else cell for i, cell in enumerate(row)]
        print("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
        above = row


if __name__ == "__main__":
    print_table(report())
    print()
    print_table([("device", "operator", "dtypes", "served by"), *served()])
    if found := reasons():
        print()
        print_table(found)
