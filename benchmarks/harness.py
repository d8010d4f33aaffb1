"""How rivals are timed: in turn, on inputs that are not in the cache, with one allocator setting for all.

A machine's speed drifts by half within minutes, so figures from separate runs say nothing. Each round runs every
provider once, one after the other, on the next of several input sets that together exceed the caches; what is
reported is the median of the rounds, and of the ratios within a round.

On a GPU a time is the GPU's own: events around calls that are queued back to back while it is still busy with
something else, so that the microseconds Python takes for a call do not count.
"""

import ctypes
import gc
import itertools
import json
import math
import platform
import re
import statistics
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from litevae_kernels import use_backend
from litevae_kernels.backend import why_not

RESULTS = Path(__file__).parent / "results"
GPU_SECONDS = 2e-3  # that a provider is repeated for between two events, at least
GPU_CLOCK = 2e9  # cycles a second, for a rough wait

Provider = Callable[[int], Any]


@dataclass
class Result:
    """One provider's figures for one subject. Times in milliseconds, memory in bytes."""

    subject: str
    provider: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    times_ours: float  # median over the rounds of (its time / ours)
    times_copy: float | None  # the same against copying as many bytes as the subject has to move
    bar: float | None  # what times_ours has to reach
    bytes_moved: int | None
    gigabytes_per_second: float | None
    peak_memory: (
        int | None
    )  # beyond the inputs: CUDA's allocator peak, or the peak of the resident memory on Linux
    rounds: int


@dataclass
class Session:
    """What one run of the benchmarks measured."""

    device: str
    results: list[Result] = field(default_factory=list)

    def save(self) -> Path:
        """Writes ``results/<device>.json``; subjects that were not run keep their figures."""
        path = RESULTS / f"{slug(self.device)}.json"
        stamp = {
            "device": self.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": date.today().isoformat(),
        }
        kept = json.loads(path.read_text())["results"] if path.exists() else []
        subjects = {result.subject for result in self.results}
        rows = [row for row in kept if row["subject"] not in subjects]
        rows += [{**asdict(result), **stamp} for result in self.results]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"device": self.device, "results": rows}, indent=1) + "\n")
        return path


def device_name() -> str:
    """The GPU, or the CPU's model and thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        model = found[1]
    return f"{model}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A file name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def with_backend(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, served by one backend of `litevae_kernels`."""

    def call(*arguments: Any) -> Any:
        with use_backend(backend):
            return function(*arguments)

    return call


