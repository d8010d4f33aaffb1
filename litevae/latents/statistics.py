"""Mean and standard deviation of a model's latents, with which diffusion models normalise them."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.batches import Batches
from litevae.data.sources import ImageSource
from litevae.data.squares import SquareDataset
from litevae.errors import UserError
from litevae.files import read_json, replacing
from litevae.memory import check_batch
from litevae.models.interface import Autoencoder, check_size, encode_pixels

STATISTICS = "latent_statistics.json"


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of latents that are sampled from the images' posteriors.

    Attributes:
        mean: mean per channel.
        std: standard deviation per channel.
        scaling_factor: 1 / the standard deviation of all elements together, as in LDM (Rombach et al., 2022).
        count: number of images.
    """

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
    """Measures the statistics of the latents of images, whose middle squares are resized to `size` pixels.

    Nothing is sampled: the variance of a posterior is added to that of the means, so that the same images give the
    same result. A progress bar appears on stderr.

    Args:
        model: autoencoder, which runs on its own device and in its own dtype.
        images: source of the images; unreadable ones are left out.
        size: side of the squares in pixels.
        count: maximum number of images, evenly spaced over the source.
        batch_size: images per batch.
        workers: number of processes that decode images; 0 decodes in this one.

    Raises:
        UserError: the model does not take this size, no image can be read, or the latents are constant or not finite.
    """
    check_size(model, size)
    check_batch(min(batch_size, len(images)), size, model.config.in_channels, model.device.type, "batch size")
    channels = model.config.latent_channels
    first, second = (torch.zeros(channels, dtype=torch.float64, device=model.device) for _ in range(2))
    used = 0
    squares = SquareDataset(images, size, count)
    loader = DataLoader(squares, batch_size, num_workers=workers, collate_fn=squares.collate)
    for batch in tqdm(Batches(loader), unit="batch", mininterval=0.5):
        _, pixels = batch.readable
        if not len(pixels):
            continue
        posterior = encode_pixels(model, pixels)
        mean, std = posterior.mean.double(), posterior.std.double()
        first += mean.mean((2, 3)).sum(0)
        second += (mean.square() + std.square()).mean((2, 3)).sum(0)
        used += len(pixels)
    if not used:
        raise squares.none_readable()
    means, squares_mean = first / used, second / used
    spread = (squares_mean - means.square()).sqrt()
    total = (squares_mean.mean() - means.mean().square()).sqrt().item()
    if not 0 < total < float("inf"):
        raise UserError(f"the latents' standard deviation is {total}: this model cannot be scaled")
    return LatentStatistics(tuple(means.tolist()), tuple(spread.tolist()), 1 / total, used)


def store_scale(config: Path, found: LatentStatistics) -> None:
    """Writes the scale into a model's config.json, in the one form that all pipelines of diffusers apply alike.

    They multiply by `scaling_factor`. Some also apply `latents_mean` and `latents_std`, on top of it, and some also
    `shift_factor`, which must not be None there. So only the first has an effect. The statistics of each channel go to
    a file of their own, which `read_statistics` reads and no pipeline of diffusers knows.
    """
    settings = json.loads(config.read_text(encoding="utf-8")) | {
        "scaling_factor": found.scaling_factor,
        "shift_factor": 0.0,
        "latents_mean": None,
        "latents_std": None,
    }
    settings.pop("_name_or_path", None)  # diffusers adds the folder that the model was loaded from
    for file, content in ((config.with_name(STATISTICS), asdict(found)), (config, settings)):
        with replacing(file) as path:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_statistics(folder: Path, scaling_factor: float, channels: int) -> LatentStatistics:
    """Reads the statistics that `store_scale` has written to a model's folder.

    Args:
        folder: folder of the model.
        scaling_factor: scaling_factor of its configuration.
        channels: number of its latent channels.

    Raises:
        UserError: there are none, they belong to another scale, or the file is damaged.
    """
    path, again = folder / STATISTICS, "run litevae scale, which measures each channel"
    if not path.is_file():
        raise UserError(f"{folder} holds no {STATISTICS}: {again}")
    try:
        content = read_json(path)
        found = LatentStatistics(
            tuple(map(float, content["mean"])),
            tuple(map(float, content["std"])),
            float(content["scaling_factor"]),
            int(content["count"]),
        )
        valid = len(found.mean) == len(found.std) == channels and min(found.std) > 0
        if not valid or not all(map(math.isfinite, (*found.mean, *found.std))):
            raise ValueError("mean and std")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception:  # the entries may be of any type
        raise UserError(f"{path}: does not hold the statistics of {channels} channels: {again}") from None
    if found.scaling_factor != scaling_factor:
        raise UserError(
            f"{path}: belongs to another scaling_factor than config.json's {scaling_factor}: {again}"
        )
    return found


def latent_statistics(latents: Tensor) -> LatentStatistics:
    """Returns the statistics of (N, n_z, h, w) latents; `UserError` if all elements are equal."""
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
