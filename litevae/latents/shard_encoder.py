"""Encoding of one process's shards: batches are decoded, encoded and written concurrently."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from litevae.data.bad_images import BadImages
from litevae.data.batches import Batches
from litevae.data.squares import SquareBatch, SquareDataset
from litevae.errors import UserError
from litevae.latents.encoder import BatchedEncoder, to_host
from litevae.latents.folder import LatentFolder
from litevae.latents.index import Shard
from litevae.latents.shards import (
    MIRRORED,
    MOMENTS,
    Unfinished,
    unfinished_path,
    write_shard,
    write_unfinished,
)
from litevae.models.interface import Autoencoder
from litevae.signals import obey_parent_only

MAX_PENDING_WRITES = 2  # shards that may wait to be written


class Times(NamedTuple):
    """Seconds that a process took in all, in the encoder, waiting for images, and waiting to write."""

    total: float
    encoder: float
    waited: float
    waited_to_write: float


class ShardEncoder:
    """Encodes a process's shards of a run: `step` encodes one batch, and `finish` writes the rest.

    Args:
        model: autoencoder on the device to run on.
        folder: folder to write to.
        bad_images: list of unreadable images, which all processes share.
        numbers: numbers of the shards to encode.
        workers: number of processes that decode images; 0 decodes in this one.
        compile: whether to compile the encoder.

    Attributes:
        kept: by number of the shard, how many of its images an earlier run has encoded.
        shards: shards written so far, by number.
    """

    def __init__(
        self,
        model: Autoencoder,
        folder: LatentFolder,
        bad_images: BadImages,
        numbers: Sequence[int],
        workers: int,
        compile: bool,
    ) -> None:
        self.folder, self.bad_images, self.device = folder, bad_images, model.device
        self.shards: dict[int, Shard] = {}
        unfinished = ((number, folder.read_unfinished(number)) for number in numbers)
        self.kept = {number: len(each.labels) for number, each in unfinished if each is not None}
        self.plan = deque(
            (number, batch)
            for number in numbers
            for batch in folder.batches(number, self.kept.get(number, 0))
        )
        self.encoder = BatchedEncoder(model, folder.settings.mirror)
        if compile and self.plan:
            model.encoder.compile(dynamic=False)
        squares = SquareDataset(folder.images, folder.settings.size, labels=True)
        loader = DataLoader(
            squares,
            batch_sampler=[list(batch) for _, batch in self.plan],
            collate_fn=squares.collate,
            num_workers=workers,
            pin_memory=model.device.type == "cuda",
            worker_init_fn=obey_parent_only,
        )
        self.images: Iterator[SquareBatch] = Batches(loader) if self.plan else iter(())
        self.writer = ThreadPoolExecutor(1)
        self.pending_writes: deque[Future[None]] = deque()
        self.begin_shard(None)
        self.seconds = self.waited = self.waited_to_write = 0.0
        self.start_time: float | None = None

    def begin_shard(self, number: int | None) -> None:
        """Makes `number` the current shard, with the images that an earlier run has encoded.

        Raises:
            UserError: there are too many bad images.
            OSError: the file of the earlier run has changed since the constructor read it.
        """
        self.number = number
        self.parts: list[Tensor] = []
        self.labels: list[str | None] = []
        self.bad: dict[int, str] = {}
        if number in self.kept:
            kept = self.folder.read_unfinished(number)
            if kept is None:
                raise OSError(f"{unfinished_path(self.folder.path, number)}: has changed meanwhile")
            self.parts.append(kept.moments.to(self.device))
            self.labels += kept.labels
            self.add_bad(kept.bad)

    def add_bad(self, bad: dict[int, str]) -> None:
        """Lists bad images of the current shard; `UserError` if there are too many."""
        self.bad |= bad
        self.bad_images.add((self.folder.images.key(index), reason) for index, reason in bad.items())

    @property
    def waiting_fraction(self) -> float:
        """Fraction of the time so far that was spent waiting for images."""
        return self.waited / (time.perf_counter() - self.start_time) if self.start_time else 0.0

    def step(self) -> int:
        """Encodes a batch.

        Returns:
            Number of images of the batch, 0 when all shards are encoded.

        Raises:
            UserError, OSError: `encode_images` lists the reasons.
        """
        if not self.plan:
            return 0
        number, batch_range = self.plan.popleft()
        if number != self.number:
            self.begin_shard(number)
        start = time.perf_counter()
        batch = next(self.images)
        if self.start_time is None:  # excludes the time that the workers take to start
            self.start_time = time.perf_counter()
        else:
            self.waited += time.perf_counter() - start
        self.add_bad(batch.errors)
        self.parts.append(self.encoder(batch.pixels))
        self.labels += batch.labels
        if batch_range.stop == self.folder.shard_range(number).stop:
            self.pending_writes.append(
                self.writer.submit(self.write, number, *to_host(self.parts), self.labels, self.bad)
            )
            self.begin_shard(None)
            start = time.perf_counter()
            while self.pending_writes and (
                len(self.pending_writes) > MAX_PENDING_WRITES or self.pending_writes[0].done()
            ):
                self.pending_writes.popleft().result()
            self.waited_to_write += time.perf_counter() - start
        return len(batch_range)

    def finish(self, keep: bool) -> None:
        """Waits until all batches are encoded and all complete shards are written, and ends the workers.

        Args:
            keep: whether to save the encoded images of an unfinished shard for the next run.
        """
        try:
            with self.writer:
                self.encoder.finish()
                start = time.perf_counter()
                for each in self.pending_writes:
                    each.result()
                self.waited_to_write += time.perf_counter() - start
            if self.start_time is not None:
                self.seconds = time.perf_counter() - self.start_time
        finally:
            self.images = iter(())
        if keep and self.number is not None:
            moments, ready = to_host(self.parts)
            if ready is not None:
                ready.synchronize()
            unfinished = Unfinished(moments, self.labels, self.bad)
            write_unfinished(self.folder.path, self.number, self.folder.identity(self.number), unfinished)

    def times(self) -> Times:
        """Returns the times from the first batch on, which are complete after `finish`."""
        return Times(self.seconds, self.encoder.seconds, self.waited, self.waited_to_write)

    def write(
        self,
        number: int,
        moments: Tensor,
        ready: torch.cuda.Event | None,
        labels: list[str | None],
        bad: dict[int, str],
    ) -> None:
        """Writes a shard, in the writer thread.

        Raises:
            UserError: a latent is not finite in float16.
            OSError: the shard cannot be written.
        """
        if ready is not None:
            ready.synchronize()
        folder, indices = self.folder, self.folder.shard_range(number)
        readable = [row for row, index in enumerate(indices) if index not in bad]
        moments = moments[:, readable]
        images = [(folder.images.key(indices[row]), labels[row]) for row in readable]
        finite = moments.isfinite().flatten(2).all(2).all(0)
        if not finite.all():
            name = images[int(finite.int().argmin())][0]
            hint = ": try --precision fp32" if folder.settings.precision != "fp32" else ""
            raise UserError(f"{name}: its latent is not finite, or beyond float16's 65504{hint}")
        self.shards[number] = write_shard(
            folder.path,
            number,
            indices.start,
            images,
            dict(zip((MOMENTS, MIRRORED), moments.contiguous().unbind(), strict=False)),
            {folder.images.key(index): reason for index, reason in bad.items()},
        )
        unfinished_path(folder.path, number).unlink(missing_ok=True)


def combine_times(times: Sequence[Times]) -> Times:
    """Returns the total time of the slowest process, and means of the other times over the processes with work."""
    busy = [each for each in times if each.total] or times
    total, *others = zip(*busy, strict=True)
    return Times(max(total), *(sum(each) / len(busy) for each in others))
