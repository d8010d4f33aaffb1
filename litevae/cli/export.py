"""`litevae export`."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from litevae.cli.common import (
    ModelArgument,
    OverwriteOption,
    choose_device,
    make_folder,
    model_provenance,
    results,
    write_json,
)
from litevae.errors import UserError
from litevae.models.loading import load_model, model_folder

if TYPE_CHECKING:
    from torch import Tensor

    from litevae.models.interface import Autoencoder

PHOTOGRAPHS = ("chelsea", "astronaut", "coffee")
# The settings by which diffusion pipelines scale latents.
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the files.")],
    format: Annotated[
        Literal["onnx", "torch-export", "aoti", "openvino"], typer.Option(help="Format of the files.")
    ] = "onnx",
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="Precision of weights, inputs and outputs.")
    ] = "fp32",
    opset: Annotated[
        int | None,
        typer.Option(
            min=18,
            max=25,
            metavar="N",
            help="Version of ONNX's operator set, for onnx alone.  [default: 18]",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Device such as cuda, for torch-export and aoti.")
    ] = "cpu",
    check: Annotated[
        bool, typer.Option(help="Run the files on photographs and compare them with the model.")
    ] = True,
    overwrite: OverwriteOption = False,
) -> None:
    """Export a model's encoder and decoder for other runtimes.

    \b
    Example: litevae export runs/imagenet-b exported
             litevae export runs/imagenet-b exported --format openvino
             litevae export diffusers:path/to/sd-vae exported --format aoti

    Writes encoder and decoder as .onnx (onnx), .pt2 (torch-export, aoti) or .xml and .bin (openvino), and
    export.json, which states their inputs and outputs, the precision, the opset, the constants that diffusion
    pipelines apply to latents, and the measured errors. Batch size, height and width are dynamic. The encoder takes
    images in [-1, 1] and gives the mean and the log-variance of the latent along the channels; decode the first half.
    The graphs hold standard operators only, and plain instead of self-modulated convolutions.

    aoti compiles for this machine's kind of processor, or GPU with --device cuda. OpenVINO stores fp16 weights and
    takes float32 inputs.
    """
    from litevae.models import export as exporting

    on = choose_device(device)
    exporting.check_export(format, precision, on, check)
    if opset is not None and format != "onnx":
        raise UserError(f"--opset {opset}: {format} has no opset; only --format onnx takes it")
    names = [f"{part}{suffix}" for part in ("encoder", "decoder") for suffix in exporting.SUFFIXES[format]]
    targets = results(output, *names, "export.json", overwrite=overwrite)
    if os.path.realpath(output) == os.path.realpath(model_folder(model)):
        raise UserError(f"{output} is the model's own folder: give another folder for the exported files")
    autoencoder = load_model(model)
    make_folder(output)
    with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as folder:
        version = exporting.OPSET if opset is None else opset
        files = exporting.export_model(autoencoder, Path(folder), format, precision, version, on)
        errors: dict[exporting.Part, float] = {}
        if check:
            images = photographs(autoencoder)
            errors = exporting.compare_exported(autoencoder, files, format, precision, images, on)
        for target in targets[:-1]:
            os.replace(Path(folder) / target.name, target)
    parts = {}
    for part, signature in exporting.signatures(autoencoder).items():
        parts[part] = {
            "file": files[part].name,
            "input": {"name": signature.input, "shape": signature.input_shape},
            "output": {"name": signature.output, "shape": signature.output_shape},
            "relative_error": errors.get(part),
        }
        size = sum(target.stat().st_size for target in targets[:-1] if target.stem == part)
        found = f", relative error {errors[part]:.1e} on photographs" if check else ", not compared"
        print(f"{output / files[part].name}: {size / 1e6:.1f} MB{found}")
    record = {
        "format": format,
        "precision": precision,
        "opset": version if format == "onnx" else None,
        "device": str(on),
        "parts": parts,
        **{name: autoencoder.config.get(name) for name in (*SCALES, "value_range")},
    }
    write_json(record | model_provenance(model), targets[-1])


def photographs(model: "Autoencoder") -> "list[Tensor]":
    """Returns batches of photographs in [-1, 1], (N, in_channels, H, W).

    The first has three square images. The second has one that is not square, and is left out if the model takes one
    size only.
    """
    import numpy as np
    import torch

    from litevae.data.pixels import to_model_range
    from litevae.data.sources import load_photograph
    from litevae.data.squares import middle_square
    from litevae.models.interface import fixed_size, spatial_compression

    side = fixed_size(model) or min(256, 32 * spatial_compression(model))  # attention grows with the latent
    crops = np.stack([middle_square(load_photograph(name), side) for name in PHOTOGRAPHS])
    channels = [channel % 3 for channel in range(model.config.in_channels)]
    squares = to_model_range(torch.from_numpy(crops).permute(0, 3, 1, 2)[:, channels])
    return [squares] if fixed_size(model) else [squares, squares[:1, :, : side // 2]]
