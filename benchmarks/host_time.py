"""The host's time per call of each public operator, in inference mode and on tensors that take no time to compute.

On a GPU, a model of many small calls waits for the host: for Python, PyTorch's dispatch, and the checks of the
arguments. ``python -m benchmarks.host_time`` measures that time on this machine, on a CPU with the computation of a few
numbers included, on a GPU by queueing calls without waiting for them.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from litevae_kernels import (
    conv3x3,
    group_norm_silu,
    haar_dwt2d,
    haar_idwt2d,
    haar_pyramid,
    modulate_weight,
    use_backend,
    wavedec2,
    waverec2,
)
from litevae_kernels.backend import why_not

CALLS = 100  # per measurement; fewer than a GPU's queue holds
ROUNDS = 60
PYTORCH = "PyTorch: "  # beginning of the names of PyTorch's own operators


@dataclass(frozen=True)
class Call:
    """A call, and the backend that it is forced to."""

    run: Callable[[], object]
    backend: str | None = None


def make_calls(device: str) -> dict[str, Call]:
    """Returns a call of each operator, and of PyTorch's operators that would replace it, by name."""
    channels_last = torch.channels_last

    def tensor(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, device=device)
        return x.contiguous(memory_format=channels_last) if len(shape) == 4 else x

    image, x, weight = tensor(1, 3, 8, 8), tensor(1, 4, 2, 2), tensor(4, 4, 3, 3)
    scale, gain, bias, both = tensor(4), tensor(1), tensor(4), tensor(8)
    coeffs = tensor(1, 12, 4, 4)
    decomposition = wavedec2(image, 1)
    moments = torch.ones(1, 4, 2, dtype=torch.float64, device=device)  # mean and variance of each channel
    add_residuals = torch.ops.litevae.add_residuals_
    calls = {
        "haar_dwt2d": Call(lambda: haar_dwt2d(image)),
        "haar_idwt2d": Call(lambda: haar_idwt2d(coeffs)),
        "haar_pyramid, 3 results": Call(lambda: haar_pyramid(image)),
        "wavedec2, 4 results": Call(lambda: wavedec2(image, 1)),
        "waverec2, 4 inputs": Call(lambda: waverec2(decomposition)),
        "group_norm_silu": Call(lambda: group_norm_silu(x, 2, scale, bias)),
        "group_norm_silu, two inputs": Call(lambda: group_norm_silu(x, 2, both, both, skip=x)),
        "group_norm_silu, offset": Call(lambda: group_norm_silu(x, 2, scale, bias, offset=bias)),
        "group_norm_silu, statistics": Call(lambda: group_norm_silu(x, 2, scale, bias, statistics=[moments])),
        f"{PYTORCH}silu(group_norm)": Call(lambda: F.silu(F.group_norm(x, 2, scale, bias))),
        "modulate_weight": Call(lambda: modulate_weight(weight, scale, gain)),
        # On a GPU, PyTorch's convolution serves these; elsewhere, the reference stands for that path.
        "conv3x3": Call(lambda: conv3x3(x, weight, bias, residual=x), "reference"),
        f"{PYTORCH}conv2d + residual": Call(lambda: F.conv2d(x, weight, bias, padding=1).add_(x)),
    }
    if device == "cuda":  # On a CPU, no kernel serves it.
        for backend in ("native", "triton"):
            if why_not(backend, device) is None:
                for name, measure in (("", False), (", statistics", True)):
                    call = partial(add_residuals, x, [x], [bias], measure, backend)
                    calls[f"add_residuals_, {backend}{name}"] = Call(call)
    return calls


def host_seconds(calls: dict[str, Call], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Returns the host's seconds per call in each round, by name; the calls take turns.

    On a CPU this is the processor's time, in which other programs do not count.
    """
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(1 + rounds):
            for name, call in calls.items():
                run = call.run
                with use_backend(call.backend) if call.backend is not None else nullcontext():
                    if on_gpu:
                        torch.cuda.synchronize()
                    start = clock()
                    for _ in range(CALLS):
                        run()
                    times[name].append((clock() - start) / CALLS)
    return {name: values[1:] for name, values in times.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, values in host_seconds(make_calls(device)).items():
        print(f"{name:32} {statistics.median(values) * 1e6:6.1f} us")
