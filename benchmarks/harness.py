"""How rivals are timed: in turn, on inputs that are not in the cache, with one allocator setting for all.

A machine's speed drifts by half within minutes, so figures from separate runs say nothing. Each round runs every
provider once, one after the other, on the next of several input sets that together exceed the caches; what is
reported is the median of the rounds, and of the ratios within a round.

On a GPU a time is the GPU's own: events around calls that are queued back to back while it is still busy with
something else, so that the microseconds Python takes for a call do not count. A training step, which waits for the GPU
itself, is timed whole.
"""

import gc
import itertools
import json
import math
import re
import statistics
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from litevae_kernels import use_backend
from litevae_kernels.allocator import peak_resident_memory
from litevae_kernels.backend import why_not

RESULTS = Path(__file__).parent / "results"
GPU_SECONDS = 2e-3  # that a provider is repeated for between two events, at least
GPU_CLOCK = 2e9  # cycles a second, for a rough wait
WARM_UPS = 3  # calls until a CUDA graph is recorded
YARDSTICKS = {"cpu": (2048, 2**28), "cuda": (8192, 2**31)}  # side of a matrix, bytes of a copy
COPY = "copy"


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
    images: int | None = None  # in one call
    macs: int | None = None  # multiply-accumulates of one call
    matrix_share: float | None = None  # of the rate that a large matrix product of the dtype reaches
    copy_share: float | None = None  # of the rate that a large copy reads and writes at
    speedup: float | None = None  # median over the rounds of (the best rival's time / its time)
    memory_share: float | None = None  # of the best rival's peak
    goal: dict[str, float | None] | None = None  # a `Goal`
    chart: str | None = None  # the curve over `x` that the figure is a point of
    x: float | None = None


@dataclass(frozen=True)
class Work:
    """What one call of a provider has to do: multiply-accumulates, and bytes to read and write."""

    macs: int
    bytes_moved: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Timed:
    """What a provider returns that times itself, for the start of which is not to count. Its peak memory is not
    measured."""

    seconds: float


@dataclass(frozen=True)
class Goal:
    """How many times the best rival's images/s, and which share of its peak memory, a provider is to reach."""

    speedup: float | None = None
    memory_share: float | None = None
    images_per_second: float | None = None


@dataclass
class Session:
    """What one run of the benchmarks measured."""

    device: str
    results: list[Result] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return RESULTS / f"{slug(self.device)}.json"

    def saved(self) -> list[dict[str, Any]]:
        """The figures of this run and, for other subjects, of earlier ones on this machine."""
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            rows = json.loads(self.path.read_text())["results"]
        return rows

    def save(self) -> None:
        """Writes ``results/<device>.json``; subjects that were not run keep their figures."""
        stamp = {
            "device": self.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": date.today().isoformat(),
        }
        subjects = {result.subject for result in self.results}
        rows = [row for row in self.saved() if row["subject"] not in subjects]
        rows += [{**asdict(result), **stamp} for result in self.results]
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps({"device": self.device, "results": rows}, indent=1) + "\n")


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


def dtype_name(dtype: torch.dtype) -> str:
    """As in tables: fp32, bf16, fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values."""
    return float((actual.double() - exact).norm() / exact.norm())


