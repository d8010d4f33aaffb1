"""The figures of one run of the benchmarks, and their file in `results/`."""

import json
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from litevae_kernels.backend import why_not

RESULTS = Path(__file__).parent / "results"


def current_test() -> str:
    """Returns the node ID of the running benchmark, such as "benchmarks/test_haar.py::test_forward[fp32]"."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]


@dataclass
class Result:
    """The figures of one provider for one subject. Times are in milliseconds, memory in bytes."""

    subject: str
    provider: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    times_ours: float  # median over the rounds of (provider's time / our time)
    times_copy: float | None  # the same for the time of copying as many bytes as the subject must move
    bar: float | None  # value that times_ours must reach
    bytes_moved: int | None
    gigabytes_per_second: float | None
    peak_memory: int | None  # beyond the inputs: peak of CUDA's allocator, or of resident memory on Linux
    rounds: int
    images: int | None = None  # images per call
    macs: int | None = None  # multiply-accumulates per call
    matrix_share: float | None = None  # fraction of the rate of a large matrix product in the dtype
    copy_share: float | None = None  # fraction of the rate at which a large copy reads and writes
    speedup: float | None = None  # median over the rounds of (best rival's time / provider's time)
    memory_share: float | None = None  # fraction of the best rival's peak
    goal: dict[str, float | None] | None = None  # fields of a `Goal`
    chart: str | None = None  # curve over `x` that the figure is a point of
    x: float | None = None
    test: str = field(default_factory=current_test)  # benchmark that measured it

    def verdicts(self) -> list[str]:
        """Returns a line per ratio that has a bar or a goal."""
        ratios = [("time over ours", self.times_ours, self.bar)] if self.bar is not None else []
        if self.goal is not None:
            ratios += [
                ("images/s over the best rival's", self.speedup, self.goal["speedup"]),
                ("peak memory over the best rival's", self.memory_share, self.goal["memory_share"]),
            ]
        return [
            f"{self.subject}: {self.provider}: {what} {ratio:.2f}" + (f", bar {bar:.3g}" if bar else "")
            for what, ratio, bar in ratios
            if ratio is not None
        ]


@dataclass(frozen=True)
class Work:
    """The work of one call of a provider: multiply-accumulates, and bytes to read and write."""

    macs: int
    bytes_moved: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Timed:
    """The result of a provider that times itself because its start does not count.

    The peak memory of such a provider is not measured.
    """

    seconds: float


@dataclass(frozen=True)
class Goal:
    """The multiple of the best rival's images/s, and the fraction of its peak memory, that a provider must reach."""

    speedup: float | None = None
    memory_share: float | None = None
    images_per_second: float | None = None


@dataclass
class Session:
    """The figures of one run of the benchmarks.

    Attributes:
        device: name of the machine.
        folder: folder of the results file; None for `RESULTS`.
        dry_run: whether the figures are those of a rehearsal, which the file then says.
        tests: node IDs of all benchmarks in the files of this run; empty if unknown.
        results: the figures.
    """

    device: str
    folder: Path | None = None
    dry_run: bool = False
    tests: set[str] = field(default_factory=set)
    results: list[Result] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return results_path(self.folder or RESULTS, self.device)

    def saved(self) -> list[dict[str, Any]]:
        """Returns the rows of the results file: this run's, once it is saved, and earlier ones."""
        rows: list[dict[str, Any]] = read(self.path).get("results", [])
        return rows

    def save(self) -> None:
        """Writes ``results/<device>.json``, in which benchmarks that were not run keep their figures.

        Earlier rows are dropped if their subject or their benchmark was run, or if the benchmark no longer exists.
        """
        stamp = {
            "device": self.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": date.today().isoformat(),
        }
        if torch.cuda.is_available():
            stamp["cuda_kernels"] = why_not("native", "cuda") is None
        subjects = {result.subject for result in self.results}
        run = {result.test for result in self.results}
        files = {test.partition("::")[0] for test in self.tests}
        rows = [
            row
            for row in self.saved()
            if row["subject"] not in subjects
            and row["test"] not in run
            and (row["test"] in self.tests or row["test"].partition("::")[0] not in files)
        ]
        rows += [{**asdict(result), **stamp} for result in self.results]
        data = read(self.path) | {"device": self.device, "results": rows}
        write(self.path, data | {"dry_run": True} if self.dry_run else data)


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the median and the first and last deciles of times, as `Result` holds them."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    values = {"median_ms": statistics.median(seconds), "p10_ms": deciles[0], "p90_ms": deciles[-1]}
    return {name: value * 1e3 for name, value in values.items()}


def results_path(folder: Path, device: str) -> Path:
    return folder / f"{slug(device)}.json"


def read(path: Path) -> dict[str, Any]:
    """Returns the content of a results file; nothing if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, data: dict[str, Any]) -> None:
    """Replaces a results file in one step, so that a call that is ended leaves a whole one."""
    path.parent.mkdir(exist_ok=True)
    made = path.with_suffix(".part")
    made.write_text(json.dumps(data, indent=1) + "\n")
    made.replace(path)


def slug(name: str) -> str:
    """Returns a file name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
