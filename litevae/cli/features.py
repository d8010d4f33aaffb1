"""`litevae features`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import (
    DataArgument,
    ModelsArgument,
    NamesOption,
    make_folder,
    name_each,
    provenance,
    results,
)
from litevae.errors import UserError
from litevae.models.loading import load_model

PICTURES = 4  # rows of features.png


def features(
    models: ModelsArgument,
    data: DataArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the picture and the figures.")
    ],
    names: NamesOption = None,
    size: Annotated[
        int, typer.Option(min=16, metavar="PIXELS", help="Side that images are resized to.")
    ] = 256,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Images to measure, at most.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Show the feature maps of decoders' last blocks, and how imbalanced they are, as the paper's Figure 3.

    \b
    Example: litevae features runs/group runs/smc path/to/images -o features --names GroupNorm,SMC
             litevae features diffusers:path/to/sd-vae runs/imagenet-b path/to/images -o features
             litevae features runs/demo demo -o features --size 64

    Writes features.json, and features.png with some images and, for each model, the root mean square of the
    features over the channels.

    The imbalance is the 99.9th percentile of these, divided by their median: the mean over the images. 1 is
    balanced; the paper, which shows pictures, has no such number.
    """
    record_file, picture = results(output, "features.json", "features.png", overwrite=overwrite)
    paths = name_each(models, names)
    autoencoders = {name: load_model(path) for name, path in paths.items()}

    import torch

    from litevae.data.sources import open_images
    from litevae.data.squares import load_validation
    from litevae.evaluation.feature_maps import draw_feature_maps, feature_magnitude, imbalance
    from litevae.evaluation.resolution import check_takes
    from litevae.files import replacing

    for name, model in autoencoders.items():
        check_takes(name, model, size)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
    images = load_validation(open_images(data), size, count).images
    magnitudes, imbalances = {}, {}
    for name, model in autoencoders.items():
        magnitudes[name] = [feature_magnitude(model, pixels) for _, pixels in images]
        try:
            imbalances[name] = imbalance(magnitudes[name])
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    make_folder(output)
    step = max(1, len(images) // PICTURES)
    shown = [(Path(label).stem, pixels) for label, pixels in images][::step][:PICTURES]
    maps = {name: each[::step][:PICTURES] for name, each in magnitudes.items()}
    with replacing(picture) as path:
        draw_feature_maps(shown, maps, imbalances, path)
    record = {
        "count": len(images),
        "latent": "mode",
        "imbalance": "99.9th percentile / median of the RMS over channels, mean over the images",
        "models": [
            {"name": name, **provenance(paths[name], data, size), "imbalance": imbalances[name]}
            for name in paths
        ],
    }
    with replacing(record_file) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    print(f"{len(images)} images, middle square, {size} x {size}; mode of the posterior")
    width = max(len(name) for name in paths)
    for name, value in imbalances.items():
        print(f"{name:{width}}  imbalance {value:.2f}")
    print(f"see {record_file} and {picture}")
