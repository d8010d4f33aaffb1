"""`litevae latents`."""

from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import (
    BatchSizeOption,
    CountOption,
    DataArgument,
    FolderOption,
    ModelArgument,
    OverwriteOption,
    SizeOption,
    WorkersOption,
    choose_workers,
    make_folder,
    provenance,
    results,
    write_json,
)
from litevae.models.loading import load_model

PICTURES = 4  # images in latents.png


def latents(
    model: ModelArgument,
    data: DataArgument,
    output: FolderOption,
    size: SizeOption = 256,
    count: CountOption = 2000,
    groups: Annotated[
        int, typer.Option(min=2, metavar="N", help="Groups of images for the error bars.")
    ] = 10,
    batch_size: BatchSizeOption = 16,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare a model's latents with Gaussian noise, as in the paper's Table 6, and draw them.

    \b
    Example: litevae latents runs/imagenet-b path/to/images -o latents
             litevae latents diffusers:path/to/sd-vae path/to/images -o latents-sd
             litevae latents runs/demo demo -o latents --size 64 --groups 4

    Writes latents.json; latents.png with some images, their reconstructions and the first three channels of
    their latents as RGB (Figures 2 and 4); and distances.png with a plot of the figures.

    The figures are 1000 times the squared maximum mean discrepancy between a standard Gaussian and samples of the
    latents, which are divided by the standard deviation of all elements together. They are given for RBF kernels
    of several sigma, which are the paper's for latents of 4096 elements and grow with the root of their number; ±
    is half the width of a 95% confidence interval over groups of images. The paper does not state its unit: compare
    models with one another, at equal size, count and groups.
    """
    record_file, picture, plot = results(
        output, "latents.json", "latents.png", "distances.png", overwrite=overwrite
    )
    autoencoder = load_model(model)

    import torch

    from litevae.data.sources import open_images
    from litevae.data.squares import load_validation
    from litevae.evaluation.latent_space import (
        SIGMAS,
        collect_latents,
        distance_from_gaussian,
        draw_distances,
    )
    from litevae.evaluation.pictures import draw_reconstructions
    from litevae.files import replacing
    from litevae.latents.statistics import latent_statistics
    from litevae.models.interface import pixel_format

    if torch.accelerator.is_available():
        autoencoder.to(torch.accelerator.current_accelerator())
    images_of = pixel_format(autoencoder)
    images = open_images(data, images_of)
    samples = collect_latents(autoencoder, images, size, count, batch_size, choose_workers(workers))
    statistics = latent_statistics(samples)
    discrepancies = distance_from_gaussian(samples, groups=groups)
    shown = load_validation(images, size, PICTURES).images
    make_folder(output)
    with replacing(picture) as path:
        draw_reconstructions(
            autoencoder, [(Path(name).stem, pixels) for name, pixels in shown], path, principal=False
        )
    with replacing(plot) as path:
        draw_distances(statistics, discrepancies, path)
    record = {
        **provenance(model, data, size, pixels=str(images_of)),
        "count": statistics.count,
        "groups": groups,
        "latent": "sample",
        "mean": statistics.mean,
        "std": statistics.std,
        "scaling_factor": statistics.scaling_factor,
        "squared_mmd": [
            {
                "sigma": sigma,
                "scaled_sigma": d.sigma,
                "mean": d.mean,
                "std": d.std,
                "half_width_95": d.half_width,
            }
            for sigma, d in zip(SIGMAS, discrepancies, strict=True)
        ],
    }
    write_json(record, record_file)

    print(f"{statistics.count} images, middle square, {size} x {size}; samples of the posterior")
    for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True)):
        print(f"channel {channel}: mean {mean:.4f}, standard deviation {std:.4f}")
    print(f"{'sigma':>5}{'1000 MMD²':>16}, {groups} groups (± half the 95% confidence interval)")
    for sigma, d in zip(SIGMAS, discrepancies, strict=True):
        print(f"{sigma:5g}{1000 * d.mean:9.2f} ± {1000 * d.half_width:.2f}")
    print(f"see {record_file}, {picture} and {plot}")
