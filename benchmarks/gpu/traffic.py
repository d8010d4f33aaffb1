"""Predicts what an encoder moves through a GPU's memory, and the time that this and its arithmetic take at least.

``python -m benchmarks.gpu.traffic`` prints the tables of docs/performance.md. The calls are those that the encoder
makes on a GPU, recorded on tensors without memory. Each kernel reads its inputs and writes its results once, whatever
the caches hold; tests/gpu_emulator/test_traffic.py compares this with what the emulated kernels touch. A convolution or
matrix product takes the time of its bytes or that of its arithmetic, whichever is longer.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import markdown
from litevae import LiteVAE
from litevae_kernels import accelerate_vae

PRESETS = {"LiteVAE-B": "litevae-b", "LiteVAE-S": "litevae-s"}
SD_VAE, ACCELERATED = "SD-VAE", "SD-VAE with `accelerate_vae`"
HAAR, STATISTICS, APPLY, CONVOLUTION, BIAS, RESIDUAL, SUM, ELEMENTWISE, OTHER = KINDS = (
    "Haar transform",
    "GroupNorm: statistics",
    "GroupNorm, with SiLU if fused: apply",
    "convolutions, matrix products, attention",
    "their biases",
    "residuals, read",
    "what they are added to, read and written",
    "SiLU and division alone",
    "pooling, padding, copies",
)
# Rates of an H100 in bytes read and written per second by a copy, and in bfloat16 operations of a matrix product.
BANDWIDTH = 2.9e12
OPERATIONS = 790e12
SIZE = 256  # height and width of the images
BATCH = 32  # each layer reads its weights once per batch
# Assumed seconds of the host per operator of this package and of PyTorch: about those of docs/performance.md's CPU.
HOST_SECONDS = {"litevae": 15e-6, "aten": 3.5e-6}
# Designs, and what of each kind of traffic remains. Each includes the one above it.
DESIGNS: dict[str, dict[str, float]] = {
    "as built": {},
    "norms in clusters": {STATISTICS: 0},
    "the other biases without a pass of their own": {BIAS: 0},
    "norm and SiLU read by the convolution, additions in its epilogue": {APPLY: 0, SUM: 0},
}
UNFUSED = "only GroupNorm and SiLU fused, as with gradients"
# What `torch.compile` can fuse in diffusers' operators.
COMPILED = "diffusers, `torch.compile` fusing SiLU, divisions and biases"
FUSED_BY_INDUCTOR: dict[str, float] = {BIAS: 0, ELEMENTWISE: 0}


def make_sd_vae(*, accelerated: bool) -> nn.Module:
    """Returns the encoder of the SD-VAE, up to the moments."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    if accelerated:
        accelerate_vae(vae)
    return nn.Sequential(vae.encoder, vae.quant_conv)


def make_litevae(preset: str) -> nn.Module:
    return LiteVAE.from_preset(preset).encoder


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(make_litevae, preset) for name, preset in PRESETS.items()},
    SD_VAE: partial(make_sd_vae, accelerated=False),
    ACCELERATED: partial(make_sd_vae, accelerated=True),
}


@dataclass(frozen=True)
class Shares:
    """Bytes by kind, and bytes and multiply-accumulates of each matrix product or convolution, per image."""

    bytes: dict[str, float]
    products: list[tuple[float, float]]


@dataclass(frozen=True)
class Costs:
    """Bytes and seconds by kind, per image."""

    bytes: dict[str, float]
    seconds: dict[str, float]

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


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


class GpuAttention(TorchFunctionMode):
    """Calls the kernel that serves the SD-VAE's attention on a GPU; where there is none, PyTorch takes it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, False)[0]
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Sums the traffic of the calls of a model; refuses operators whose traffic it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.products: list[tuple[int, int]] = []  # bytes and multiply-accumulates
        self.norms: list[tuple[Sequence[Tensor], Tensor, int]] = []  # inputs, result and groups
        self.calls: Counter[str] = Counter()  # by the namespace of the operator

    def product(self, moved: dict[str, int], macs: int) -> None:
        self.bytes.update(moved)
        self.products.append((moved[CONVOLUTION], macs))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        match func._schema.name:
            case "aten::slice" | "aten::split" | "aten::split_with_sizes" | "prim::device":
                return out
            case "aten::view" | "aten::_unsafe_view" | "aten::transpose" | "aten::t" | "aten::detach":
                return out
            case "litevae::haar_analysis":
                self.bytes.update(haar(args[0], out))
            case "litevae::group_norm_silu":
                inputs = [x for x in args[:2] if x is not None]
                given = len(args) > 8 and bool(args[8])
                self.bytes.update(group_norm_silu(inputs, out[0], given=given))
                if not given:
                    self.norms.append((inputs, out[0], args[4]))
            case "aten::native_group_norm":
                self.bytes.update(group_norm_silu(args[:1], out[0]))
            case "aten::convolution":
                x, weight, bias = args[:3]
                self.product(convolution(x, weight, bias, out), out.numel() * weight[0].numel())
            case "aten::mm" | "aten::addmm":
                self.product({CONVOLUTION: elementwise(tensors, out)}, out.numel() * len(tensors[-1]))
            case "aten::_scaled_dot_product_efficient_attention":
                query, key = tensors[:2]
                moved = {CONVOLUTION: elementwise(tensors, out[0])}
                self.product(moved, 2 * query.numel() * key.shape[2])
            case "litevae::add_residuals_" | "aten::add_" | "aten::add":
                others = args[1] if isinstance(args[1], list) else [args[1]]
                self.bytes.update(addition(args[0], others))
            case "aten::silu" | "aten::div":
                self.bytes[ELEMENTWISE] += elementwise(tensors, out)
            case "aten::avg_pool2d" | "aten::cat" | "aten::constant_pad_nd" | "aten::clone":
                self.bytes[OTHER] += elementwise(tensors, out)
            case name:
                raise NotImplementedError(f"the traffic of {name} is unknown")
        self.calls[func.namespace] += 1
        return out


def record(model: str, size: int, batch: int, *, gradients: bool = False) -> Recorder:
    """Returns what an encoder does for a batch in bfloat16, channels_last.

    Args:
        model: one of `ENCODERS`.
        size: height and width of the images.
        batch: number of images.
        gradients: whether gradients are recorded, so that nothing is fused but GroupNorm and SiLU.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.set_grad_enabled(gradients), torch.device("cuda"), GpuAttention():
            encoder = ENCODERS[model]().eval()
            images = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
            with Recorder() as recorder:
                encoder(images)
    finally:
        torch.set_default_dtype(default)
    return recorder


