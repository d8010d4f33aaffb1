"""Timing of rivals: in turn, on inputs that are not in the cache, with one allocator setting for all.

A machine's speed drifts by half within minutes, so figures from separate runs cannot be compared. Each round runs
every provider once, one after the other, on the next of several input sets that together exceed the caches. The
figures are medians over the rounds, of the times and of the ratios within a round.

On a GPU, a CUDA graph records several calls on all input sets, and events around its replay measure the time, so that
neither Python's microseconds per call nor compilations count. A provider that replays CUDA graphs of its own
(`mode="reduce-overhead"`) cannot be recorded: its calls are queued while the GPU is still busy. A training step waits
for the GPU itself and is timed as a whole.
"""

import gc
import itertools
import math
import statistics
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.session import Goal, Result, Session, Timed, Work, milliseconds
from litevae.environment import DTYPES, multiplies
from litevae_kernels import use_backend
from litevae_kernels.allocator import peak_resident_memory
from litevae_kernels.backend import why_not

GPU_SECONDS = 2e-3  # minimum time between two events, filled with repeated calls
GPU_CLOCK = 2e9  # cycles per second, for a rough wait
LAUNCH_SECONDS = 1e-4  # more than the host needs to launch a CUDA graph
WARM_UPS = 3  # calls before a CUDA graph is recorded
YARDSTICKS = {"cpu": (2048, 2**28), "cuda": (8192, 2**31)}  # side of the matrix, bytes of the copy
COPY = "copy"
FLOAT32_ERROR = 1e-4  # fraction of the norm; convolution algorithms differ by a factor of 5 around 5e-6


Provider = Callable[[int], Any]


