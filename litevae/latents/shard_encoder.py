"""Encoding of one process's shards: batches are decoded, encoded and written concurrently."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader

from litevae.data.bad_images import BadImages
from litevae.data.batches import Batches
from litevae.data.buckets import BucketBatch, BucketDataset, collate_images
from litevae.errors import UserError
from litevae.latents.batch_queue import BatchQueue
from litevae.latents.encoder import BatchedEncoder, HostCopy, finish_copies, to_host
from litevae.latents.folder import LatentFolder, make_buckets
from litevae.latents.index import ImageEntry, Shard
from litevae.latents.shards import (
    Unfinished,
    tensor_name,
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
        done = {number: each.done for number, each in unfinished if each is not None}
        self.kept = {number: len(images) for number, images in done.items()}
        self.plan = deque((number, folder.batches(number, done.get(number, ()))) for number in numbers)
        self.encoder = BatchedEncoder(model, folder.settings.mirror)
        self.buckets = make_buckets(model, folder.settings)
        if compile and self.plan:
            model.encoder.compile(dynamic=self.buckets.crop != "middle")
        loader = DataLoader(
            BucketDataset(folder.images, self.buckets),
            batch_sampler=[batch for _, batches in self.plan for batch in batches],
            collate_fn=collate_images,
            num_workers=workers,
            pin_memory=model.device.type == "cuda",
            worker_init_fn=obey_parent_only,
        )
        self.images: Iterator[BucketBatch] = Batches(loader) if self.plan else iter(())
        self.writer = ThreadPoolExecutor(1)
        self.pending_writes: deque[Future[None]] = deque()
        self.begin_shard(None, 0)
        self.seconds = self.waited = self.waited_to_write = 0.0
        self.start_time: float | None = None

    def begin_shard(self, number: int | None, reads: int) -> None:
        """Makes `number` the current shard, with the images that an earlier run has encoded.

        Args:
            number: number of the shard; None between two shards.
            reads: how many times images of the shard are still to be read.

        Raises:
            UserError: there are too many bad images.
            OSError: the file of the earlier run has changed since the constructor read it.
        """
        self.number, self.reads = number, reads
        self.queue = BatchQueue(self.folder.batch_size, self.folder.settings.size)
        self.moments: dict[tuple[int, int], list[Tensor]] = {}  # by height and width of the latents
        self.numbers: dict[tuple[int, int], list[int]] = {}
        self.labels: dict[int, str | None] = {}
        self.bad: dict[int, str] = {}
        if number in self.kept:
            kept = self.folder.read_unfinished(number)
            if kept is None:
                raise OSError(f"{unfinished_path(self.folder.path, number)}: has changed meanwhile")
            for numbers, moments in zip(kept.numbers, kept.moments, strict=True):
                self.add_moments(numbers, moments.to(self.device))
            self.labels |= kept.labels
            self.add_bad(kept.bad)

    def add_moments(self, numbers: list[int], moments: Tensor) -> None:
        """Adds (1 or 2, N, 2 n_z, h, w) moments of images to the current shard."""
        size = (moments.shape[-2], moments.shape[-1])
        self.moments.setdefault(size, []).append(moments)
        self.numbers.setdefault(size, []).extend(numbers)

    def add_bad(self, bad: dict[int, str]) -> None:
        """Lists bad images of the current shard; `UserError` if there are too many."""
        self.bad |= bad
        self.bad_images.add((self.folder.images.key(index), reason) for index, reason in bad.items())

    @property
    def waiting_fraction(self) -> float:
        """Fraction of the time so far that was spent waiting for images."""
        return self.waited / (time.perf_counter() - self.start_time) if self.start_time else 0.0

    def step(self) -> int:
        """Encodes a batch, and has the shard written after its last one.

        Returns:
            Number of images that are done with, which are encoded or bad; 0 when all shards are encoded.

        Raises:
            UserError, OSError: `encode_images` lists the reasons.
        """
        if self.number is None:
            if not self.plan:
                return 0
            number, batches = self.plan.popleft()
            self.begin_shard(number, len(batches))
        done = 0
        while self.reads and not self.queue.ready:
            done += self.read()
        if not self.reads:
            self.queue.flush()
        if self.queue.ready:
            batch = self.queue.ready.popleft()
            self.add_moments(batch.numbers, self.encoder(batch.pixels))
            done += len(batch.numbers)
        if not self.reads and not self.queue.ready:
            self.submit()
        return done

    def read(self) -> int:
        """Reads images of the current shard, and returns how many of them have nothing to encode."""
        start = time.perf_counter()
        batch = next(self.images)
        if self.start_time is None:  # excludes the time that the workers take to start
            self.start_time = time.perf_counter()
        else:
            self.waited += time.perf_counter() - start
        self.reads -= 1
        self.add_bad(batch.errors)
        queued = self.queue.add(batch)
        self.labels |= zip(batch.numbers, batch.labels, strict=True)
        return len(batch.numbers) - queued

    def submit(self) -> None:
        """Passes the current shard to the writer."""
        assert self.number is not None
        copies = [to_host(each) for each in self.moments.values()]
        numbers = list(self.numbers.values())
        self.pending_writes.append(
            self.writer.submit(self.write, self.number, copies, numbers, self.labels, self.bad)
        )
        self.begin_shard(None, 0)
        start = time.perf_counter()
        while self.pending_writes and (
            len(self.pending_writes) > MAX_PENDING_WRITES or self.pending_writes[0].done()
        ):
            self.pending_writes.popleft().result()
        self.waited_to_write += time.perf_counter() - start

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
        if keep and self.number is not None and self.moments:
            moments = finish_copies(to_host(each) for each in self.moments.values())
            numbers = list(self.numbers.values())
            labels = {image: self.labels[image] for each in numbers for image in each}
            unfinished = Unfinished(moments, numbers, labels, self.bad)
            write_unfinished(self.folder.path, self.number, self.folder.identity(self.number), unfinished)

    def times(self) -> Times:
        """Returns the times from the first batch on, which are complete after `finish`."""
        return Times(self.seconds, self.encoder.seconds, self.waited, self.waited_to_write)

    def write(
        self,
        number: int,
        copies: list[HostCopy],
        numbers: list[list[int]],
        labels: dict[int, str | None],
        bad: dict[int, str],
    ) -> None:
        """Writes a shard, in the writer thread.

        Args:
            number: number of the shard.
            copies: per shape, the moments of the images.
            numbers: per shape, the numbers of the images, in ascending order; those of bad images are left out.
            labels: labels of the images, by their numbers.
            bad: bad images, with the reasons.

        Raises:
            UserError: a latent is not finite in float16.
            OSError: the shard cannot be written.
        """
        folder, key = self.folder, self.folder.images.key
        several = self.buckets.crop != "middle"
        tensors: dict[str, Tensor] = {}
        images: dict[int, ImageEntry] = {}
        faulty: list[int] = []
        for moments, listed in zip(finish_copies(copies), numbers, strict=True):
            rows = [row for row, image in enumerate(listed) if image not in bad]
            moments = moments[:, rows].contiguous()
            size = (moments.shape[-2], moments.shape[-1])
            images |= {listed[row]: ImageEntry(key(listed[row]), labels[listed[row]], *size) for row in rows}
            finite = moments.isfinite().flatten(2).all(2).all(0)
            faulty += [listed[row] for row, each in zip(rows, finite.tolist(), strict=True) if not each]
            for mirrored, each in enumerate(moments.unbind()):
                tensors[tensor_name(bool(mirrored), size if several else None)] = each
        if faulty:
            hint = ": try --precision fp32" if folder.settings.precision != "fp32" else ""
            name = images[min(faulty)].name
            raise UserError(f"{name}: its latent is not finite, or beyond float16's 65504{hint}")
        entries = [images[image] for image in sorted(images)]
        self.shards[number] = write_shard(
            folder.path,
            number,
            folder.shard_range(number).start,
            entries if several else [(entry.name, entry.label) for entry in entries],
            tensors,
            {key(image): reason for image, reason in bad.items()},
        )
        unfinished_path(folder.path, number).unlink(missing_ok=True)


def combine_times(times: Sequence[Times]) -> Times:
    """Returns the total time of the slowest process, and means of the other times over the processes with work."""
    busy = [each for each in times if each.total] or times
    total, *others = zip(*busy, strict=True)
    return Times(max(total), *(sum(each) / len(busy) for each in others))