def our_backends(device: str) -> list[str]:
    """The backends with kernels for `device`, the default one first; the reference where there is none."""
    return [name for name in ("native", "triton") if why_not(name, device) is None] or ["reference"]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` of a copy of a function, for one set of static shapes.

    The compiler keeps what it compiled beside the function's code: copies that share the code share a limit of
    eight shapes, after which it gives up, and are compiled for dynamic shapes from the second one on.
    """
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(copy, fullgraph=True, dynamic=False, **options)


def peak_resident_memory(function: Callable[[], Any]) -> int | None:
    """By how many bytes a call makes the process grow at most; None where the kernel does not tell.

    glibc first gives back what it keeps of freed memory, so that the call has to ask for all that it needs.
    """
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        peak.write_text("5")  # Linux: VmHWM starts again from here
    except (OSError, AttributeError):
        return None

    def kilobytes(field: str) -> int:
        return int(re.findall(rf"{field}:\s+(\d+) kB", status.read_text())[0])

    before = kilobytes("VmRSS")
    function()
    return max(0, kilobytes("VmHWM") - before) * 1024


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values."""
    return float((actual.double() - exact).norm() / exact.norm())


def copies(device: str, byte_count: int, inputs: int) -> Provider:
    """Copies half as many bytes as `byte_count`, so that it reads and writes `byte_count`."""
    sources = [
        torch.empty(byte_count // 2, dtype=torch.uint8, device=device).random_() for _ in range(inputs)
    ]
    return lambda i: sources[i].clone()


class Stopwatch:
    """Times one provider; each call takes the next input set of `turn`, which all providers share."""

    def __init__(self, provider: Provider, turn: Iterator[int]) -> None:
        self.provider = provider
        self.turn = turn
        self.on_gpu = torch.cuda.is_available()
        self.peak_memory: int | None = None
        self.repeats = 1
        self.provider(next(turn))  # compile, and touch the memory
        if self.on_gpu:
            self._prepare()
        else:
            self.peak_memory = peak_resident_memory(lambda: self.provider(next(turn)))

    def _prepare(self) -> None:
        """Measures the peak of the memory, Python's time for a call, and how many calls a time needs."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        self.provider(next(self.turn))
        self.host_seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        self.peak_memory = torch.cuda.max_memory_allocated() - before
        self.repeats = max(1, math.ceil(GPU_SECONDS / self.seconds()))

    def seconds(self) -> float:
        """Of one call; on a GPU, the mean of `repeats` of them."""
        if not self.on_gpu:
            which = next(self.turn)
            begin = time.perf_counter()
            out = self.provider(which)
            elapsed = time.perf_counter() - begin
            del out
            return elapsed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(1.5 * self.repeats * self.host_seconds * GPU_CLOCK))
        start.record()
        for _ in range(self.repeats):
            self.provider(next(self.turn))
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.repeats


def contest(
    benchmark: Any,
    session: Session,
    subject: str,
    ours: str,
    providers: dict[str, Provider],
    *,
    inputs: int,
    bytes_moved: int | None = None,
    copy: str | None = None,
    bars: Mapping[str, float] | None = None,
    rounds: int = 30,
    seconds: float = 6.0,
) -> dict[str, Result]:
    """Times all `providers` in turn and adds a `Result` each to `session`.

    Args:
        benchmark: pytest-benchmark's fixture; its own table gets `ours` (on a GPU, with repeats and waiting).
        session: where the results go.
        subject: name of what is computed, with shape, dtype and direction.
        ours: the provider that the others are compared with.
        providers: each called with the number of an input set.
        inputs: how many input sets there are; rounds and providers take the next one in turn.
        bytes_moved: what the subject has to read and write.
        copy: the provider that copies as many bytes, if there is one.
        bars: how many times as long as `ours` a provider is to take, at least; below 1, ours may be slower.
        rounds: rounds at most; fewer if they would take longer than `seconds`, but at least 7.
    """
    turn = itertools.cycle(range(inputs))
    watches = {name: Stopwatch(provider, turn) for name, provider in providers.items()}
    start = time.perf_counter()
    for watch in watches.values():
        watch.seconds()
    rounds = max(7, min(rounds, int(seconds / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in providers}

    def run(name: str) -> None:
        times[name].append(watches[name].seconds())

    # pytest-benchmark times ours last in each round, so the rivals rotate: what runs just before (and leaves the
    # caches as it does) is another one each time.
    rivals = deque(name for name in providers if name != ours)

    def run_rivals() -> None:
        rivals.rotate(1)
        for name in rivals:
            run(name)

    benchmark.pedantic(lambda: run(ours), setup=run_rivals, rounds=rounds, iterations=1)

    results = {}
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10)
        median = statistics.median(values)
        result = Result(
            subject=subject,
            provider=name,
            median_ms=median * 1e3,
            p10_ms=deciles[0] * 1e3,
            p90_ms=deciles[-1] * 1e3,
            times_ours=median_ratio(values, times[ours]),
            times_copy=median_ratio(values, times[copy]) if copy else None,
            bar=bars.get(name) if bars else None,
            bytes_moved=bytes_moved,
            gigabytes_per_second=bytes_moved / median / 1e9 if bytes_moved else None,
            peak_memory=watches[name].peak_memory,
            rounds=rounds,
        )
        results[name] = result
        benchmark.extra_info[name] = f"{result.median_ms:.3f} ms, {result.times_ours:.2f}x ours"
    session.results += results.values()
    return results


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a's time by b's."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
