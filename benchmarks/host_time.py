"""The host's time per call of each public operator, in inference mode and on tensors that take no time to compute.

On a GPU, a model of many small calls waits for the host: for Python, PyTorch's dispatch, and the checks of the
arguments. ``python -m benchmarks.host_time`` measures that time on this machine, on a CPU with the computation of a few
numbers included, on a GPU by queueing calls without waiting for them.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from litevae_kernels import (
    conv3x3,
    group_norm_silu,
    haar_dwt2d,
    haar_idwt2d,
    haar_pyramid,
    modulate_weight,
    self_modulated_conv2d,
    wavedec2,
    waverec2,
)

CALLS = 100  # per measurement; fewer than a GPU's queue holds
ROUNDS = 60
PYTORCH = "PyTorch: "  # beginning of the names of PyTorch's own operators


def make_calls(device: str) -> dict[str, Callable[[], object]]:
    """Returns a call of each operator, and of PyTorch's operators that would replace it, by name."""
    channels_last = torch.channels_last

    def tensor(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, device=device)
        return x.contiguous(memory_format=channels_last) if len(shape) == 4 else x

    image, x, weight = tensor(1, 3, 8, 8), tensor(1, 4, 2, 2), tensor(4, 4, 3, 3)
    scale, gain, bias = tensor(4), tensor(1), tensor(4)
    coeffs = tensor(1, 12, 4, 4)
    both = tensor(8)
    decomposition = wavedec2(image, 1)
    return {
        "haar_dwt2d": lambda: haar_dwt2d(image),
        "haar_idwt2d": lambda: haar_idwt2d(coeffs),
        "haar_pyramid": lambda: haar_pyramid(image),
        "wavedec2": lambda: wavedec2(image, 1),
        "waverec2": lambda: waverec2(decomposition),
        "group_norm_silu": lambda: group_norm_silu(x, 2, scale, bias),
        "group_norm_silu, two inputs": lambda: group_norm_silu(x, 2, both, both, skip=x),
        f"{PYTORCH}silu(group_norm)": lambda: F.silu(F.group_norm(x, 2, scale, bias)),
        "conv3x3, bias and residual": lambda: conv3x3(x, weight, bias, residual=x),
        f"{PYTORCH}conv2d + residual": lambda: F.conv2d(x, weight, bias, padding=1).add_(x),
        "modulate_weight": lambda: modulate_weight(weight, scale, gain),
        "self_modulated_conv2d": lambda: self_modulated_conv2d(x, weight, scale, gain, bias, padding=1),
    }


def host_seconds(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Returns the median of the host's seconds per call, by name; the calls take turns.

    On a CPU this is the processor's time, in which other programs do not count.
    """
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(CALLS):
                call()
        for _ in range(rounds):
            for name, call in calls.items():
                if on_gpu:
                    torch.cuda.synchronize()
                start = clock()
                for _ in range(CALLS):
                    call()
                times[name].append((clock() - start) / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, seconds in host_seconds(make_calls(device)).items():
        print(f"{name:30} {seconds * 1e6:6.1f} us")
