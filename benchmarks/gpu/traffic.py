"""Predicts what an encoder moves through a GPU's memory, and the time that this takes at least.

``python -m benchmarks.gpu.traffic`` prints the table of docs/performance.md. The calls are those that the encoder makes
on a GPU, recorded on tensors without memory. Each kernel reads its inputs and writes its results once, whatever the
caches hold; tests/gpu_emulator/test_traffic.py compares this with what the emulated kernels touch.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import markdown
from litevae import LiteVAE

PRESETS = {"LiteVAE-B": "litevae-b", "LiteVAE-S": "litevae-s"}
HAAR, STATISTICS, APPLY, CONVOLUTION, BIAS, RESIDUAL, SUM, OTHER = KINDS = (
    "Haar transform",
    "GroupNorm: statistics",
    "GroupNorm and SiLU: apply",
    "convolutions",
    "their biases",
    "residuals, read",
    "what they are added to, read and written",
    "pooling, concatenation",
)
# Rates of an H200: a large copy (bytes read and written), and a large bfloat16 matrix product.
BANDWIDTH = 4.3e12
OPERATIONS = 790e12
BATCH = 32  # each layer reads its weights once per batch
# Designs of the encoder, and what of each kind of traffic remains. Each includes the one above it.
DESIGNS: dict[str, dict[str, float]] = {
    "as built": {},
    "the other biases and statistics, too, without a pass of their own": {BIAS: 0, STATISTICS: 0},
    "norm and SiLU read by the convolution, additions in its epilogue": {APPLY: 0, SUM: 0},
}


@dataclass(frozen=True)
class Shares:
    """Bytes by kind and multiply-accumulates, per image."""

    bytes: dict[str, float]
    macs: float


def haar(image: Tensor, coefficients: Sequence[Tensor]) -> dict[str, int]:
    return {HAAR: image.nbytes + sum(x.nbytes for x in coefficients)}


def group_norm_silu(inputs: Sequence[Tensor], result: Tensor, *, given: bool = False) -> dict[str, int]:
    """Returns the bytes of both passes, or of one if statistics are given; the numbers between them are left out."""
    read = sum(x.nbytes for x in inputs)
    return {STATISTICS: 0 if given else read, APPLY: read + result.nbytes}


def group_norm_silu_in_clusters(inputs: Sequence[Tensor], result: Tensor) -> dict[str, int]:
    """Returns the bytes of the one pass of the kernel for thread-block clusters."""
    return {APPLY: sum(x.nbytes for x in inputs) + result.nbytes}


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor) -> dict[str, int]:
    """Returns the bytes of a convolution that reads its input once, and of PyTorch's separate pass for the bias."""
    added = 0 if bias is None else 2 * result.nbytes
    return {CONVOLUTION: x.nbytes + weight.nbytes + result.nbytes, BIAS: added}


def addition(y: Tensor, others: Sequence[Tensor]) -> dict[str, int]:
    """Returns the bytes of adding tensors to `y` in place; its statistics are left out."""
    return {RESIDUAL: sum(x.nbytes for x in others), SUM: 2 * y.nbytes}


def elementwise(inputs: Sequence[Tensor], result: Tensor) -> int:
    return sum(x.nbytes for x in inputs) + result.nbytes


class Recorder(TorchDispatchMode):
    """Sums the traffic of the calls of a model; refuses operators whose traffic it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.macs = 0
        self.norms: list[tuple[Sequence[Tensor], Tensor, int]] = []  # inputs, result and groups

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        match func._schema.name:
            case "litevae::haar_analysis":
                self.bytes.update(haar(args[0], out))
            case "litevae::group_norm_silu":
                inputs = [x for x in args[:2] if x is not None]
                given = len(args) > 8 and bool(args[8])
                self.bytes.update(group_norm_silu(inputs, out[0], given=given))
                if not given:
                    self.norms.append((inputs, out[0], args[4]))
            case "aten::convolution":
                x, weight, bias = args[:3]
                self.bytes.update(convolution(x, weight, bias, out))
                self.macs += out.numel() * weight[0].numel()
            case "litevae::add_residuals_" | "aten::add_":
                others = args[1] if isinstance(args[1], list) else [args[1]]
                self.bytes.update(addition(args[0], others))
            case "aten::avg_pool2d" | "aten::cat":
                self.bytes[OTHER] += elementwise(tensors, out)
            case "aten::slice" | "aten::split" | "aten::split_with_sizes" | "prim::device":
                pass  # views
            case name:
                raise NotImplementedError(f"the traffic of {name} is unknown")
        return out


def record(preset: str, size: int, batch: int) -> Recorder:
    """Returns what the encoder does for a batch in bfloat16, channels_last."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
            encoder = LiteVAE.from_preset(preset).encoder.eval()
            images = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
            with Recorder() as recorder:
                encoder(images)
    finally:
        torch.set_default_dtype(default)
    return recorder


def predict(preset: str, size: int = 256, batch: int = BATCH) -> Shares:
    """Returns what the encoder does for each image of a batch in bfloat16, channels_last."""
    recorder = record(preset, size, batch)
    return Shares({kind: total / batch for kind, total in recorder.bytes.items()}, recorder.macs / batch)


def seconds(shares: Shares, design: str, bandwidth: float, operations: float) -> tuple[float, float]:
    """Returns the bytes of an image in a design and in those above it, and the time for bytes and arithmetic.

    Convolutions take the longer of their two times, all of them together.
    """
    left = dict.fromkeys(KINDS, 1.0)
    for name, changes in DESIGNS.items():
        left |= changes
        if name == design:
            break
    moved = {kind: left[kind] * shares.bytes.get(kind, 0) for kind in KINDS}
    convolutions = max(moved[CONVOLUTION] / bandwidth, 2 * shares.macs / operations)
    rest = (sum(moved.values()) - moved[CONVOLUTION]) / bandwidth
    return sum(moved.values()), convolutions + rest


def tables(bandwidth: float = BANDWIDTH, operations: float = OPERATIONS, size: int = 256) -> str:
    """Returns the tables of the documentation in Markdown: bytes by kind, and designs."""
    found = {model: predict(preset, size) for model, preset in PRESETS.items()}
    kinds = [
        [kind, *(text for s in found.values() for text in cells(s.bytes.get(kind, 0), bandwidth))]
        for kind in KINDS
    ]
    header = ["step", *(f"{model}, {unit}" for model in found for unit in ("MB", "us"))]
    designs = []
    for design in DESIGNS:
        line = [design]
        for shares in found.values():
            moved, time = seconds(shares, design, bandwidth, operations)
            line += [f"{moved / 1e6:.0f}", f"{1 / time:.0f}"]
        designs.append(line)
    columns = ["design", *(f"{model}, {unit}" for model in found for unit in ("MB", "images/s at most"))]
    return f"{markdown(header, kinds)}\n\n{markdown(columns, designs)}"


def cells(moved: float, bandwidth: float) -> tuple[str, str]:
    return f"{moved / 1e6:.1f}", f"{moved / bandwidth * 1e6:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.traffic", description=__doc__)
    parser.add_argument(
        "--bandwidth", type=float, default=BANDWIDTH, help="bytes per second; default: an H200's"
    )
    parser.add_argument("--operations", type=float, default=OPERATIONS, help="bfloat16 operations per second")
    options = parser.parse_args()
    print(tables(options.bandwidth, options.operations))
