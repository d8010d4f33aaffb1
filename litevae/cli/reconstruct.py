"""`litevae reconstruct`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import OverwriteOption, check_new, check_new_file, check_picture, make_folder
from litevae.errors import UserError
from litevae.files import why_missing
from litevae.models.loading import load_model

TILE = 1024  # pixels; a multiple of every model's compression factor


def reconstruct(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model, or of a training run.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files of any size.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the reconstructions.")
    ],
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PNG file for a picture with a row per image: input, yardstick, reconstruction and latent.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Encode and decode images, and print the PSNR of each beside that of a yardstick.

    \b
    Example: litevae reconstruct runs/demo photo.jpg scan.png -o reconstructed
             litevae reconstruct runs/demo photo.jpg -o reconstructed --picture comparison.png

    Writes each reconstruction as an 8-bit PNG file of the same name and size. If several images have the same
    name, the later ones get a number. Images are turned upright and converted to the channels of the model,
    transparent images are composited on white unless there are 4, and 16 bits are scaled to 8; the PSNR is measured
    against the result. A model that was trained with data.value_range takes .npy, PNG and TIFF files, and writes a
    file of the same kind and data type, with values of that range. The yardstick keeps as many of the coarsest
    Haar coefficients of each block of pixels as the latent has channels, without any learning; a model below it is
    marked. Images larger than 1024 pixels are reconstructed in tiles. Images that cannot be read or reconstructed are
    left out, and the exit status is then 2.
    """
    for image in images:
        if not os.path.isfile(image):
            is_folder = "is a folder, not an image"
            raise UserError(f"{image}: {is_folder if os.path.isdir(image) else why_missing(image, 'file')}")
    autoencoder = load_model(model)

    from litevae.models.interface import fixed_size, pixel_format, spatial_compression

    images_of = pixel_format(autoencoder)
    keeps = images_of.value_range is not None  # the kind and data type of the files
    targets = name_outputs(images, output, keeps)
    check_new(*targets, overwrite=overwrite)
    if picture is not None:
        check_picture(picture)
        check_new_file(picture, overwrite)
        # Path.resolve fails on links that form a cycle.
        if os.path.realpath(picture) in map(os.path.realpath, (*images, *targets)):
            raise UserError(f"--picture {picture} is an input or a reconstruction: give another file")
    from litevae.data.images import decode_image, read_values, write_values
    from litevae.evaluation.metrics import psnr
    from litevae.evaluation.pictures import draw_reconstructions
    from litevae.evaluation.reconstruction import reconstruct as run
    from litevae.evaluation.yardsticks import (
        BELOW,
        HAAR,
        reconstruct_without_learning,
        yardstick_labels,
    )
    from litevae.files import replacing

    autoencoder.enable_tiling()
    tile = fixed_size(autoencoder) or TILE
    autoencoder.tile_sample_min_size = tile
    autoencoder.tile_latent_min_size = tile // spatial_compression(autoencoder)

    yardstick = yardstick_labels(autoencoder)[HAAR]
    values: list[float] = []
    yardsticks: list[float] = []
    shown = []
    for path, target in zip(images, targets, strict=True):
        try:
            try:
                stored = read_values(path) if keeps else None
                pixels = decode_image(path, images_of) if stored is None else images_of.to_levels(stored)
                result = run(autoencoder, pixels)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
        except UserError as error:
            if len(images) == 1:
                raise
            print(error, file=sys.stderr)
            continue
        make_folder(output)
        values.append(psnr(pixels, result))
        with replacing(target) as temporary:
            write_values(temporary, result if stored is None else images_of.restore(result, stored))
        yardsticks.append(psnr(pixels, reconstruct_without_learning(autoencoder, pixels)[HAAR]))
        below = f" ({BELOW})" * (values[-1] < yardsticks[-1])
        print(
            f"{path}: {pixels.shape[1]}x{pixels.shape[0]}, PSNR {values[-1]:.2f} dB{below}, {yardstick} "
            f"{yardsticks[-1]:.2f} dB, {target}"
        )
        if picture is not None:
            shown.append((path.stem, pixels))
    if len(values) > 1:
        means = [sum(each) / len(values) for each in (values, yardsticks)]
        print(f"mean PSNR of {len(values)} images: {means[0]:.2f} dB, {yardstick} {means[1]:.2f} dB")
    if picture is not None and shown:
        with replacing(picture) as temporary:
            draw_reconstructions(autoencoder, shown, temporary)
        print(f"see {picture}")
    if len(values) < len(images):
        raise UserError(f"{len(images) - len(values)} of {len(images)} images cannot be reconstructed")


def name_outputs(images: list[Path], folder: Path, keep: bool = False) -> list[Path]:
    """Chooses a different file in `folder` for each image: a PNG file, or with `keep` one of the image's kind.

    Raises:
        UserError: one of them is an input itself.
    """
    from litevae.data.pixels import VALUE_EXTENSIONS

    targets: list[Path] = []
    for image in images:
        suffix = image.suffix.lower() if keep else ".png"
        suffix = suffix if suffix in VALUE_EXTENSIONS else ".npy"
        number, target = 1, folder / f"{image.stem}{suffix}"
        while target in targets:
            number += 1
            target = folder / f"{image.stem}-{number}{suffix}"
        targets.append(target)
    # Unlike Path.resolve, realpath accepts links that form a cycle.
    inputs = {os.path.realpath(image) for image in images}
    for target in targets:
        if os.path.realpath(target) in inputs:
            raise UserError(f"{target} is an input and would be overwritten: give another folder with -o")
    return targets