def predict(model: str, size: int = SIZE, batch: int = BATCH, *, gradients: bool = False) -> Shares:
    """Returns what an encoder does for each image of a batch; see `record`."""
    recorder = record(model, size, batch, gradients=gradients)
    return Shares(
        {kind: total / batch for kind, total in recorder.bytes.items()},
        [(moved / batch, macs / batch) for moved, macs in recorder.products],
    )


def remaining(design: str) -> dict[str, float]:
    """Returns what of each kind of traffic a design leaves."""
    left: dict[str, float] = {}
    for name, changes in DESIGNS.items():
        left |= changes
        if name == design:
            return left
    raise KeyError(design)


def costs(shares: Shares, left: dict[str, float], bandwidth: float, operations: float) -> Costs:
    """Returns the cost of an image of which only a part of some kinds of traffic is left."""
    moved = {kind: left.get(kind, 1) * shares.bytes.get(kind, 0) for kind in KINDS}
    times = {kind: total / bandwidth for kind, total in moved.items()}
    times[CONVOLUTION] = sum(max(x / bandwidth, 2 * macs / operations) for x, macs in shares.products)
    return Costs(moved, times)


def steps_table(costs_of: dict[str, Costs]) -> str:
    """Returns the table of the encoders' bytes and times by kind."""
    header = ["step", *(f"{model}, {unit}" for model in costs_of for unit in ("MB", "us"))]
    rows = []
    for kind in KINDS:
        cells = [(cost.bytes[kind] / 1e6, cost.seconds[kind] * 1e6) for cost in costs_of.values()]
        rows.append([kind, *(f"{value:.1f}" for pair in cells for value in pair)])
    return markdown(header, rows)


def designs_table(shares_of: dict[str, Shares], bandwidth: float, operations: float) -> str:
    """Returns the table of the bytes and the speed of each design, and the speed relative to the compiled SD-VAE."""
    designs = [
        (SD_VAE, "diffusers, eager", shares_of[SD_VAE], {}),
        (SD_VAE, COMPILED, shares_of[SD_VAE], FUSED_BY_INDUCTOR),
    ]
    for model in (ACCELERATED, *PRESETS):
        if model in PRESETS:
            designs.append((model, UNFUSED, predict(model, gradients=True), {}))
        designs += [(model, design, shares_of[model], remaining(design)) for design in DESIGNS]
    found = [costs(shares, left, bandwidth, operations) for *_, shares, left in designs]
    base = found[1].total_seconds
    columns = ["encoder", "design", "MB", "images/s at most", "relative to the compiled SD-VAE"]
    rows = [
        [
            model,
            design,
            f"{cost.total_bytes / 1e6:.0f}",
            f"{1 / cost.total_seconds:.0f}",
            f"{base / cost.total_seconds:.2f}x",
        ]
        for (model, design, *_), cost in zip(designs, found, strict=True)
    ]
    return markdown(columns, rows)


def host_table(costs_of: dict[str, Costs]) -> str:
    """Returns the table of the host's time per pass, and of the smallest batch that takes the GPU longer."""
    columns = [
        "encoder",
        "operators of litevae_kernels",
        "of PyTorch",
        "host, ms per pass",
        "batch from which the GPU takes longer",
    ]
    rows = []
    for model, cost in costs_of.items():
        calls = record(model, SIZE, 1).calls
        host = sum(HOST_SECONDS[name] * count for name, count in calls.items())
        batch = math.ceil(host / cost.total_seconds)
        rows.append([model, str(calls["litevae"]), str(calls["aten"]), f"{host * 1e3:.1f}", str(batch)])
    return markdown(columns, rows)


def tables(bandwidth: float = BANDWIDTH, operations: float = OPERATIONS) -> str:
    """Returns the tables of the documentation in Markdown: kinds of traffic, designs, and the host's time."""
    shares_of = {model: predict(model) for model in ENCODERS}
    costs_of = {model: costs(shares, {}, bandwidth, operations) for model, shares in shares_of.items()}
    designs = designs_table(shares_of, bandwidth, operations)
    return "\n\n".join((steps_table(costs_of), designs, host_table(costs_of)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.traffic", description=__doc__)
    parser.add_argument(
        "--bandwidth", type=float, default=BANDWIDTH, help="bytes per second; default: an H100's"
    )
    parser.add_argument("--operations", type=float, default=OPERATIONS, help="bfloat16 operations per second")
    options = parser.parse_args()
    print(tables(options.bandwidth, options.operations))
