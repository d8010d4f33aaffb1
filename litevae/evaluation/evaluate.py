"""rFID, LPIPS, PSNR and SSIM of an autoencoder over any number of images."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.errors import UserError
from litevae.evaluation.metrics import batch_psnr, batch_ssim
from litevae.images import to_model_range, to_pixels
from litevae.losses.perceptual import LPIPS, explaining_weights, weights_path
from litevae.models.baseline import Autoencoder, check_only_size, spatial_compression
from litevae.training.checkpoint import replacing
from litevae.training.scale import Squares, stack_good
from litevae.training.sources import ImageSource

METRICS = ("rfid", "lpips", "psnr", "ssim")
SMALLEST = 16  # pixels, that VGG16 and SSIM's window take
SAVE_EVERY = 60.0  # seconds
# torch-fidelity's copy of the TensorFlow graph that FID is defined with
INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
INCEPTION_NAME = f"Inception of torch-fidelity, {Path(INCEPTION).stem}"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    `values` has the wanted metrics: rfid and lpips (lower is better, at least 0), psnr in dB and ssim (higher
    is better, at most 1). `count` images were measured, `unreadable` ones left out. `exact` is how many came
    back without an error; the mean PSNR leaves them out, theirs being infinite (it is infinite if all did).
    """

    values: dict[str, float]
    count: int
    unreadable: int
    exact: int


@torch.inference_mode()
def evaluate(
    model: Autoencoder,
    images: ImageSource,
    metrics: Sequence[str] = METRICS,
    size: int = 256,
    count: int | None = None,
    batch_size: int = 16,
    workers: int = 4,
    sample: bool = False,
    partial: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    features: nn.Module | None = None,
) -> Evaluation:
    """Measures reconstructions of images' middle squares, resized to `size` pixels.

    Images and reconstructions are rounded to 8 bits before every metric. PSNR, SSIM (Wang et al., 2004, as
    `litevae.evaluation.metrics.ssim`) and LPIPS (0.1, VGG16) are means over the images. rFID is the Fréchet
    distance (Heusel et al., 2017) of the 2048 Inception features, resized for as in the original. Under
    `torchrun` each process measures its share, and all return the same. Shows a progress bar on stderr.

    Args:
        model: of 3 channels; it runs on its own device and in its own dtype.
        metrics: some of `METRICS`.
        size: in pixels, a multiple of the model's factor, at least 16.
        count: that many images at equal distances; None takes all. Those that cannot be read are left out.
        sample: decodes a sample of the posterior, drawn for each image from its number, instead of the mode.
        partial: where the sums are kept meanwhile, once a minute: an evaluation that was interrupted goes on
            from there. Each process adds its number to the name. Removed at the end.
        identity: what else `partial` must have been written for, such as the weights; of plain values.
        features: instead of Inception, for rFID: (N, 3, size, size) uint8 to (N, C).

    Raises:
        UserError: a metric that there is not; a size or a number of channels that do not fit the model;
            weights of Inception or VGG16 that are neither there nor to be downloaded; too few images that can
            be read; a `partial` of another evaluation; or reconstructions that are not finite.
    """
    check(model, metrics, size)
    state = PartialState(cpu=not torch.accelerator.is_available())
    squares = Squares(images, size, len(images) if count is None else count)
    share = range(state.process_index, len(squares), state.num_processes)
    sums = Sums(metrics, features).to(model.device)
    settings = {
        **(identity or {}),
        "metrics": sorted(metrics),
        "size": size,
        "images": len(images),
        "share": [share.start, share.stop, share.step],
        "batch_size": batch_size,
        "sample": sample,
    }
    if partial is not None and state.num_processes > 1:
        partial = partial.with_name(f"{partial.name}-{state.process_index}")
    done = 0 if partial is None else sums.load(partial, settings)

    loader = DataLoader(
        Share(squares, share[done:]), batch_size, num_workers=workers, collate_fn=collate_numbered
    )
    saved = time.monotonic()
    with tqdm(
        total=len(share), initial=done, unit="image", mininterval=0.5, disable=not state.is_main_process
    ) as bar:
        for numbers, pixels, taken in loader:
            if numbers:
                sums.add(*reconstruct_batch(model, pixels, numbers if sample else None))
            sums.unreadable += taken - len(numbers)
            done += taken
            bar.update(taken)
            if partial is not None and time.monotonic() - saved > SAVE_EVERY:
                sums.save(partial, settings, done)
                saved = time.monotonic()
    result = sums.result()
    if partial is not None:
        partial.unlink(missing_ok=True)
    return result


def check(model: Autoencoder, metrics: Sequence[str], size: int) -> None:
    check_metrics(metrics)
    check_size(model, size)


def check_metrics(metrics: Sequence[str]) -> None:
    """UserError for one that there is not, or for none."""
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"there is no metric {metric!r}, only {', '.join(METRICS)}")
    if not metrics:
        raise UserError(f"no metrics given: name some of {', '.join(METRICS)}")


def check_size(model: Autoencoder, size: int) -> None:
    """UserError unless the model takes RGB images of `size` pixels."""
    if model.config.in_channels != 3:
        raise UserError(f"the model takes {model.config.in_channels} channels; images here have 3")
    check_only_size(model, size)
    factor = spatial_compression(model)
    if size % factor or size < max(SMALLEST, 2 * factor):
        raise UserError(
            f"size must be a multiple of {factor}, at least {max(SMALLEST, 2 * factor)}, got {size}"
        )


class Share(Dataset[tuple[int, Tensor | None]]):
    """Some of the squares, with their numbers."""

    def __init__(self, squares: Squares, numbers: range) -> None:
        self.squares, self.numbers = squares, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        return self.numbers[index], self.squares[self.numbers[index]]


