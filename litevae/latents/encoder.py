"""Encoding batches of images, with the precision that the device computes fast in."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from litevae.models.interface import Autoencoder, encode_pixels

Precision = Literal["bf16", "fp32"]


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


AHEAD = 2  # batches that a GPU is given ahead, and shards that may wait to be written


def choose_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it: a GPU that has it, a CPU with AVX512-BF16 or AMX; else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"


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
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        moments = []
        for copy in (pixels, pixels.flip(-1)) if self.mirror else (pixels,):
            posterior = encode_pixels(self.model, copy)
            moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).half())
        return torch.stack(moments)


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
