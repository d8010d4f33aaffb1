"""The mean and the spread of a model's latents, which diffusion models normalise them with."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.sources import ImageSource
from litevae.data.squares import SquareDataset
from litevae.errors import UserError
from litevae.files import replacing
from litevae.models.interface import Autoencoder, check_size, encode_pixels


@dataclass(frozen=True)
class LatentStatistics:
    """Of the latents of `count` images, sampled from their posteriors: the mean and standard deviation of each
    channel, and 1 / the standard deviation of all elements together, as in LDM (Rombach et al., 2022)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scaling_factor: float
    count: int


@torch.inference_mode()
def measure_latents(
    model: Autoencoder,
    images: ImageSource,
    size: int = 256,
    count: int = 10_000,
    batch_size: int = 16,
    workers: int = 4,
) -> LatentStatistics:
    """The statistics of the latents of images, of which the middle square is resized to `size` pixels.

    The posterior's variance is added to its mean's, so that nothing is drawn: the same images give the same
    numbers. Shows a progress bar on stderr.

    Args:
        model: of 3 channels; it runs on its own device and in its own dtype.
        images: of which `count` are taken at equal distances, or all if there are fewer; those that cannot
            be read are left out.

    Raises:
        UserError: a size that the model does not take, or no image that can be read.
    """
    check_size(model, size)
    channels = model.config.latent_channels
    first, second = (torch.zeros(channels, dtype=torch.float64, device=model.device) for _ in range(2))
    used = 0
    squares = SquareDataset(images, size, count)
    loader = DataLoader(squares, batch_size, num_workers=workers, collate_fn=squares.collate)
    for batch in tqdm(loader, unit="batch", mininterval=0.5):
        _, pixels = batch.readable
        if not len(pixels):
            continue
        posterior = encode_pixels(model, pixels)
        mean, std = posterior.mean.double(), posterior.std.double()
        first += mean.mean((2, 3)).sum(0)
        second += (mean.square() + std.square()).mean((2, 3)).sum(0)
        used += len(pixels)
    if not used:
        raise UserError("none of the images can be read")
    means, squares_mean = first / used, second / used
    spread = (squares_mean - means.square()).sqrt()
    total = (squares_mean.mean() - means.mean().square()).sqrt().item()
    if not 0 < total < float("inf"):
        raise UserError(f"the latents' standard deviation is {total}: this model cannot be scaled")
    return LatentStatistics(tuple(means.tolist()), tuple(spread.tolist()), 1 / total, used)


def store_scale(config: Path, found: LatentStatistics) -> None:
    """Writes the statistics into a model's config.json, where diffusers' pipelines look for them."""
    settings = json.loads(config.read_text(encoding="utf-8")) | {
        "scaling_factor": found.scaling_factor,
        "latents_mean": found.mean,
        "latents_std": found.std,
    }
    settings.pop("_name_or_path", None)  # diffusers' note of the folder that it was loaded from
    with replacing(config) as path:
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def latent_statistics(latents: Tensor) -> LatentStatistics:
    """Of (N, n_z, h, w) latents, as `litevae.latents.statistics.measure_latents`; UserError if all are equal."""
    channels = latents.double().transpose(0, 1).flatten(1)
    total = channels.std(correction=0).item()
    if not total > 0:
        raise UserError("the latents are all equal: this model cannot be scaled")
    return LatentStatistics(
        tuple(channels.mean(1).tolist()),
        tuple(channels.std(1, correction=0).tolist()),
        1 / total,
        len(latents),
    )
