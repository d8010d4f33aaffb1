"""The mean and the spread of a model's latents, which diffusion models normalise them with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.errors import UserError
from litevae.images import BadImage, to_model_range
from litevae.models.baseline import Autoencoder, check_only_size, spatial_compression
from litevae.training.checkpoint import replacing
from litevae.training.data import load_square
from litevae.training.sources import ImageSource


@dataclass(frozen=True)
class LatentStatistics:
    """Of the latents of `count` images, sampled from their posteriors: the mean and standard deviation of each
    channel, and 1 / the standard deviation of all elements together, as in LDM (Rombach et al., 2022)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scaling_factor: float
    count: int


class Squares(Dataset[Tensor | None]):
    """The middle squares of `count` images at equal distances, (3, size, size) uint8; None where one is bad."""

    def __init__(self, images: ImageSource, size: int, count: int) -> None:
        self.images, self.size, self.count = images, size, min(count, len(images))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor | None:
        try:
            return load_square(self.images, index * len(self.images) // self.count, self.size)
        except BadImage:
            return None


def stack_good(squares: Sequence[Tensor | None]) -> Tensor:
    good = [square for square in squares if square is not None]
    return torch.stack(good) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)


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
    if size % spatial_compression(model):
        raise UserError(f"size must be a multiple of {spatial_compression(model)}, got {size}")
    check_only_size(model, size)
    channels = model.config.latent_channels
    first, second = (torch.zeros(channels, dtype=torch.float64, device=model.device) for _ in range(2))
    used = 0
    loader = DataLoader(Squares(images, size, count), batch_size, num_workers=workers, collate_fn=stack_good)
    for squares in tqdm(loader, unit="batch", mininterval=0.5):
        if not len(squares):
            continue
        posterior = model.encode(to_model_range(squares).to(model.device, model.dtype)).latent_dist
        mean, std = posterior.mean.double(), posterior.std.double()
        first += mean.mean((2, 3)).sum(0)
        second += (mean.square() + std.square()).mean((2, 3)).sum(0)
        used += len(squares)
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