def check(
    actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str, least: float = 0.0
) -> None:
    """The gate: a speed is reported only for what is right. AssertionError, naming `what`, unless `actual` is.

    Rounding between the layers costs PyTorch's own operators, whose result is `plain`, some accuracy against `exact`.
    Another order of the same roundings may cost as much again; `least`, a share of the norm, is allowed in any case.
    """
    allowed = max(2 * relative_error(plain, exact), least)
    assert allowed < 0.5  # else any output would do
    error = relative_error(actual, exact)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def copies(device: str, byte_count: int, inputs: int) -> Provider:
    """Copies half as many bytes as `byte_count`, so that it reads and writes `byte_count`."""
    sources = [
        torch.empty(byte_count // 2, dtype=torch.uint8, device=device).random_() for _ in range(inputs)
    ]
    return lambda i: sources[i].clone()


def yardsticks(device: str, dtypes: Iterable[torch.dtype]) -> tuple[dict[str, Provider], dict[str, Work]]:
    """What the machine can do at this moment: a large matrix product of each dtype, and a large copy.

    On a CPU the float32 product is a 1x1 convolution's, of oneDNN: on AMD's processors MKL, which serves
    `torch.matmul`, reaches half of its rate.
    """
    n, byte_count = YARDSTICKS[device]
    copy = copies(device, byte_count, 2)
    providers: dict[str, Provider] = {COPY: lambda i: copy(i % 2)}
    works = {COPY: Work(0, byte_count, torch.uint8)}
    for dtype in sorted(dtypes, key=str):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        name = f"matrix product, {dtype_name(dtype)}, {n} x {n}"
        if device == "cpu" and dtype == torch.float32:
            image = a.T.reshape(1, n, n // 32, 32).contiguous(memory_format=torch.channels_last)
            weight = b.T.reshape(n, n, 1, 1).contiguous(memory_format=torch.channels_last)
            providers[name] = lambda _, x=image, w=weight: torch.conv2d(x, w)
        else:
            providers[name] = lambda _, a=a, b=b: a @ b
        works[name] = Work(n**3, 3 * a.nbytes, dtype)
    return providers, works


def reserved_memory() -> int:
    """Bytes that PyTorch holds on the GPU and cannot give back."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


class Stopwatch:
    """Times one provider; each call takes the next input set of `turn`, which all providers share."""

    def __init__(self, provider: Provider, turn: Iterator[int], whole: bool) -> None:
        self.provider = provider
        self.turn = turn
        self.on_gpu = torch.cuda.is_available()
        self.queued = self.on_gpu and not whole
        self.peak_memory: int | None = None
        self.repeats = 1
        held = 0
        if self.on_gpu:
            torch._dynamo.reset()  # no graphs of other providers, whose memory this one's would share
            held = reserved_memory()
        self.times_itself = isinstance(self.provider(next(turn)), Timed)  # compile, and touch the memory
        if self.times_itself:
            return
        if self.on_gpu:
            self._prepare(held)
        else:
            self.peak_memory = peak_resident_memory(lambda: self.provider(next(turn)))

    def _prepare(self, held: int) -> None:
        """Measures the peak of the memory, Python's time for a call, and how many calls a time needs.

        A CUDA graph allocates nothing when it is replayed: what it holds on to between calls is added.
        """
        for _ in range(WARM_UPS - 1):
            self.provider(next(self.turn))
        held = reserved_memory() - held
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        self.provider(next(self.turn))
        self.host_seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        self.peak_memory = torch.cuda.max_memory_allocated() - before + max(0, held)
        if self.queued:
            self.repeats = max(1, math.ceil(GPU_SECONDS / self.seconds()))

    def seconds(self) -> float:
        """Of one call; on a GPU, the mean of `repeats` of them."""
        if self.times_itself:
            return float(self.provider(next(self.turn)).seconds)
        if not self.queued:
            which = next(self.turn)
            self.synchronise()
            begin = time.perf_counter()
            out = self.provider(which)
            self.synchronise()
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

    def warm_up(self) -> None:
        """Compiles and records again what was forgotten so that others could be measured."""
        if not self.times_itself:
            for _ in range(WARM_UPS):
                self.seconds()

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


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
    images: int | None = None,
    works: Mapping[str, Work] | None = None,
    rivals: Sequence[str] = (),
    goals: Mapping[str, Goal] | None = None,
    chart: str | None = None,
    x: float | None = None,
    whole: bool = False,
    rounds: int = 30,
    least: int = 7,
    seconds: float = 4.0,
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
        images: how many there are in a call.
        works: what each provider has to do, where that differs between them, by its name. Yardsticks for it
            then run in the same rounds: a matrix product and a copy.
        rivals: providers that the goals are about; the fastest in this run is the best rival.
        goals: of the providers that have one.
        chart, x: the figures are points of a curve at `x`.
        whole: on a GPU, time calls by the clock from beginning to end, Python's share included: for calls that wait
            for the GPU themselves.
        rounds: rounds at most; fewer if they would take longer than `seconds`, but at least `least`.
    """
    works, yards = dict(works or {}), {}
    if works:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yards, works_of_yards = yardsticks(device, {work.dtype for work in works.values()})
        works |= works_of_yards
    providers = providers | yards
    turn = itertools.cycle(range(inputs))
    watches = {name: Stopwatch(provider, turn, whole) for name, provider in providers.items()}
    if torch.cuda.is_available():
        for watch in watches.values():
            watch.warm_up()
    start = time.perf_counter()
    for watch in watches.values():
        watch.seconds()
    rounds = max(least, min(rounds, int(seconds / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in providers}

    def run(name: str) -> None:
        times[name].append(watches[name].seconds())

    # pytest-benchmark times ours last in each round, so the rivals rotate: what runs just before (and leaves the
    # caches as it does) is another one each time.
    others = deque(name for name in providers if name != ours)

    def run_others() -> None:
        others.rotate(1)
        if len(providers) % inputs == 0:  # or each would get the same input set in all rounds
            next(turn)
        for name in others:
            run(name)

    benchmark.pedantic(lambda: run(ours), setup=run_others, rounds=rounds, iterations=1)

    best = min(rivals, key=lambda name: statistics.median(times[name]), default=None)
    results = {}
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
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
            images=images if name not in yards else None,
            chart=chart,
            x=x,
        )
        if name in works:
            add_work(result, name, times, works)
        if best is not None and name not in yards:
            result.speedup = median_ratio(times[best], values)
            own, its = result.peak_memory, watches[best].peak_memory
            result.memory_share = own / its if own is not None and its else None
            result.goal = asdict(goals[name]) if goals and name in goals else None
        results[name] = result
        benchmark.extra_info[name] = f"{result.median_ms:.3f} ms, {result.times_ours:.2f}x ours"
    session.results += results.values()
    session.save()  # here, because a grid takes hours
    return results


def add_work(
    result: Result, name: str, times: Mapping[str, Sequence[float]], works: Mapping[str, Work]
) -> None:
    """How much of what the yardsticks reach in the same rounds a provider reaches."""
    work, copied = works[name], works[COPY]
    result.macs, result.bytes_moved = work.macs or None, work.bytes_moved
    result.gigabytes_per_second = work.bytes_moved / result.median_ms / 1e6
    result.copy_share = work.bytes_moved / copied.bytes_moved * median_ratio(times[COPY], times[name])
    for yard, product in works.items():
        if yard.startswith("matrix product") and product.dtype == work.dtype:
            result.matrix_share = work.macs / product.macs * median_ratio(times[yard], times[name])


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a's time by b's."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
