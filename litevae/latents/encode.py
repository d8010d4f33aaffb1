"""Encoding a data set: images decoded by worker processes while the model encodes and a thread writes.

Several processes share the shards. They go in rounds of a batch each, in which they tell each other how far they
are, and whether to stop.
"""

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.errors import UserError
from litevae.images import BadImage, to_model_range
from litevae.latents.processes import LOCK, Lost, Processes, describe, locked, raise_first
from litevae.latents.shards import (
    FORMAT,
    INDEX,
    MIRRORED,
    MOMENTS,
    Shard,
    Unfinished,
    find_damage,
    note_of,
    read_head,
    read_note,
    read_unfinished,
    unfinished_of,
    write_index,
    write_shard,
    write_unfinished,
)
from litevae.models import LiteVAE
from litevae.models.baseline import Autoencoder, check_only_size, spatial_compression
from litevae.training.build import NOT_ARCHITECTURE
from litevae.training.checkpoint import temporary_of
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
    early, else None. Of several processes, the images are those of all, `seconds` is the time of the slowest,
    and the other times are means over those that had images to encode.
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
    what is encoded of a shard by then is kept, and the next run with the same batch size goes on behind it.
    After anything worse, the shard is encoded again.
    Images that cannot be read are left out and listed in bad_images.txt. Shows a progress bar on stderr.

    Under `torchrun` the processes share the shards, and all return the same. The files are those of one
    process; how many there are may change from run to run. A signal to one of them ends all, two batches later.

    Args:
        model: of 3 channels, on the device to run on. It is converted to the settings' precision, in place.
        batch_size: images at a time.
        workers: processes that decode images; 0: this one.
        max_bad_fraction: of the images that may be bad.
        compile: use `torch.compile` on the encoder.

    Raises:
        UserError: a size that the model does not take, a folder of something else or with other settings, or
            one that another run is writing to; too many images that cannot be read, or latents that are not
            finite. In all processes, whichever of them found it.
        OSError: the disk is full, for example, or another process has failed or died.
    """
    processes = Processes()
    try:
        with StopRequest() as stop, ExitStack() as until_end:
            if model.device.type == "cuda":  # events are of the current device
                until_end.enter_context(torch.cuda.device(model.device))
            run = Run(model, images, folder, settings, batch_size, max_bad_fraction, processes, until_end)
            return run(workers, compile, stop)
    finally:
        processes.close()


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
    """One run on a folder: `__init__` finds out what there is to do, the call does it.

    Args:
        until_end: gets the folder's lock.
    """

    def __init__(
        self,
        model: Autoencoder,
        images: ImageSource,
        folder: Path,
        settings: Settings,
        batch_size: int,
        max_bad_fraction: float,
        processes: Processes,
        until_end: ExitStack,
    ) -> None:
        self.model, self.images, self.folder, self.settings = model, images, folder, settings
        self.batch_size, self.max_bad_fraction, self.processes = batch_size, max_bad_fraction, processes
        self.head: dict[str, Any] = {}

        def begin() -> tuple[dict[str, Any], dict[int, Shard]]:
            self.head = self.describe()
            return self.head, self.begin(until_end)

        # the first process alone, so that one message tells what is wrong, and it writes what there is to write
        first_head, self.shards = processes.first_does(begin)
        if processes.index:
            self.head = self.describe()
            until_end.enter_context(locked(folder, processes.index))
        made_of = ("model", "images", "encoding", "latents")
        if not all(
            processes.gather([self.head[name] for name in made_of] == [first_head[name] for name in made_of])
        ):
            raise UserError(
                "the processes have different models or images, or computers of different precision"
            )
        self.bad = self.list_bad()
        # diffusers' own `to` warns of modules to keep in float32, of which there are none
        torch.nn.Module.to(model, DTYPES[settings.precision])
        model.to(memory_format=torch.channels_last)
        model.eval()

    def list_bad(self) -> BadImages:
        """The list of the images that cannot be read, which all processes continue."""
        path = self.folder / "bad_images.txt"
        return BadImages(path, len(self.images), self.max_bad_fraction, setting="--max-bad-fraction")

    def rewrite_bad(self) -> BadImages:
        """The list as of the shards that are complete, in their order; UserError if there are too many."""
        (self.folder / "bad_images.txt").unlink(missing_ok=True)
        bad = self.list_bad()
        bad.add(pair for _, shard in sorted(self.shards.items()) for pair in shard.bad.items())
        return bad

    def describe(self) -> dict[str, Any]:
        """index.json without the shards; UserError for a size or a model that does not fit."""
        factor = spatial_compression(self.model)
        size, channels = self.settings.size, self.model.config.in_channels
        if size % factor or size < 2 * factor:
            raise UserError(f"size must be a multiple of {factor} of at least {2 * factor}, got {size}")
        check_only_size(self.model, size)
        if channels != 3:
            raise UserError(f"the model takes {channels} channels; images here have 3")
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

    def begin(self, until_end: ExitStack) -> dict[int, Shard]:
        """Makes the folder and locks it, or finds its whole shards; UserError if it is another one's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # of a run that has yet to write its index, or was killed before
            own = {LOCK, temporary_of(self.folder / INDEX).name}
            if read_head(self.folder) is None and any(path.name not in own for path in self.folder.iterdir()):
                raise UserError(f"{self.folder}: has files, and no encoded images: give another folder")
            until_end.enter_context(locked(self.folder))
            for path in self.folder.glob(".*.tmp.*"):  # of a run that was killed
                path.unlink(missing_ok=True)
            there = read_head(self.folder)
            if there is None:
                write_index(self.folder, self.head, [])
                return {}
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None
        self.compare(there)
        listed = dict(enumerate(there["shards"]))
        self.shards = {}
        for number in range(self.count_shards()):
            shard = read_note(self.folder, number) or listed.get(number)
            if shard is None:
                continue
            damage = find_damage(self.folder, shard)
            if damage is None:
                self.shards[number] = shard
            else:
                warn(f"{self.folder / shard.file}: {damage}; it is encoded again")
        self.rewrite_bad()
        return self.shards

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

    def batches(self, number: int, start: int) -> Iterator[range]:
        """The images of a shard after `start` of them, which must be whole batches."""
        stretch = self.stretch(number)
        return (stretch[i : i + self.batch_size] for i in range(start, len(stretch), self.batch_size))

    def identity(self, number: int) -> dict[str, Any]:
        """What a shard's first images must have been encoded as, to go on behind them."""
        names = ("format", "model", "images", "encoding")
        return {**{name: self.head[name] for name in names}, "batch_size": self.batch_size, "shard": number}

    def read_unfinished(self, number: int) -> Unfinished | None:
        """What an earlier run has encoded of a shard; None, and a line on stderr, where it is of no use."""
        try:
            return read_unfinished(self.folder, number, self.identity(number))
        except ValueError as reason:
            path = unfinished_of(self.folder, number)
            warn(f"{path}: {reason}; its images are encoded again")
            path.unlink(missing_ok=True)
            return None

    @torch.inference_mode()
    def __call__(self, workers: int, compile: bool, stop: StopRequest) -> Encoding:
        processes = self.processes
        todo = [number for number in range(self.count_shards()) if number not in self.shards]
        share = Share(self, todo[processes.index :: processes.count], workers, compile)
        kept = sum(processes.gather(sum(share.kept.values())))
        before = sum(shard.images for shard in self.shards.values()) + kept
        done = finished = 0
        stopped = False
        failure: Exception | None = None
        # into a file or a pipe a line now and then is enough
        interval = 0.5 if sys.stderr.isatty() else 10
        with tqdm(
            total=len(self.images),
            initial=before,
            unit="image",
            mininterval=interval,
            disable=not todo or processes.index > 0,
        ) as bar:
            while finished < processes.count and not stopped:
                count = 0
                if failure is None:
                    try:
                        count = share.step()
                    except Exception as error:
                        failure = error
                try:
                    ends = bool(stop.signal) or failure is not None
                    images, finished, ending = processes.add([count, count == 0, ends])
                    stopped = ending > 0
                    if stopped or finished == processes.count:
                        images += sum(each for each, *_ in processes.finish())
                except Lost as error:
                    stopped, images, failure = True, 0, failure or error
                done += images
                bar.update(images)
                bar.set_postfix_str(f"{share.waiting:.0%} waiting for images", refresh=False)
        try:
            share.finish(keep=failure is None or isinstance(failure, Lost))
        except Exception as error:
            failure = failure or error
        if isinstance(failure, Lost):
            raise failure
        reports = processes.gather((describe(failure), share.shards, share.times(), stop.signal))
        raise_first([told for told, *_ in reports], failure)
        for _, shards, *_ in reports:
            self.shards |= shards
        complete = len(self.shards) == self.count_shards()
        bad = processes.first_does(lambda: self.complete() if complete else self.count_bad())
        signals = [signal for *_, signal in reports if signal]
        seconds, encoder, waited, to_write = times_of_all([times for _, _, times, _ in reports])
        return Encoding(
            self.folder,
            len(self.images),
            before,
            done,
            bad,
            seconds,
            encoder,
            waited,
            to_write,
            signals[0] if signals and not complete else None,
        )

    def count_bad(self) -> int:
        self.bad.read()  # what other processes have found
        return len(self.bad)

    def complete(self) -> int:
        """Lists the shards in the index, and takes the notes of them away; the number of bad images."""
        bad = self.rewrite_bad()
        numbers = range(self.count_shards())
        if not any(shard.count for shard in self.shards.values()):
            raise UserError(f"none of the images can be read: {bad.path} lists them")
        write_index(self.folder, {**self.head, "complete": True}, [self.shards[i] for i in numbers])
        for number in numbers:
            note_of(self.folder, number).unlink(missing_ok=True)
            unfinished_of(self.folder, number).unlink(missing_ok=True)  # of a shard that was mended, say
        return len(bad)


