"""rFID, LPIPS, ST-LPIPS, PSNR and SSIM of an autoencoder over any number of images."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.batches import Batches
from litevae.data.pixels import to_model_range
from litevae.data.sources import ImageSource
from litevae.data.squares import SquareDataset
from litevae.errors import UserError
from litevae.evaluation.fid import make_fid, share_features
from litevae.evaluation.metrics import (
    DEFAULT_METRICS,
    METRICS,
    batch_psnr,
    batch_ssim,
    check_metric_sizes,
    check_metrics_apply,
    distance_networks,
)
from litevae.evaluation.reconstruction import reconstruct_batch
from litevae.evaluation.saved import saving
from litevae.evaluation.yardsticks import YARDSTICKS, make_yardsticks
from litevae.files import open_regular, replacing
from litevae.memory import check_batch
from litevae.models.interface import Autoencoder, check_images, check_size, pixel_format

SAVE_EVERY = 60.0  # seconds
AVERAGED = ("psnr", "ssim", "lpips", "st_lpips")  # means over the images
SUMS = ("sums", "count", "exact", "unreadable")  # buffers of `Sums`
REAL = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")  # states of the FID
MODEL = "model"
MEASURED = (MODEL, *YARDSTICKS)


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    `values` holds the requested metrics: rfid, lpips and st_lpips (0 or more; lower is better), psnr in dB, and ssim
    (1 or less; higher is better). `count` images were measured and `unreadable` ones left out. `exact` of them were
    reconstructed without an error. Their PSNR is infinite, so the mean PSNR leaves them out; it is infinite if all
    images are exact. `yardsticks` holds the same metrics of each yardstick on the same pixels.
    """

    values: dict[str, float]
    count: int
    unreadable: int
    exact: int
    yardsticks: dict[str, dict[str, float]] = field(default_factory=dict)