def with_backend(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` served by one backend of `litevae_kernels`."""

    def call(*arguments: Any) -> Any:
        with use_backend(backend):
            return function(*arguments)

    return call


def our_backends(device: str) -> list[str]:
    """Returns the backends with kernels for `device`, the default first; the reference if there are none."""
    return [name for name in ("native", "triton") if why_not(name, device) is None] or ["reference"]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `torch.compile` of a copy of a function, for static shapes.

    The compiler caches per code object. Copies that shared their code would share a limit of eight shapes, after
    which the compiler gives up, and would be compiled for dynamic shapes from the second shape on.
    """
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(copy, fullgraph=True, dynamic=False, **options)


def served_dtypes(device: str) -> list[torch.dtype]:
    """Returns float32 and, if the hardware multiplies it, bfloat16: the dtype of ``precision=auto`` comes last."""
    return [DTYPES[name] for name in ("fp32", "bf16") if multiplies(name, torch.device(device))]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the dtype's name in tables: fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Returns autocast to `dtype`, which does nothing for float32."""
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def with_autocast(dtype: torch.dtype) -> str:
    """Returns the name in tables of a training precision."""
    return dtype_name(dtype) + (" autocast" if dtype != torch.float32 else "")


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the root mean square of the error divided by that of the exact values."""
    return float((actual.double() - exact).norm() / exact.norm())


def check(
    actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str, least: float = 0.0
) -> None:
    """Raises AssertionError, naming `what`, unless `actual` is correct: a speed is reported only for correct results.

    Rounding between the layers costs PyTorch's own operators, whose result is `plain`, some accuracy against `exact`.
    Another order of the same roundings may cost as much again. An error of `least`, as a fraction of the norm, is
    always allowed.
    """
    allowed = max(2 * relative_error(plain, exact), least)
    assert allowed < 0.5  # otherwise any output would pass
    error = relative_error(actual, exact)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def copies(device: str, byte_count: int, inputs: int) -> Provider:
    """Returns a provider that copies `byte_count` / 2 bytes, so that it reads and writes `byte_count`."""
    sources = [
        torch.empty(byte_count // 2, dtype=torch.uint8, device=device).random_() for _ in range(inputs)
    ]
    return lambda i: sources[i].clone()


def yardsticks(device: str, dtypes: Iterable[torch.dtype]) -> tuple[dict[str, Provider], dict[str, Work]]:
    """Returns the yardsticks of the machine: a large matrix product per dtype, and a large copy.

    On a CPU the float32 product is a 1x1 convolution of oneDNN: on AMD processors MKL, which serves `torch.matmul`,
    reaches half of its rate.
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
    """Returns the bytes that PyTorch holds on the GPU and cannot release."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def has_own_graphs() -> bool:
    """Returns whether code that was compiled since the last reset of the compiler replays CUDA graphs of its own."""
    from torch._inductor import cudagraph_trees

    return cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False) is not None


class Stopwatch:
    """Times one provider; each call takes the next input set of `turn`, which all providers share."""

    def __init__(self, provider: Provider, turn: Iterator[int], inputs: int, whole: bool) -> None:
        self.provider = provider
        self.turn = turn
        self.inputs = inputs
        self.graph: torch.cuda.CUDAGraph | None = None
        self.on_gpu = torch.cuda.is_available()
        self.queued = self.on_gpu and not whole
        self.peak_memory: int | None = None
        self.repeats = 1
        held = 0
        if self.on_gpu:
            if has_own_graphs():
                torch._dynamo.reset()  # this provider's CUDA graphs must not share the memory of others
            held = reserved_memory()
        self.times_itself = isinstance(self.provider(next(turn)), Timed)  # compiles, and touches the memory
        if self.times_itself:
            return
        if self.on_gpu:
            self._prepare(held)
        else:
            self.peak_memory = peak_resident_memory(lambda: self.provider(next(turn)))

    def _prepare(self, held: int) -> None:
        """Measures the peak memory, Python's time per call, and the number of calls per measurement.

        A CUDA graph allocates nothing when it is replayed, so the memory that it holds between calls is added.
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
            repeats = max(1, math.ceil(GPU_SECONDS / self.seconds()))
            if has_own_graphs():
                self.repeats = repeats
            else:
                self.repeats = math.ceil(repeats / self.inputs) * self.inputs
                self._record()

    def _record(self) -> None:
        """Records the calls of a measurement, after one on the recording stream, where libraries allocate first."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.provider(next(self.turn))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(self.repeats):
                self.provider(next(self.turn))
        self.graph = graph

    def seconds(self) -> float:
        """Returns the time of one call; on a GPU, the mean of `repeats` calls."""
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
        waits = LAUNCH_SECONDS if self.graph else 1.5 * self.repeats * self.host_seconds
        torch.cuda._sleep(int(waits * GPU_CLOCK))
        start.record()
        if self.graph:
            self.graph.replay()
        else:
            for _ in range(self.repeats):
                self.provider(next(self.turn))
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.repeats

    def warm_up(self) -> None:
        """Compiles again what was discarded so that others could be measured; a recorded graph was not."""
        if not self.times_itself and self.graph is None:
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
    """Times all `providers` in turn and adds one `Result` per provider to `session`.

    Args:
        benchmark: fixture of pytest-benchmark, whose own table gets `ours` (on a GPU, with repeats and waiting).
        session: session that collects the results.
        subject: name of the computation, with shape, dtype and direction.
        ours: name of the provider that the others are compared with.
        providers: functions of the number of an input set, by name.
        inputs: number of input sets; rounds and providers take the next one in turn.
        bytes_moved: bytes that the subject must read and write.
        copy: name of the provider that copies as many bytes, if there is one.
        bars: minimum time of a provider as a multiple of ours, by name; below 1, ours may be slower.
        images: images per call.
        works: work of each provider by name, where it differs between providers. Yardsticks (a matrix product and a
            copy) then run in the same rounds.
        rivals: names of the providers that goals refer to; the fastest in this run is the best rival.
        goals: goals by provider.
        chart, x: curve, and position on it, that the figures belong to.
        whole: whether to time calls on a GPU by the clock, Python's time included, because they wait for the GPU
            themselves.
        rounds: maximum number of rounds; fewer if they would take longer than `seconds`.
        least: minimum number of rounds.
        seconds: time limit of the rounds.

    Returns:
        The results by provider.
    """
    works, yards = dict(works or {}), {}
    if works:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yards, works_of_yards = yardsticks(device, {work.dtype for work in works.values()})
        works |= works_of_yards
    providers = providers | yards
    turn = itertools.cycle(range(inputs))
    watches = {name: Stopwatch(provider, turn, inputs, whole) for name, provider in providers.items()}
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

    # pytest-benchmark times ours last in each round. The rivals rotate, so that a different one runs just before
    # (and leaves the caches in its state) each time.
    others = deque(name for name in providers if name != ours)

    def run_others() -> None:
        others.rotate(1)
        if len(providers) % inputs == 0:  # otherwise each would get the same input set in all rounds
            next(turn)
        for name in others:
            run(name)

    benchmark.pedantic(lambda: run(ours), setup=run_others, rounds=rounds, iterations=1)

    best = min(rivals, key=lambda name: statistics.median(times[name]), default=None)
    results = {}
    for name, values in times.items():
        median = statistics.median(values)
        result = Result(
            subject=subject,
            provider=name,
            **milliseconds(values),
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
    session.save()  # after every contest, because a grid takes hours
    return results


def add_work(
    result: Result, name: str, times: Mapping[str, Sequence[float]], works: Mapping[str, Work]
) -> None:
    """Adds the fraction of the yardsticks' rates that a provider reaches in the same rounds."""
    work, copied = works[name], works[COPY]
    result.macs, result.bytes_moved = work.macs or None, work.bytes_moved
    result.gigabytes_per_second = work.bytes_moved / result.median_ms / 1e6
    result.copy_share = work.bytes_moved / copied.bytes_moved * median_ratio(times[COPY], times[name])
    for yard, product in works.items():
        if yard.startswith("matrix product") and product.dtype == work.dtype:
            result.matrix_share = work.macs / product.macs * median_ratio(times[yard], times[name])


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the median over the rounds of a's time divided by b's."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
