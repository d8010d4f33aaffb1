"""Prints what the Triton convolution takes of a GPU, as ptxas says, for each ResBlock's layers; needs no GPU.

``python -m benchmarks.gpu.resources`` prints the table of docs/performance.md: registers per thread, KiB of shared
memory per block of 256 threads, and bytes that are spilled, if any. None of them is a speed.
"""

import argparse
import importlib
from collections import Counter
from typing import Any

import torch

from benchmarks.gpu.traffic import PRESETS
from benchmarks.report import markdown
from litevae import LiteVAE
from litevae.models.feature_unet import FeatureUNet
from litevae.models.layers import ResBlock
from litevae_kernels.testing import Launch, compile_launch, record_launches, registers_and_spills

ARCHITECTURES = (80, 86, 89, 90, 120)

# Channels of the input, of the skip and of the output, and what the epilogue does beside the bias.
Layer = tuple[int, int, int, str]
RESIDUAL, STATISTICS = ", residual", ", residual, statistics"


def layers(preset: str) -> Counter[Layer]:
    """Returns how many convolutions of each kind a model has; each with a residual may also compute statistics."""
    with torch.device("meta"):
        model = LiteVAE.from_preset(preset)
    # The skip of a U-Net's block has as many channels as its output.
    up = {block for unet in model.modules() if isinstance(unet, FeatureUNet) for block in unet.decoder_blocks}
    found: Counter[Layer] = Counter()
    for block in model.modules():
        if isinstance(block, ResBlock):
            width = int(block.conv1.out_channels)
            skip = width if block in up else 0
            found[int(block.conv1.in_channels) - skip, skip, width, ""] += 1
            found.update((width, 0, width, epilogue) for epilogue in (RESIDUAL, STATISTICS))
    return found


def launch(channels: int, skip_channels: int, outputs: int, epilogue: str) -> Launch:
    """Returns the launch of a normalised convolution; the size of the image does not change the kernel."""
    kernels = importlib.import_module("litevae_kernels.conv3x3.triton")
    options: Any = {"device": "meta", "dtype": torch.bfloat16}
    x, skip, y = (
        torch.empty(1, c, 64, 64, **options, memory_format=torch.channels_last)
        for c in (channels, skip_channels, outputs)
    )
    inputs = channels + skip_channels
    affine = torch.empty(3, 1, inputs, device="meta")
    weight, bias = torch.empty(outputs, 3, 3, inputs, **options), torch.empty(outputs, **options)
    partials = kernels.empty_partials(y) if epilogue == STATISTICS else None
    residual = y if epilogue else None
    arguments = (x, skip if skip_channels else None, affine, weight, bias, residual, True, y, partials)
    (found,) = record_launches(kernels, lambda: kernels.forward(*arguments))
    return found


def describe(layer: Layer, architecture: int) -> str:
    """Returns the cell of a layer: registers, shared memory and spills."""
    compiled = compile_launch(launch(*layer), architecture)
    found = registers_and_spills(compiled)
    if found is None:
        return "no ptxas"
    registers, spilled = found
    return f"{registers}, {compiled.metadata.shared / 1024:.0f} KiB" + (f", {spilled} B" if spilled else "")


def table(architectures: tuple[int, ...] = ARCHITECTURES) -> str:
    """Returns the table in Markdown, with a row for each kind of layer."""
    counts = {name: layers(preset) for name, preset in PRESETS.items()}
    rows = [
        ["channels in, out", *(f"layers of {name}" for name in counts), *(f"sm_{a}" for a in architectures)]
    ]
    for layer in sorted(set().union(*counts.values())):
        channels, skip_channels, outputs, epilogue = layer
        name = f"{channels} + {skip_channels}" if skip_channels else str(channels)
        name += f", {outputs}{epilogue}"
        rows.append(
            [name, *(str(c[layer]) for c in counts.values()), *(describe(layer, a) for a in architectures)]
        )
    return markdown(rows[0], rows[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.resources", description=__doc__)
    parser.add_argument(
        "architectures", type=int, nargs="*", default=ARCHITECTURES, help="such as 90 for sm_90"
    )
    print(table(tuple(parser.parse_args().architectures)))
