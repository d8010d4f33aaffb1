"""FID of a diffusion model's samples."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.batches import Batches
from litevae.data.pixels import RGB, PixelFormat
from litevae.data.sources import ImageSource, open_images
from litevae.data.squares import SquareDataset
from litevae.diffusion.config import DiffusionConfig
from litevae.diffusion.pipeline import LatentDiffusionPipeline, generate
from litevae.errors import UserError
from litevae.evaluation.fid import INCEPTION, make_fid
from litevae.files import weights_path


def prepare_fid(config: DiffusionConfig, pixel_format: PixelFormat = RGB) -> ImageSource | str:
    """Returns the images to compare samples with, or the reason for not measuring FID.

    Args:
        config: settings of the run.
        pixel_format: what the autoencoder's images are.

    Raises:
        UserError: `fid.measure` is "always" and there are no images, or the autoencoder's are not RGB of 8 bits; or the
            weights are missing and cannot be downloaded; or the images cannot be opened.
    """
    settings = config.fid
    if settings.measure == "never":
        return "fid.measure is never"
    if pixel_format != RGB:
        reason = f"FID compares RGB images of 8 bits, and the autoencoder's are {pixel_format}"
        if settings.measure == "always":
            raise UserError(f"fid.measure=always: {reason}")
        return reason
    path = settings.images or config.data.train
    if not path:
        reason = "there are no images to compare with: give them as fid.images"
        if settings.measure == "always":
            raise UserError(f"fid.measure=always: {reason}")
        return reason
    weights = weights_path(INCEPTION)
    if settings.measure == "auto" and not weights.exists():
        return f"{weights} is missing: put {INCEPTION} there, or set fid.measure=always to download it"
    images = open_images(path)
    if len(images) < 2:
        raise UserError(f"fid.images: {path} has {len(images)} image, and FID needs at least two")
    make_fid(None)  # any failure should come before the training, not after it
    return images


@dataclass(frozen=True)
class FID:
    """The FID, at least 0, from `images` images; `unreadable` others were left out."""

    value: float
    images: int
    unreadable: int


@torch.inference_mode()
def measure_fid(
    pipeline: LatentDiffusionPipeline,
    images: ImageSource,
    size: int,
    config: DiffusionConfig,
    features: nn.Module | None = None,
) -> FID:
    """Measures the Fréchet distance (Heusel et al., 2017) between samples and images.

    `config.fid.count` samples, with the seeds from `config.seed` on, are compared with the middle squares of all
    images, resized to `size` pixels; both are rounded to 8 bits. Under `torchrun` each process takes its share,
    and all return the same result. Progress bars are shown on stderr.

    Args:
        pipeline: pipeline that draws the samples.
        images: source of the images; unreadable ones are left out.
        size: side of the squares in pixels.
        config: settings of the run.
        features: network that replaces Inception: (N, 3, size, size) uint8 to (N, C).

    Raises:
        UserError: the weights of Inception are missing and cannot be downloaded, or fewer than two images can be
            read.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    fid = make_fid(features).to(pipeline.device)
    squares = SquareDataset(
        images, size, numbers=range(state.process_index, len(images), state.num_processes)
    )
    numbers = range(state.process_index, config.fid.count, state.num_processes)
    loader = DataLoader(
        squares,
        config.sample.batch_size,
        num_workers=config.data.workers,
        collate_fn=squares.collate,
    )
    quiet = not state.is_main_process
    used = torch.zeros((), dtype=torch.int64, device=pipeline.device)
    with tqdm(total=len(squares), unit="image", desc="FID: images", mininterval=0.5, disable=quiet) as bar:
        for batch in Batches(loader):
            _, readable = batch.readable
            if len(readable):
                fid.update(readable.to(pipeline.device), real=True)
                used += len(readable)
            bar.update(len(batch.numbers))
    with tqdm(total=len(numbers), unit="image", desc="FID: samples", mininterval=0.5, disable=quiet) as bar:
        for pixels in generate(pipeline, numbers, config.seed, config.sample.steps, config.sample.batch_size):
            fid.update(pixels, real=False)
            bar.update(len(pixels))
    fid.orig_dtype = torch.float64  # the dtype of its result
    try:
        value = float(fid.compute())
    except RuntimeError as error:  # torchmetrics has too few images
        raise UserError(f"FID: {' '.join(str(error).split())}") from None
    images_used = int(reduce(used, "sum"))
    return FID(value, images_used, len(images) - images_used)
