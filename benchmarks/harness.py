"""How rivals are timed: in turn, on inputs that are not in the cache, with one allocator setting for all.

A machine's speed drifts by half within minutes, so figures from separate runs say nothing. Each round runs every
provider once, one after the other, on the next of several input sets that together exceed the caches; what is
reported is the median of the rounds, and of the ratios within a round.
"""

import itertools
import json
import platform
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

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
    bytes_moved: int | None
    gigabytes_per_second: float | None
    peak_memory: int | None  # CUDA's allocator peak beyond the inputs; not measured on a CPU
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


def synchronize() -> None:
    if torch.cuda.is_available():
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
    rounds: int = 30,
    seconds: float = 20.0,
) -> dict[str, Result]:
    """Times all `providers` in turn and adds a `Result` each to `session`.

    Args:
        benchmark: pytest-benchmark's fixture; its own table gets `ours`.
        session: where the results go.
        subject: name of what is computed, with shape, dtype and direction.
        ours: the provider that the others are compared with.
        providers: each called with the number of an input set.
        inputs: how many input sets there are; rounds and providers take the next one in turn.
        bytes_moved: what the subject has to read and write.
        copy: the provider that copies as many bytes, if there is one.
        rounds: rounds at most; fewer if they would take longer than `seconds`, but at least 7.
    """
    turn = itertools.cycle(range(inputs))
    times: dict[str, list[float]] = {name: [] for name in providers}
    peaks: dict[str, int | None] = dict.fromkeys(providers)

    def run(name: str) -> None:
        which = next(turn)
        synchronize()
        start = time.perf_counter()
        out = providers[name](which)
        synchronize()
        times[name].append(time.perf_counter() - start)
        del out

    for name in providers:  # compile, and touch the memory
        run(name), run(name)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(name)
            peaks[name] = torch.cuda.max_memory_allocated() - before
    one_round = sum(values[-1] for values in times.values())
    rounds = max(7, min(rounds, int(seconds / one_round)))
    for values in times.values():
        values.clear()

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
            bytes_moved=bytes_moved,
            gigabytes_per_second=bytes_moved / median / 1e9 if bytes_moved else None,
            peak_memory=peaks[name],
            rounds=rounds,
        )
        results[name] = result
        benchmark.extra_info[name] = f"{result.median_ms:.3f} ms, {result.times_ours:.2f}x ours"
    session.results += results.values()
    return results


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a's time by b's."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
