"""rFID, LPIPS, PSNR and SSIM of an autoencoder over any number of images."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.images import to_model_range
from litevae.data.sources import ImageSource
from litevae.data.squares import SquareDataset
from litevae.errors import UserError
from litevae.evaluation.fid import make_fid
from litevae.evaluation.metrics import batch_psnr, batch_ssim
from litevae.evaluation.reconstruction import reconstruct_batch
from litevae.files import replacing
from litevae.losses.perceptual import LPIPS
from litevae.models.interface import Autoencoder, check_size

METRICS = ("rfid", "lpips", "psnr", "ssim")
SAVE_EVERY = 60.0  # seconds


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
    with tqdm(
        total=len(share), initial=done, unit="image", mininterval=0.5, disable=not state.is_main_process
    ) as bar:
        for batch in loader:
            numbers, pixels = batch.readable
            if numbers:
                sums.add(*reconstruct_batch(model, pixels, numbers if sample else None))
            sums.unreadable += len(batch.errors)
            done += len(batch.numbers)
            bar.update(len(batch.numbers))
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