class Share:
    """A process's share of the shards of a run: `step` encodes a batch, `finish` writes what is left.

    `kept`: how many images of a shard an earlier run has left. `shards`: those that are written by now.
    """

    def __init__(self, run: Run, todo: Sequence[int], workers: int, compile: bool) -> None:
        self.run = run
        self.shards: dict[int, Shard] = {}
        unfinished = ((number, run.read_unfinished(number)) for number in todo)
        self.kept = {number: len(each.labels) for number, each in unfinished if each is not None}
        self.plan = deque(
            (number, batch) for number in todo for batch in run.batches(number, self.kept.get(number, 0))
        )
        self.encoder = BatchedEncoder(run.model, run.settings.mirror)
        if compile and self.plan:
            run.model.encoder.compile(dynamic=False)
        squares = Squares(run.images, run.settings.size)
        loader = DataLoader(
            squares,
            batch_sampler=[list(batch) for _, batch in self.plan],
            collate_fn=squares.collate,
            num_workers=workers,
            pin_memory=run.model.device.type == "cuda",
            worker_init_fn=obey_parent_only,
        )
        self.images: Iterator[Batch] = iter(loader) if self.plan else iter(())
        self.writer = ThreadPoolExecutor(1)
        self.writing: deque[Future[None]] = deque()
        self.begin_shard(None)
        self.waited = self.waited_to_write = self.seconds = 0.0
        self.begun: float | None = None

    def begin_shard(self, number: int | None) -> None:
        self.number = number
        self.parts: list[Tensor] = []
        self.labels: list[str | None] = []
        self.bad: dict[int, str] = {}
        if number in self.kept:
            kept = self.run.read_unfinished(number)
            if kept is None:
                raise OSError(f"{unfinished_of(self.run.folder, number)}: has changed meanwhile")
            self.parts.append(kept.moments.to(self.run.model.device))
            self.labels += kept.labels
            self.note_bad(kept.bad)

    def note_bad(self, bad: dict[int, str]) -> None:
        """UserError if there are too many now."""
        self.bad |= bad
        self.run.bad.add((self.run.images.key(index), reason) for index, reason in bad.items())

    @property
    def waiting(self) -> float:
        """Share of the time so far in which images were waited for."""
        return self.waited / (time.perf_counter() - self.begun) if self.begun else 0.0

    def step(self) -> int:
        """Encodes a batch; returns its number of images, 0 when all are done.

        Raises:
            UserError, OSError: as `encode_images`.
        """
        if not self.plan:
            return 0
        number, numbers = self.plan.popleft()
        if number != self.number:
            self.begin_shard(number)
        start = time.perf_counter()
        batch = next(self.images)
        if self.begun is None:  # the workers' start is no measure of them
            self.begun = time.perf_counter()
        else:
            self.waited += time.perf_counter() - start
        self.note_bad(batch.bad)
        self.parts.append(self.encoder(batch.images))
        self.labels += batch.labels
        if numbers.stop == self.run.stretch(number).stop:
            self.writing.append(
                self.writer.submit(self.write, number, *to_host(self.parts), self.labels, self.bad)
            )
            self.begin_shard(None)
            start = time.perf_counter()
            while self.writing and (len(self.writing) > AHEAD or self.writing[0].done()):
                self.writing.popleft().result()
            self.waited_to_write += time.perf_counter() - start
        return len(numbers)

    def finish(self, keep: bool) -> None:
        """Waits for what is being encoded and written. The workers end here.

        Args:
            keep: what is encoded of an unfinished shard.
        """
        try:
            with self.writer:
                self.encoder.finish()
                start = time.perf_counter()
                for each in self.writing:
                    each.result()
                self.waited_to_write += time.perf_counter() - start
            if self.begun is not None:
                self.seconds = time.perf_counter() - self.begun
        finally:
            self.images = iter(())
        if keep and self.number is not None:
            moments, ready = to_host(self.parts)
            if ready is not None:
                ready.synchronize()
            unfinished = Unfinished(moments, self.labels, self.bad)
            write_unfinished(self.run.folder, self.number, self.run.identity(self.number), unfinished)

    def times(self) -> tuple[float, float, float, float]:
        """Seconds: of all, in the encoder, waited for images, and waited to write."""
        return self.seconds, self.encoder.seconds, self.waited, self.waited_to_write

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
        run, stretch = self.run, self.run.stretch(number)
        keep = [place for place, index in enumerate(stretch) if index not in bad]
        moments = moments[:, keep]
        images = [(run.images.key(stretch[place]), labels[place]) for place in keep]
        finite = moments.isfinite().flatten(2).all(2).all(0)
        if not finite.all():
            name = images[int(finite.int().argmin())][0]
            hint = ": try --precision fp32" if run.settings.precision != "fp32" else ""
            raise UserError(f"{name}: its latent is not finite, or beyond float16's 65504{hint}")
        self.shards[number] = write_shard(
            run.folder,
            number,
            stretch.start,
            images,
            dict(zip((MOMENTS, MIRRORED), moments.contiguous().unbind(), strict=False)),
            {run.images.key(index): reason for index, reason in bad.items()},
        )
        unfinished_of(run.folder, number).unlink(missing_ok=True)


def times_of_all(times: Sequence[Sequence[float]]) -> list[float]:
    """The time of the slowest process, and the means of the other times over those with anything to do."""
    busy = [each for each in times if each[0]] or times
    seconds, *others = zip(*busy, strict=True)
    return [max(seconds), *(sum(each) / len(busy) for each in others)]


def warn(message: str) -> None:
    print(message, file=sys.stderr)


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