def collate_numbered(items: Sequence[tuple[int, Tensor | None]]) -> tuple[list[int], Tensor, int]:
    """The numbers and the pixels of the images that can be read, and how many there are with the others."""
    numbers = [number for number, square in items if square is not None]
    return numbers, stack_good([square for _, square in items]), len(items)


def encode_batch(model: Autoencoder, pixels: Tensor) -> DiagonalGaussianDistribution:
    """The posterior of (N, 3, H, W) uint8 pixels; UserError where the model does not take their size, such as
    one with a Vision Transformer."""
    try:
        return model.encode(to_model_range(pixels).to(model.device, model.dtype)).latent_dist
    except ValueError as error:
        raise UserError(str(error)) from None


def reconstruct_batch(model: Autoencoder, pixels: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) uint8 on the model's device, and as much of it as its latents keep.

    Args:
        seeds: of each image's sample; None decodes the mode.
    """
    pixels = pixels.to(model.device)
    posterior = encode_batch(model, pixels)
    latent = posterior.mode() if seeds is None else sample_posterior(posterior, seeds)
    decoded: Tensor = model.decode(latent).sample
    if not decoded.isfinite().all():
        raise UserError("the model's reconstructions are not finite")
    return pixels, to_pixels(decoded)


def sample_posterior(posterior: DiagonalGaussianDistribution, seeds: Sequence[int]) -> Tensor:
    """A sample for each image from its own seed, drawn on the CPU: the same on any device and in any batch."""
    mean: Tensor = posterior.mean
    noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return mean + posterior.std * torch.stack(noise).to(mean)


class Sums(nn.Module):
    """What has been measured so far, in float64.

    Args:
        metrics: some of `METRICS`.
        features: as in `evaluate`.
    """

    sums: Tensor  # of psnr, ssim and lpips
    count: Tensor
    exact: Tensor
    unreadable: Tensor

    def __init__(self, metrics: Sequence[str], features: nn.Module | None) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self.lpips = LPIPS() if "lpips" in metrics else None
        self.fid = make_fid(features) if "rfid" in metrics else None
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))
        for name in ("count", "exact", "unreadable"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def add(self, images: Tensor, reconstructions: Tensor) -> None:
        """Two (N, 3, H, W) uint8 tensors."""
        if self.fid is not None:
            self.fid.update(images, real=True)
            self.fid.update(reconstructions, real=False)
        if self.lpips is not None:
            distance = self.lpips(to_model_range(images), to_model_range(reconstructions))
            self.sums[2] += distance.double() * len(images)
        ratios = batch_psnr(images, reconstructions)
        different = ratios.isfinite()
        self.sums[0] += ratios[different].sum()
        if "ssim" in self.metrics:
            self.sums[1] += batch_ssim(images, reconstructions).sum()
        self.count += len(images)
        self.exact += (~different).sum()

    def result(self) -> Evaluation:
        """Of all processes together."""
        sums = reduce(self.sums, "sum")
        count, exact, unreadable = (int(reduce(n, "sum")) for n in (self.count, self.exact, self.unreadable))
        if not count:
            raise UserError("none of the images can be read")
        different = count - exact
        values = {
            "psnr": sums[0].item() / different if different else torch.inf,
            "ssim": sums[1].item() / count,
            "lpips": sums[2].item() / count,
        }
        if self.fid is not None:
            if count < 2:
                raise UserError("rfid needs two images at least, and 1 can be read")
            self.fid.orig_dtype = torch.float64  # in which it gives its result
            values["rfid"] = self.fid.compute().item()
        return Evaluation({name: values[name] for name in self.metrics}, count, unreadable, exact)

    def save(self, path: Path, settings: Mapping[str, Any], done: int) -> None:
        fid = {} if self.fid is None else {name: getattr(self.fid, name) for name in self.fid._defaults}
        own = {name: getattr(self, name) for name in ("sums", "count", "exact", "unreadable")}
        with replacing(path) as temporary:
            torch.save({"settings": dict(settings), "done": done, "own": own, "fid": fid}, temporary)

    def load(self, path: Path, settings: Mapping[str, Any]) -> int:
        """How many images of this process's share are done; 0 if there is no such file.

        Raises:
            UserError: the file belongs to another evaluation, or cannot be read.
        """
        if not path.exists():
            return 0
        try:
            saved = torch.load(path, map_location=self.sums.device, weights_only=True)
            same = saved["settings"] == dict(settings)
        except Exception as error:  # torch.load raises almost anything
            raise UserError(f"{path}: cannot be read ({type(error).__name__}): delete it") from None
        if not same:
            raise UserError(
                f"{path} was left by an interrupted evaluation with other settings: delete it, or write elsewhere"
            )
        for name, value in saved["own"].items():
            getattr(self, name).copy_(value)
        if self.fid is not None:
            for name, value in saved["fid"].items():
                setattr(self.fid, name, value)
            self.fid._update_count = 1  # or it warns that it has seen nothing
        return int(saved["done"])


def make_fid(features: nn.Module | None) -> FrechetInceptionDistance:
    """Of Inception's features, or of others; UserError where Inception's weights are not to be had."""
    if features is not None:
        return FrechetInceptionDistance(feature=features)
    path = weights_path(INCEPTION)
    with explaining_weights(INCEPTION, "torch-fidelity's Inception"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path))
        # before it is unpickled, which could run anything
        wanted = path.stem.rpartition("-")[2]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(wanted):
            raise RuntimeError(f"its SHA-256 begins with {found[:8]}, not {wanted}")
        # antialias=False: FID is defined with TensorFlow's plain bilinear resizing
        return FrechetInceptionDistance(
            feature=2048, feature_extractor_weights_path=str(path), antialias=False
        )
