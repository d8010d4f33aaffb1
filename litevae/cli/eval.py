"""`litevae eval`."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import COLUMNS, DataArgument, ModelArgument, parse_metrics, provenance
from litevae.errors import UserError
from litevae.models.loading import load_model


def evaluate(
    model: ModelArgument,
    data: DataArgument,
    metrics: Annotated[
        str, typer.Option(metavar="NAMES", help="Some of rfid, lpips, psnr and ssim.")
    ] = "rfid,lpips,psnr,ssim",
    size: Annotated[
        int, typer.Option(min=16, metavar="PIXELS", help="Side that images are resized to.")
    ] = 256,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images to measure, at most; all by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 16,
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Processes that read images.")] = 4,
    sample: Annotated[
        bool, typer.Option("--sample", help="Decode a sample of each posterior instead of its mode.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="JSON file for the result.")
    ] = Path("eval.json"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Measure how well a model reconstructs images: rFID, LPIPS, PSNR and SSIM.

    \b
    Example: litevae eval runs/imagenet-b path/to/images -o imagenet-b.json
             litevae eval diffusers:path/to/sd-vae path/to/images -o sd-vae.json
             litevae eval runs/demo demo --size 64 --metrics psnr,ssim
             torchrun --nproc-per-node 2 --no-python litevae eval runs/imagenet-b path/to/images

    Images are cropped to the middle square and resized; both they and the reconstructions are rounded to 8
    bits before every metric. PSNR (in dB), SSIM and LPIPS (VGG16) are means over the images. rFID compares
    Inception features, and is biased upwards by few images: compare it at equal counts only.

    The JSON file records the crop, the count, the weights' SHA-256 and the versions beside the figures. The
    same command, in as many processes, goes on where an earlier one was interrupted, from FILE.partial.
    diffusers:FOLDER is any diffusers AutoencoderKL, or a pipeline with one. Weights of Inception (for rfid)
    and VGG16 (for lpips) are downloaded where they are missing.
    """
    names = parse_metrics(metrics)
    if output.exists() and not overwrite:
        raise UserError(f"{output} is there already: give another file with -o, or --overwrite")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder")
    autoencoder = load_model(model)

    import torch
    from accelerate import PartialState

    from litevae.data.sources import open_images
    from litevae.evaluation.evaluate import evaluate as run
    from litevae.evaluation.fid import INCEPTION_NAME
    from litevae.files import replacing

    has_device = torch.accelerator.is_available()
    state = PartialState(cpu=not has_device)
    if has_device:
        autoencoder.to(state.device)
    measured = provenance(model, data, size)
    partial = output.with_name(output.name + ".partial")
    result = run(
        autoencoder,
        open_images(data),
        names,
        size,
        count,
        batch_size,
        workers,
        sample,
        partial,
        {"data": data, "weights": measured["weights"]},
    )
    if not state.is_main_process:  # the first process speaks for all
        return
    record = {
        **measured,
        "count": result.count,
        "unreadable": result.unreadable,
        "latent": "sample" if sample else "mode",
        # JSON knows no infinity
        "metrics": {name: value if math.isfinite(value) else None for name, value in result.values.items()},
        "without_error": result.exact,
        "networks": {
            name: network
            for name, network in (
                ("rfid", INCEPTION_NAME),
                ("lpips", "LPIPS 0.1, VGG16"),
            )
            if name in names
        },
    }
    with replacing(output) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    print(
        f"{result.count} images, middle square, {size} x {size}, 8 bits; {record['latent']} of the posterior"
    )
    for file, digest in measured["weights"].items():
        print(f"weights: {file}, SHA-256 {digest}")
    print("".join(f"{COLUMNS[name][0]:>10}" for name in result.values))
    print("".join(f"{value:10.{COLUMNS[name][1]}f}" for name, value in result.values.items()))
    if result.exact and "psnr" in names:
        print(f"images that came back without an error: {result.exact}; the PSNR is the mean of the others")
    if result.unreadable:
        print(f"images that cannot be read, left out: {result.unreadable}")
    print(f"see {output}")
