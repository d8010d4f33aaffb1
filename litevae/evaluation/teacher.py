"""Comparison of an encoder's latents with those of the teacher that it was trained to replace."""

import math
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.batches import Batches
from litevae.data.sources import ImageSource
from litevae.data.squares import SquareDataset
from litevae.errors import UserError
from litevae.memory import check_batch
from litevae.models.interface import (
    Autoencoder,
    check_size,
    encode_pixels,
    shared_pixel_format,
    spatial_compression,
)


@dataclass(frozen=True)
class LatentErrors:
    """Root mean squares, over all elements of the latents of all images, of an encoder's errors.

    Attributes:
        sigmas: error of the mean, divided by the standard deviation of the teacher's posterior at that element. Two
            samples of the teacher's posterior differ by √2.
        relative: error of the mean, divided by the standard deviation of all of the teacher's means together.
        logvar: error of the log-variance.
        count: number of images.
    """

    sigmas: float
    relative: float
    logvar: float
    count: int


@torch.inference_mode()
def compare_latents(
    model: Autoencoder,
    teacher: Autoencoder,
    images: ImageSource,
    size: int = 256,
    count: int | None = None,
    batch_size: int = 16,
    workers: int = 4,
) -> LatentErrors:
    """Compares the posteriors of two models for images' middle squares, resized to `size` pixels.

    Under `torchrun` each process measures its share, and all return the same result. A progress bar is shown on
    stderr.

    Args:
        model: autoencoder; it runs on its own device and in its own dtype.
        teacher: autoencoder of the same latent shape, on the same device.
        images: source of the images; unreadable ones are left out.
        size: side of the squares in pixels.
        count: number of images, evenly spaced over the source; None takes all.
        batch_size: images per batch.
        workers: number of processes that decode images; 0 decodes in this one.

    Raises:
        UserError: the models' latents differ in shape, a model does not take this size, or no image can be read.
    """
    check_same_latents(model, teacher)
    for each in (model, teacher):
        check_size(each, size)
    check_batch(min(batch_size, len(images)), size, model.config.in_channels, model.device.type, "batch size")
    state = PartialState(cpu=not torch.accelerator.is_available())
    share = range(state.process_index, SquareDataset(images, size, count).count, state.num_processes)
    squares = SquareDataset(images, size, count, share)
    loader = DataLoader(squares, batch_size, num_workers=workers, collate_fn=squares.collate)
    # Sums of the three squared errors, of the teacher's means and of their squares; then the numbers of elements and
    # of images.
    sums = torch.zeros(7, dtype=torch.float64, device=model.device)
    for batch in tqdm(Batches(loader), unit="batch", mininterval=0.5, disable=not state.is_main_process):
        _, pixels = batch.readable
        if not len(pixels):
            continue
        own, target = (encode_pixels(each, pixels) for each in (model, teacher))
        mean = target.mean.double()
        error = own.mean.double() - mean
        logvar = target.logvar.double()
        sums += torch.stack(
            [
                (error.square() * torch.exp(-logvar)).sum(),
                error.square().sum(),
                (own.logvar.double() - logvar).square().sum(),
                mean.sum(),
                mean.square().sum(),
                mean.new_tensor(mean.numel()),
                mean.new_tensor(len(mean)),
            ]
        )
    sigmas, plain, logvars, first, second, elements, used = reduce(sums, "sum").tolist()
    if not used:
        raise squares.none_readable()
    variance = second / elements - (first / elements) ** 2
    return LatentErrors(
        math.sqrt(sigmas / elements),
        math.sqrt(plain / elements / variance) if variance > 0 else math.inf,
        math.sqrt(logvars / elements),
        int(used),
    )


def check_same_latents(model: Autoencoder, teacher: Autoencoder) -> None:
    """Raises UserError if the images of two models differ, or the shape of their latents."""
    shared_pixel_format({"the teacher": teacher, "the model": model})
    shapes = [(each.config.latent_channels, spatial_compression(each)) for each in (model, teacher)]
    if shapes[0] != shapes[1]:
        described = [f"{channels} channels at 1/{factor} of the side" for channels, factor in shapes]
        raise UserError(f"the teacher's latent has {described[1]}, and the model's {described[0]}")