@torch.inference_mode()
def evaluate(
    model: Autoencoder,
    images: ImageSource,
    metrics: Sequence[str] = DEFAULT_METRICS,
    size: int = 256,
    count: int | None = None,
    batch_size: int = 16,
    workers: int = 4,
    sample: bool = False,
    partial: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    features: nn.Module | None = None,
    save: Path | None = None,
) -> Evaluation:
    """Measures the reconstructions of images' middle squares, resized to `size` pixels.

    Images and reconstructions are rounded to 8 bits before every metric; those of a model with a range of values are
    only clipped to it. PSNR, SSIM (Wang et al., 2004, as `litevae.evaluation.metrics.ssim`), LPIPS (0.1, VGG16) and
    ST-LPIPS (AlexNet) are means over the images. rFID is the Fréchet distance (Heusel et al., 2017) of the
    2048 Inception features; images are resized for Inception as in the original. The yardsticks of
    `litevae.evaluation.yardsticks` are measured beside the model. Under `torchrun` each process measures its share,
    and all return the same result. A progress bar is shown on stderr.

    Args:
        model: autoencoder; it runs on its own device and in its own dtype.
        images: source of images in the model's format.
        metrics: names from `METRICS`.
        size: side of the squares in pixels, a multiple of the model's compression factor f, at least 2 f and 16.
        count: number of images, evenly spaced over the source; None takes all. Unreadable images are left out.
        batch_size: images per batch.
        workers: number of processes that decode images; 0 decodes in this one.
        sample: whether to decode a sample of the posterior, seeded by the image's number, instead of the mode.
        partial: file that the sums are saved to once per minute, so that an interrupted evaluation can continue.
            Each of several processes appends its number to the name. The file is removed at the end.
        identity: plain values that identify the evaluation, such as the hash of the weights; `partial` is only
            continued if they are the same.
        features: network that replaces Inception for rFID: (N, 3, size, size) uint8 to (N, C).
        save: where to save the reconstructions, as `litevae.evaluation.saved.saving` takes it. An .npz is not
            continued, so `partial` must be None with it.

    Raises:
        UserError: a metric is unknown, or not for such images; the model does not take these images, or this size; the
            weights of Inception or VGG16 are missing and cannot be downloaded, or the package of st_lpips is missing;
            too few images can be read; `partial` belongs to another evaluation; or a reconstruction is not finite.
    """
    check_metrics(metrics)
    check_size(model, size)
    check_metric_sizes(metrics, [size])
    check_images(model, images)
    check_metrics_apply(metrics, pixel_format(model))
    check_batch(min(batch_size, len(images)), size, model.config.in_channels, model.device.type, "batch size")
    state = PartialState(cpu=not torch.accelerator.is_available())
    share = range(state.process_index, SquareDataset(images, size, count).count, state.num_processes)
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

    squares = SquareDataset(images, size, count, share[done:])
    loader = DataLoader(squares, batch_size, num_workers=workers, collate_fn=squares.collate)
    saved = time.monotonic()
    with (
        saving(save, state, pixel_format(model)) as save_batch,
        tqdm(
            total=len(share), initial=done, unit="image", mininterval=0.5, disable=not state.is_main_process
        ) as bar,
    ):
        for batch in Batches(loader):
            numbers, pixels = batch.readable
            if numbers:
                pixels, reconstructions = reconstruct_batch(model, pixels, numbers if sample else None)
                sums.add(pixels, {MODEL: reconstructions, **make_yardsticks(model, pixels)})
                save_batch(numbers, reconstructions)
            sums.unreadable += len(batch.errors)
            done += len(batch.numbers)
            bar.update(len(batch.numbers))
            if partial is not None and time.monotonic() - saved > SAVE_EVERY:
                sums.save(partial, settings, done)
                saved = time.monotonic()
    if not int(reduce(sums.count, "sum")):
        raise squares.none_readable()
    result = sums.result()
    if partial is not None:
        partial.unlink(missing_ok=True)
    return result


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises UserError if a metric is unknown, or if there is none."""
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"unknown metric {metric!r}: choose from {', '.join(METRICS)}")
    if not metrics:
        raise UserError(f"no metrics given: name some of {', '.join(METRICS)}")


class Sums(nn.Module):
    """Running sums of the metrics of the model and of each yardstick, in float64.

    Args:
        metrics: names from `METRICS`.
        features: network that replaces Inception, as in `evaluate`.
    """

    sums: Tensor  # a row for each of `MEASURED`, a column for each of `AVERAGED`
    count: Tensor
    exact: Tensor  # one for each of `MEASURED`
    unreadable: Tensor

    def __init__(self, metrics: Sequence[str], features: nn.Module | None) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self.networks = distance_networks(metrics)
        self.fids: dict[str, FrechetInceptionDistance] = {}
        if "rfid" in metrics:
            first = make_fid(features)
            self.fids = {MODEL: first} | {name: share_features(first) for name in YARDSTICKS}
        self.fid_modules = nn.ModuleList(self.fids.values())  # for `to`
        self.register_buffer("sums", torch.zeros(len(MEASURED), len(AVERAGED), dtype=torch.float64))
        self.register_buffer("exact", torch.zeros(len(MEASURED), dtype=torch.int64))
        for name in ("count", "unreadable"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def add(self, images: Tensor, reconstructions: Mapping[str, Tensor]) -> None:
        """Adds (N, C, H, W) images and their reconstructions by each of `MEASURED`."""
        if self.fids:
            self.fids[MODEL].update(images, real=True)
        for row, name in enumerate(MEASURED):
            restored = reconstructions[name]
            if self.fids:
                self.fids[name].update(restored, real=False)
            ratios = batch_psnr(images, restored)
            different = ratios.isfinite()
            totals = {"psnr": ratios[different].sum()}
            if "ssim" in self.metrics:
                totals["ssim"] = batch_ssim(images, restored).sum()
            for metric, network in self.networks.items():
                distance = network(to_model_range(images), to_model_range(restored))
                totals[metric] = distance.double() * len(images)
            for metric, total in totals.items():
                self.sums[row, AVERAGED.index(metric)] += total
            self.exact[row] += (~different).sum()
        self.count += len(images)

    def result(self) -> Evaluation:
        """Returns the metrics over the images of all processes, one of which must have measured some."""
        sums = reduce(self.sums, "sum")
        exact: list[int] = reduce(self.exact, "sum").tolist()
        count, unreadable = (int(reduce(n, "sum")) for n in (self.count, self.unreadable))
        if self.fids and count < 2:
            raise UserError("rfid needs at least two images, and only 1 can be read")
        found: dict[str, dict[str, float]] = {}
        for row, name in enumerate(MEASURED):
            different = count - exact[row]
            totals = dict(zip(AVERAGED, sums[row].tolist(), strict=True))
            values = {metric: total / count for metric, total in totals.items()}
            values["psnr"] = totals["psnr"] / different if different else torch.inf
            if self.fids:
                values["rfid"] = self.fid(name)
            found[name] = {metric: values[metric] for metric in self.metrics}
        own = found.pop(MODEL)
        return Evaluation(own, count, unreadable, exact[0], found)

    def fid(self, name: str) -> float:
        """Returns the Fréchet distance of one of `MEASURED`. The images' statistics are those of the model's."""
        fid = self.fids[name]
        for state in REAL:
            setattr(fid, state, getattr(self.fids[MODEL], state).clone())
        fid.orig_dtype = torch.float64  # the dtype of its result
        return float(fid.compute().item())

    def save(self, path: Path, settings: Mapping[str, Any], done: int) -> None:
        fid = {
            name: {state: getattr(fid, state) for state in fid._defaults} for name, fid in self.fids.items()
        }
        own = {name: getattr(self, name) for name in SUMS}
        with replacing(path) as temporary:
            torch.save({"settings": dict(settings), "done": done, "own": own, "fid": fid}, temporary)

    def load(self, path: Path, settings: Mapping[str, Any]) -> int:
        """Restores the sums; returns how many images of this process's share are done, 0 if there is no file.

        Raises:
            UserError: the file belongs to another evaluation, or cannot be read.
        """
        if not path.exists():
            return 0
        try:
            with open_regular(path) as file:
                saved = torch.load(file, map_location=self.sums.device, weights_only=True)
            same = saved["settings"] == dict(settings)
        except Exception as error:  # torch.load raises almost anything
            raise UserError(f"{path}: cannot be read ({type(error).__name__}): delete it") from None
        if not same:
            raise UserError(
                f"{path} was left by an interrupted evaluation with other settings: delete it, or write elsewhere"
            )
        try:
            for name in SUMS:
                getattr(self, name).copy_(saved["own"][name])
            for name, fid in self.fids.items():
                for state in fid._defaults:
                    setattr(fid, state, getattr(fid, state).copy_(saved["fid"][name][state]))
                fid._update_count = 1  # without it, torchmetrics warns that nothing was added
            return int(saved["done"])
        except Exception as error:  # the entries may be of any type
            raise UserError(f"{path}: cannot be read ({type(error).__name__}): delete it") from None
