"""One process's share of the shards of an encoding run."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from litevae.data.bad_images import BadImages
from litevae.data.squares import SquareBatch, SquareDataset
from litevae.errors import UserError
from litevae.latents.encoder import AHEAD, BatchedEncoder, to_host
from litevae.latents.folder import LatentFolder
from litevae.latents.shards import (
    MIRRORED,
    MOMENTS,
    Shard,
    Unfinished,
    unfinished_of,
    write_shard,
    write_unfinished,
)
from litevae.models.interface import Autoencoder
from litevae.signals import obey_parent_only


class Share:
    """A process's share of the shards of a run: `step` encodes a batch, `finish` writes what is left.

    `kept`: by number of the shard, how many of its images an earlier run has left. `shards`: those written by now.

    Args:
        model: autoencoder on the device to run on.
        folder: folder to write to.
        bad_images: list of unreadable images, shared by all processes.
        todo: numbers of the shards to encode.
        workers: number of processes that decode images; 0 decodes in this one.
        compile: whether to compile the encoder.
    """

    def __init__(
        self,
        model: Autoencoder,
        folder: LatentFolder,
        bad_images: BadImages,
        todo: Sequence[int],
        workers: int,
        compile: bool,
    ) -> None:
        self.folder, self.bad_images, self.device = folder, bad_images, model.device
        self.shards: dict[int, Shard] = {}
        unfinished = ((number, folder.read_unfinished(number)) for number in todo)
        self.kept = {number: len(each.labels) for number, each in unfinished if each is not None}
        self.plan = deque(
            (number, batch) for number in todo for batch in folder.batches(number, self.kept.get(number, 0))
        )
        self.encoder = BatchedEncoder(model, folder.settings.mirror)
        if compile and self.plan:
            model.encoder.compile(dynamic=False)
        squares = SquareDataset(folder.images, folder.settings.size)
        loader = DataLoader(
            squares,
            batch_sampler=[list(batch) for _, batch in self.plan],
            collate_fn=squares.collate,
            num_workers=workers,
            pin_memory=model.device.type == "cuda",
            worker_init_fn=obey_parent_only,
        )
        self.images: Iterator[SquareBatch] = iter(loader) if self.plan else iter(())
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
            kept = self.folder.read_unfinished(number)
            if kept is None:
                raise OSError(f"{unfinished_of(self.folder.path, number)}: has changed meanwhile")
            self.parts.append(kept.moments.to(self.device))
            self.labels += kept.labels
            self.note_bad(kept.bad)

    def note_bad(self, bad: dict[int, str]) -> None:
        """UserError if there are too many now."""
        self.bad |= bad
        self.bad_images.add((self.folder.images.key(index), reason) for index, reason in bad.items())

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
        self.note_bad(batch.errors)
        self.parts.append(self.encoder(batch.pixels))
        self.labels += batch.labels
        if numbers.stop == self.folder.shard_range(number).stop:
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
            write_unfinished(self.folder.path, self.number, self.folder.identity(self.number), unfinished)

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
        folder, indices = self.folder, self.folder.shard_range(number)
        keep = [place for place, index in enumerate(indices) if index not in bad]
        moments = moments[:, keep]
        images = [(folder.images.key(indices[place]), labels[place]) for place in keep]
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
        unfinished_of(folder.path, number).unlink(missing_ok=True)


def times_of_all(times: Sequence[Sequence[float]]) -> list[float]:
    """The time of the slowest process, and the means of the other times over those with anything to do."""
    busy = [each for each in times if each[0]] or times
    seconds, *others = zip(*busy, strict=True)
    return [max(seconds), *(sum(each) / len(busy) for each in others)]
