"""Encoding of image batches."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from litevae.models.interface import Autoencoder, encode_pixels

Precision = Literal["bf16", "fp32"]

MAX_PENDING_BATCHES = 2  # batches that may be queued on a GPU


class BatchedEncoder:
    """Encodes batches to posterior moments. On a GPU, a call returns before its batch is done.

    Args:
        model: autoencoder on the device to run on.
        mirror: whether the mirrored images are encoded as well.

    Attributes:
        seconds: time that the device took, complete after `finish`.
    """

    def __init__(self, model: Autoencoder, mirror: bool) -> None:
        self.model, self.mirror = model, mirror
        self.seconds = 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encodes a batch.

        Args:
            pixels: (N, C, H, W) in the model's format, on the CPU.

        Returns:
            (1 or 2, N, 2 n_z, h, w) float16 on the model's device: the moments of the images, and with `mirror` those
            of the mirrored images.
        """
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
        self.pending.append((begin, end))
        self.finish(MAX_PENDING_BATCHES)
        return moments

    def finish(self, max_pending: int = 0) -> None:
        """Waits until at most `max_pending` batches are pending."""
        while len(self.pending) > max_pending:
            begin, end = self.pending.popleft()
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000

    def encode(self, pixels: Tensor) -> Tensor:
        """Encodes a batch that is on the model's device."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        moments = []
        for copy in (pixels, pixels.flip(-1)) if self.mirror else (pixels,):
            posterior = encode_pixels(self.model, copy)
            moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).half())
        return torch.stack(moments)


# Moments in the CPU's memory, and for a copy from a GPU the event after which they are valid.
HostCopy: TypeAlias = tuple[Tensor, torch.cuda.Event | None]


def to_host(parts: Sequence[Tensor]) -> HostCopy:
    """Joins parts of a shard along the images, in the CPU's memory."""
    moments = torch.cat(list(parts), dim=1)
    if moments.device.type != "cuda":
        return moments.cpu(), None
    host = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
    host.copy_(moments, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


def finish_copies(copies: Iterable[HostCopy]) -> list[Tensor]:
    """Waits for copies, and returns the moments."""
    finished = []
    for moments, ready in copies:
        if ready is not None:
            ready.synchronize()
        finished.append(moments)
    return finished
