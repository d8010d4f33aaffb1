"""Size, cost, speed and memory of a model (Table 3)."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from litevae.models.interface import Autoencoder
from litevae.plotting import DPI
from litevae_kernels.allocator import peak_resident_memory

Side = Literal["encoder", "decoder"]


def attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    return sdpa_flop_count(query, key, value)


# torch 2.11 does not count attention on a CPU.
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


@dataclass(frozen=True)
class Complexity:
    """Parameters, and multiply-accumulates (MACs) to encode and decode one image.

    MACs count convolutions, matrix products and attention; one MAC is two floating-point operations.
    `latent_shape` is (n_z, h, w).
    """

    encoder_parameters: int
    decoder_parameters: int
    encoder_macs: int
    decoder_macs: int
    latent_shape: tuple[int, ...]


def measure_complexity(model: Autoencoder, size: int = 256) -> Complexity:
    """Counts parameters and MACs for one image of `size` x `size` pixels, on fake tensors: nothing is computed.

    Raises:
        ValueError: the model does not take this size.
    """
    encoder_parameters, decoder_parameters = count_parameters(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        image = torch.empty(1, model.config.in_channels, size, size, device=model.device, dtype=model.dtype)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as encoding:
            latent: Tensor = model.encode(image).latent_dist.mode()
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as decoding:
            model.decode(latent)
    return Complexity(
        encoder_parameters,
        decoder_parameters,
        encoding.get_total_flops() // 2,
        decoding.get_total_flops() // 2,
        tuple(latent.shape[1:]),
    )


def count_parameters(model: Autoencoder) -> tuple[int, int]:
    """Returns the parameters of the encoder and of the decoder, each with its 1x1 convolution if it has one."""
    encoder, decoder = (
        sum(p.numel() for part in side if part is not None for p in part.parameters())
        for side in ((model.encoder, model.quant_conv), (model.decoder, model.post_quant_conv))
    )
    return encoder, decoder


@dataclass(frozen=True)
class Speed:
    """Speed of one side of a model: images per second, and peak memory in bytes beyond weights and inputs.

    The memory is None where the system does not report it.
    """

    images_per_second: float
    peak_memory: int | None


@torch.inference_mode()
def measure_speed(
    models: Sequence[Autoencoder], side: Side, size: int = 256, batch_size: int = 4, rounds: int = 5
) -> list[Speed]:
    """Times models in eager mode on random inputs in the channels_last layout.

    The models take turns because a machine's speed drifts: each round runs each model once, and the median over
    the rounds counts. The function changes the models' memory format. On a CPU the peak is the growth of the
    process, and glibc keeps freed memory from then on (`litevae_kernels.allocator.keep_freed_memory`).

    Args:
        models: autoencoders on one device; each runs in its own dtype.
        side: "encoder" (image to moments) or "decoder" (latent to image).
        size: side of the square images in pixels.
        batch_size: images per call.
        rounds: number of rounds, at least 1; one more runs first and does not count.

    Raises:
        ValueError: a model does not take this size.
    """
    calls = [call_of(model, side, size, batch_size) for model in models]
    device = models[0].device
    peaks = [peak_memory(call, device) for call in calls]  # These are the first calls of each model.
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return [
        Speed(batch_size / statistics.median(seconds), peak)
        for seconds, peak in zip(times, peaks, strict=True)
    ]


def call_of(model: Autoencoder, side: Side, size: int, batch_size: int) -> Callable[[], Tensor]:
    """Returns a function that runs `side` once, with an input of its own."""
    model.to(memory_format=torch.channels_last)
    channels, side_length = model.config.in_channels, size
    if side == "decoder":
        channels, *_, side_length = measure_complexity(model, size).latent_shape
    x = torch.randn(batch_size, channels, side_length, side_length).to(model.device, model.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    if side == "encoder":
        return lambda: model.encode(x).latent_dist.parameters
    return lambda: model.decode(x).sample


def peak_memory(call: Callable[[], Tensor], device: torch.device) -> int | None:
    """Returns the peak memory of the second call, in bytes beyond the memory in use before it."""
    call()
    if device.type == "cpu":
        return peak_resident_memory(call)
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def draw_complexity(
    costs: Mapping[str, Complexity], speeds: Mapping[str, Speed], side: Side, heading: str, path: Path
) -> None:
    """Draws the parameters, cost, memory and speed of one side of the models as bars.

    Args:
        costs, speeds: results by model, of the same models.
        side: side that was measured.
        heading: title, such as the device and the image size.
        path: PNG file to write.
    """
    encoder = side == "encoder"
    panels: dict[str, list[float | None]] = {
        "parameters (millions)": [
            (cost.encoder_parameters if encoder else cost.decoder_parameters) / 1e6 for cost in costs.values()
        ],
        "GMACs per image": [
            (cost.encoder_macs if encoder else cost.decoder_macs) / 1e9 for cost in costs.values()
        ],
        "peak memory (MB)": [
            None if speed.peak_memory is None else speed.peak_memory / 1e6 for speed in speeds.values()
        ],
        "images per second": [speed.images_per_second for speed in speeds.values()],
    }
    figure = Figure(figsize=(13, 1.5 + 0.45 * len(costs)), dpi=DPI, layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        bars = axes.barh(list(costs), [value or 0 for value in values])
        labels = [
            "unknown" if value is None else f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
            for value in values
        ]
        axes.bar_label(bars, labels, padding=3, fontsize=9)
        axes.margins(x=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # the first model on top; all panels share the axis
    figure.suptitle(f"{side}: {heading}", fontsize=10, color="0.35")
    figure.savefig(path)
