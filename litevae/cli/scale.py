"""`litevae scale`."""

from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import (
    BatchSizeOption,
    CountOption,
    DataArgument,
    SizeOption,
    WorkersOption,
    choose_workers,
)
from litevae.models.loading import load_model, model_folder


def scale(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model, or of a training run.")],
    data: DataArgument,
    size: SizeOption = 256,
    count: CountOption = 10_000,
    batch_size: BatchSizeOption = 16,
    workers: WorkersOption = None,
) -> None:
    """Measure a model's latents and store their scale in its config.json.

    \b
    Example: litevae scale runs/imagenet-b path/to/images
             litevae scale runs/demo demo --size 64

    Stores scaling_factor, the reciprocal of the standard deviation of all latents together, by which diffusers'
    pipelines multiply latents. It sets shift_factor to 0 and removes latents_mean and latents_std, which only some
    pipelines apply. The mean and standard deviation of each channel are printed, and stored in latent_statistics.json
    beside it for litevae train-diffusion normalise=channel. Images are cropped to the middle square. When a run is
    resumed it writes a new model, whose scale must be measured again.
    """
    autoencoder = load_model(model)
    config = model_folder(model) / "config.json"
    import torch

    from litevae.data.sources import open_images
    from litevae.errors import UserError
    from litevae.latents.statistics import measure_latents, store_scale
    from litevae.models.interface import pixel_format
    from litevae.training.checkpoint import MANIFEST

    if (config.parent.parent / MANIFEST).is_file():
        raise UserError(f"{model}: belongs to a checkpoint, which must not change: copy the model first")
    if torch.accelerator.is_available():
        autoencoder.to(torch.accelerator.current_accelerator())
    images = open_images(data, pixel_format(autoencoder))
    found = measure_latents(autoencoder, images, size, count, batch_size, choose_workers(workers))
    store_scale(config, found)

    print(f"{found.count} images of {size} x {size} pixels")
    for channel, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
        print(f"channel {channel}: mean {mean:.4f}, standard deviation {std:.4f}")
    print(f"scaling_factor {found.scaling_factor:.5f}, stored in {config}")
