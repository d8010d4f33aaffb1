"""Encoding a data set: images decoded by worker processes while the model encodes and a thread writes."""

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.errors import UserError
from litevae.images import BadImage, to_model_range
from litevae.latents.shards import (
    FORMAT,
    MIRRORED,
    MOMENTS,
    Shard,
    find_damage,
    note_of,
    read_head,
    read_note,
    write_index,
    write_shard,
)
from litevae.models import LiteVAE
from litevae.models.baseline import Autoencoder, check_only_size, spatial_compression
from litevae.training.build import NOT_ARCHITECTURE
from litevae.training.data import BadImages, load_square
from litevae.training.feed import obey_parent_only
from litevae.training.report import versions
from litevae.training.sources import ImageSource
from litevae.training.stop import StopRequest

Precision = Literal["bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CROP = "the middle square, resized by Pillow's antialiased bicubic"
AHEAD = 2  # batches that a GPU is given ahead, and shards that may wait to be written
NOTICEABLE = 0.1  # share of the time that is worth a hint


@dataclass(frozen=True)
class Settings:
    """What an encoded data set depends on beside the model and the images; a folder keeps to its own.

    Args:
        size: side of the squares in pixels: the middle of each image, resized.
        precision: "bf16" or "fp32", which the model runs in.
        mirror: also encode each image mirrored from left to right.
        shard_size: images for a file.
    """

    size: int = 256
    precision: Precision = "fp32"
    mirror: bool = False
    shard_size: int = 1024


@dataclass(frozen=True)
class Encoding:
    """What `encode_images` did.

    `total`: images in the data; `before`: those that earlier runs had done; `done`: those of this run; `bad`:
    those of all runs that cannot be read. `seconds`: from the first batch on; `encoder_seconds` of them in the
    model, `waited` for images and `waited_to_write` for the disk. `stopped_by`: the signal that ended the run
    early, else None.
    """

    folder: Path
    total: int
    before: int
    done: int
    bad: int
    seconds: float
    encoder_seconds: float
    waited: float
    waited_to_write: float
    stopped_by: str | None

    @property
    def bottleneck(self) -> Literal["decoding images", "writing", "the encoder"]:
        if self.waited >= max(NOTICEABLE * self.seconds, self.waited_to_write):
            return "decoding images"
        return "writing" if self.waited_to_write >= NOTICEABLE * self.seconds else "the encoder"


def choose_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it: a GPU that has it, a CPU with AVX512-BF16 or AMX; else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"


def encode_images(
    model: Autoencoder,
    images: ImageSource,
    folder: Path,
    settings: Settings,
    batch_size: int = 8,
    workers: int = 4,
    max_bad_fraction: float = 0.01,
    compile: bool = False,
) -> Encoding:
    """Writes the posteriors of all images to `folder`, as `litevae.latents.shards` describes.

    Goes on where an earlier run on the same folder, with the same model, images and settings, ended in whatever
    way; its shards are checked, and encoded again where they are damaged. On one machine the files do not
    depend on how often it was ended, nor on `workers`. SIGINT or SIGTERM ends the run after the current batch;
    the shard that is not complete then is encoded again by the next run.
    Images that cannot be read are left out and listed in bad_images.txt. Shows a progress bar on stderr.

    Args:
        model: of 3 channels, on the device to run on. It is converted to the settings' precision, in place.
        batch_size: images at a time.
        workers: processes that decode images; 0: this one.
        max_bad_fraction: of the images that may be bad.
        compile: use `torch.compile` on the encoder.

    Raises:
        UserError: a size that the model does not take, a folder of something else or with other settings, too
            many images that cannot be read, or latents that are not finite.
        OSError: the disk is full, for example.
    """
    with StopRequest() as stop:
        run = Run(model, images, folder, settings, batch_size, max_bad_fraction)
        return run(workers, compile, stop)


class Batch(NamedTuple):
    images: Tensor  # (N, 3, size, size) uint8; black where an image is bad
    labels: list[str | None]
    bad: dict[int, str]  # number of the image: why it cannot be read


class Squares(Dataset[tuple[int, Tensor | str, str | None]]):
    """For each image its number, its middle square or why there is none, and its label."""

    def __init__(self, images: ImageSource, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str, str | None]:
        try:
            return index, load_square(self.images, index, self.size), self.images.label(index)
        except BadImage as reason:
            return index, str(reason), None

    def collate(self, items: Sequence[tuple[int, Tensor | str, str | None]]) -> Batch:
        black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        squares = [black if isinstance(square, str) else square for _, square, _ in items]
        bad = {index: square for index, square, _ in items if isinstance(square, str)}
        return Batch(torch.stack(squares), [label for *_, label in items], bad)


class BatchedEncoder:
    """Moments of batches; on a GPU a few of them are under way when a call returns.

    `seconds` of the device's time so far, after `finish`.
    """

    def __init__(self, model: Autoencoder, mirror: bool) -> None:
        self.model, self.mirror = model, mirror
        self.seconds = 0.0
        self.under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 on the CPU to (N, 2 n_z, h, w) float16 on the model's device, stacked with those of
        the mirrored images to (1 or 2, N, 2 n_z, h, w)."""
        device = self.model.device
        if device.type != "cuda":
            start = time.perf_counter()
            moments = self.encode(pixels.to(device))
            if device.type != "cpu":
                torch.accelerator.synchronize()
            self.seconds += time.perf_counter() - start
            return moments
        pixels = pixels.to(device, non_blocking=True)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        moments = self.encode(pixels)
        end.record()
        self.under_way.append((begin, end))
        self.finish(AHEAD)
        return moments

    def finish(self, but: int = 0) -> None:
        """Waits until all batches are done but so many."""
        while len(self.under_way) > but:
            begin, end = self.under_way.popleft()
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000

    def encode(self, pixels: Tensor) -> Tensor:
        image = to_model_range(pixels)
        if not isinstance(self.model, LiteVAE):  # whose first operator converts
            image = image.to(self.model.dtype)
        image = image.contiguous(memory_format=torch.channels_last)
        posteriors = [self.model.encode(each).latent_dist for each in self.copies(image)]
        return torch.stack([torch.cat([each.mean, each.logvar], dim=1).half() for each in posteriors])

    def copies(self, image: Tensor) -> Iterator[Tensor]:
        yield image
        if self.mirror:
            yield image.flip(-1)


class Run:
    """One run on a folder: `__init__` finds out what there is to do, the call does it."""

    def __init__(
        self,
        model: Autoencoder,
        images: ImageSource,
        folder: Path,
        settings: Settings,
        batch_size: int,
        max_bad_fraction: float,
    ) -> None:
        factor = spatial_compression(model)
        if settings.size % factor or settings.size < 2 * factor:
            raise UserError(
                f"size must be a multiple of {factor} of at least {2 * factor}, got {settings.size}"
            )
        check_only_size(model, settings.size)
        if model.config.in_channels != 3:
            raise UserError(f"the model takes {model.config.in_channels} channels; images here have 3")
        self.model, self.images, self.folder, self.settings = model, images, folder, settings
        self.batch_size = batch_size
        self.head = self.describe(factor)
        self.shards = self.begin()
        bad_list = folder / "bad_images.txt"
        bad_list.unlink(missing_ok=True)
        self.bad = BadImages(bad_list, len(images), max_bad_fraction, setting="--max-bad-fraction")
        self.bad.add(pair for shard in self.shards.values() for pair in shard.bad.items())
        # diffusers' own `to` warns of modules to keep in float32, of which there are none
        torch.nn.Module.to(model, DTYPES[settings.precision])
        model.to(memory_format=torch.channels_last)
        model.eval()

    def describe(self, factor: int) -> dict[str, Any]:
        """index.json without the shards."""
        config = {name: value for name, value in self.model.config.items() if not name.startswith("_")}
        side = self.settings.size // factor
        return {
            "format": FORMAT,
            "complete": False,
            "model": {
                "class": type(self.model).__name__,
                "sha256": hash_encoder(self.model),
                "config": config,
            },
            "images": {"count": len(self.images), "sha256": hash_keys(self.images)},
            "encoding": {**asdict(self.settings), "crop": CROP},
            "latents": {
                "dtype": "float16",
                "shape": [2 * config["latent_channels"], side, side],
                **{
                    name: config.get(name)
                    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
                },
            },
            "versions": versions(),
        }

    def begin(self) -> dict[int, Shard]:
        """Makes the folder, or finds its whole shards; UserError if it is another one's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*.tmp.*"):  # of a run that was killed
                path.unlink(missing_ok=True)
            there = read_head(self.folder)
            if there is None:
                if any(self.folder.iterdir()):
                    raise UserError(f"{self.folder}: has files, and no encoded images: give another folder")
                write_index(self.folder, self.head, [])
                return {}
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None
        self.compare(there)
        listed = dict(enumerate(there["shards"]))
        shards = {}
        for number in range(self.count_shards()):
            shard = read_note(self.folder, number) or listed.get(number)
            if shard is None:
                continue
            damage = find_damage(self.folder, shard)
            if damage is None:
                shards[number] = shard
            else:
                print(f"{self.folder / shard.file}: {damage}; it is encoded again", file=sys.stderr)
        return shards

    def compare(self, there: dict[str, Any]) -> None:
        """UserError unless the folder was begun with the same model, images and settings."""
        changes = [
            f"{name.replace('_', ' ')} {there['encoding'].get(name)}, not {value}"
            for name, value in self.head["encoding"].items()
            if there["encoding"].get(name) != value
        ]
        count, now = there["images"]["count"], len(self.images)
        if count != now:
            changes.append(f"{count} images, not {now}")
        elif there["images"] != self.head["images"]:
            changes.append("images of other names")
        if there["model"]["sha256"] != self.head["model"]["sha256"]:
            changes.append("another model")
        if changes:
            raise UserError(
                f"{self.folder}: was begun with {', '.join(changes)}: give the same, or another folder"
            )

    def count_shards(self) -> int:
        return -(-len(self.images) // self.settings.shard_size)

    def stretch(self, number: int) -> range:
        """The images of a shard, by their numbers in the data."""
        first = number * self.settings.shard_size
        return range(first, min(first + self.settings.shard_size, len(self.images)))

    def batches(self, number: int) -> Iterator[range]:
        stretch = self.stretch(number)
        return (stretch[i : i + self.batch_size] for i in range(0, len(stretch), self.batch_size))

    @torch.inference_mode()
    def __call__(self, workers: int, compile: bool, stop: StopRequest) -> Encoding:
        todo = [number for number in range(self.count_shards()) if number not in self.shards]
        before = sum(shard.images for shard in self.shards.values())
        encoder = BatchedEncoder(self.model, self.settings.mirror)
        if compile and todo:
            self.model.encoder.compile(dynamic=False)
        squares = Squares(self.images, self.settings.size)
        loader = DataLoader(
            squares,
            batch_sampler=[list(batch) for number in todo for batch in self.batches(number)],
            collate_fn=squares.collate,
            num_workers=workers,
            pin_memory=self.model.device.type == "cuda",
            worker_init_fn=obey_parent_only,
        )
        done, waited, waited_to_write, begun = 0, 0.0, 0.0, time.perf_counter()
        # into a file or a pipe a line now and then is enough
        interval = 0.5 if sys.stderr.isatty() else 10
        with (
            ThreadPoolExecutor(1) as writer,
            tqdm(
                total=len(self.images), initial=before, unit="image", mininterval=interval, disable=not todo
            ) as bar,
        ):
            writing: deque[Future[None]] = deque()
            batches = iter(loader)
            try:
                for number in todo:
                    parts: list[Tensor] = []
                    labels: list[str | None] = []
                    bad: dict[int, str] = {}
                    for numbers in self.batches(number):
                        start = time.perf_counter()
                        batch = next(batches)
                        if done:
                            waited += time.perf_counter() - start
                        else:  # the workers' start is no measure of them
                            begun = time.perf_counter()
                        bad |= batch.bad
                        self.bad.add((self.images.key(index), reason) for index, reason in batch.bad.items())
                        parts.append(encoder(batch.images))
                        labels += batch.labels
                        done += len(numbers)
                        bar.update(len(numbers))
                        share = waited / (time.perf_counter() - begun)
                        bar.set_postfix_str(f"{share:.0%} waiting for images", refresh=False)
                        if stop.signal:
                            break
                    if stop.signal and len(labels) < len(self.stretch(number)):
                        done -= len(labels)
                        break
                    writing.append(writer.submit(self.write, number, *to_host(parts), labels, bad))
                    del parts
                    start = time.perf_counter()
                    while writing and (len(writing) > AHEAD or writing[0].done()):
                        writing.popleft().result()
                    waited_to_write += time.perf_counter() - start
                    if stop.signal:
                        break
                encoder.finish()
                start = time.perf_counter()
                for each in writing:
                    each.result()
                waited_to_write += time.perf_counter() - start
            finally:
                del batches  # its workers end here; an error's traceback would keep them
            seconds = time.perf_counter() - begun
        complete = len(self.shards) == self.count_shards()
        if complete:
            self.complete()
        return Encoding(
            self.folder,
            len(self.images),
            before,
            done,
            len(self.bad),
            seconds,
            encoder.seconds,
            waited,
            waited_to_write,
            stop.signal if not complete else None,
        )

    def write(
        self,
        number: int,
        moments: Tensor,
        ready: torch.cuda.Event | None,
        labels: list[str | None],
        bad: dict[int, str],
    ) -> None:
        """Writes a shard, in the writing thread."""
        if ready is not None:
            ready.synchronize()
        stretch = self.stretch(number)
        keep = [place for place, index in enumerate(stretch) if index not in bad]
        moments = moments[:, keep]
        images = [(self.images.key(stretch[place]), labels[place]) for place in keep]
        finite = moments.isfinite().flatten(2).all(2).all(0)
        if not finite.all():
            name = images[int(finite.int().argmin())][0]
            hint = ": try --precision fp32" if self.settings.precision != "fp32" else ""
            raise UserError(f"{name}: its latent is not finite, or beyond float16's 65504{hint}")
        self.shards[number] = write_shard(
            self.folder,
            number,
            stretch.start,
            images,
            dict(zip((MOMENTS, MIRRORED), moments.contiguous().unbind(), strict=False)),
            {self.images.key(index): reason for index, reason in bad.items()},
        )

    def complete(self) -> None:
        """Lists the shards in the index, and takes the notes of them away."""
        numbers = range(self.count_shards())
        if not any(shard.count for shard in self.shards.values()):
            raise UserError(f"none of the images can be read: {self.bad.path} lists them")
        write_index(self.folder, {**self.head, "complete": True}, [self.shards[i] for i in numbers])
        for number in numbers:
            note_of(self.folder, number).unlink(missing_ok=True)


def to_host(parts: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """The parts of a shard, joined along the images, in the CPU's memory; from a GPU when the event is over."""
    moments = torch.cat(list(parts), dim=1)
    if moments.device.type != "cuda":
        return moments.cpu(), None
    host = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
    host.copy_(moments, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


def hash_encoder(model: Autoencoder) -> str:
    """SHA-256 of what decides a model's latents: its architecture and its encoder's weights."""
    config = {
        name: value
        for name, value in model.config.items()
        if not name.startswith("_") and name not in NOT_ARCHITECTURE
    }
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True).encode())
    for part in (model.encoder, model.quant_conv):
        for name, tensor in part.state_dict().items() if part is not None else ():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_keys(images: ImageSource) -> str:
    """SHA-256 of the names of the images, in their order."""
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(os.fsencode(images.key(index)) + b"\0")
    return digest.hexdigest()
