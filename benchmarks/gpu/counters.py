"""The kernels whose hardware counters Nsight Compute (ncu) reads, and the readings from its table.

``python -m benchmarks.gpu.counters cuda`` launches each kernel once on a GPU, with the sizes of LiteVAE-B's largest
layers; ``cpu`` makes the same calls on tiny tensors. The names below are those of ncu's sections.
"""

import csv
import io
import re
import sys

import torch

from litevae_kernels import group_norm_silu, haar_pyramid, modulate_weight

METRICS = {
    "Duration": "time",
    "Memory Throughput": "memory throughput",
    "DRAM Throughput": "DRAM throughput",
    "Issue Slots Busy": "issue slots busy",
    "Issued Warp Per Scheduler": "warps issued per cycle and scheduler",
    "One or More Eligible": "cycles with an eligible warp",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers per thread",
}


def launch(device: str) -> None:
    """Calls the operators, and the gradient of one."""
    images, channels, size = (16, 96, 128) if device == "cuda" else (1, 32, 4)
    channels_last, low = torch.channels_last, torch.bfloat16
    x = (
        torch.randn(images, channels, size, size, device=device)
        .to(low)
        .contiguous(memory_format=channels_last)
    )
    x.requires_grad_()
    torch.autograd.grad(group_norm_silu(x, 32), x, torch.randn_like(x))
    image = torch.randn(images, 3, 2 * size, 2 * size, device=device)
    haar_pyramid(image)
    haar_pyramid(image, dtype=low, memory_format=channels_last)
    width = 5 * channels
    weight, scale = torch.randn(width, width, 3, 3, device=device), torch.ones(width, device=device)
    modulate_weight(weight, scale, dtype=low, memory_format=channels_last)


def readings(output: str) -> list[dict[str, str]]:
    """Returns the readings of `METRICS` for each launch in ncu's output (--csv --page details)."""
    lines = output.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        return []
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[starts[0] :]))):
        metric = METRICS.get(row.get("Metric Name") or "")
        if metric is not None:
            launch = launches.setdefault(row["ID"], {"kernel": short_name(row["Kernel Name"])})
            launch[metric] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())


def short_name(kernel: str) -> str:
    """Returns a kernel's demangled name without namespaces and parameters."""
    plain = re.sub(
        r"\(anonymous namespace\)::|<unnamed>::|\b(litevae|haar|group_norm_silu|smc)::", "", kernel
    )
    return plain.partition("(")[0].strip()[:100]


if __name__ == "__main__":
    launch(sys.argv[1])
