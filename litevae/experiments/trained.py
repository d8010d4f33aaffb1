"""Training runs that experiments share: trained once, then reused."""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from litevae.diffusion import DiffusionConfig
from litevae.errors import UserError
from litevae.experiments.spec import RunSpec
from litevae.files import read_json, replacing
from litevae.training import train
from litevae.training.config import Config

OTHERS = "machine.json"
ALONE = 0.05  # largest share of the processors that others may use while a run is timed
# Settings that do not change the result of a run.
IRRELEVANT = ("output_dir", "resume", "tracker", "log_every", "checkpoint")


@dataclass(frozen=True)
class Trained:
    """A training run that is complete."""

    config: Config
    record: dict[str, Any]  # content of its metrics.json
    others: float | None = None  # share of the processors that other work used; None if it is not known

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def seconds(self) -> float:
        return float(self.record["seconds"])

    @property
    def alone(self) -> bool:
        """Returns whether the run had the machine to itself, so that its seconds can be compared."""
        return self.others is not None and self.others <= ALONE

    def validated(self, within: float) -> dict[str, float] | None:
        """Returns the last validation within the first `within` seconds of training; None if there was none."""
        history: list[dict[str, float]] = self.record["validation"]["history"]
        return next((point for point in reversed(history) if point["seconds"] <= within), None)


@dataclass
class Row:
    """A row of the result: its training runs, one per seed, and the measured values of each."""

    spec: RunSpec
    trained: list[Trained]
    values: list[dict[str, float]] = field(default_factory=list)
    count: int | None = None  # number of images measured on
    # The values of each yardstick on the same images, under the same names as those of the row; Haar's is the last.
    yardsticks: dict[str, dict[str, float]] = field(default_factory=dict)


class Usage:
    """Measures the processors' time that other work has used since this object was made."""

    def __init__(self) -> None:
        self.start = self.measure()

    def measure(self) -> tuple[float, float, float] | None:
        """Returns seconds of the clock, of all busy processors, and of this run; None where /proc does not say."""
        own = sum(gather_object([sum(os.times()[:4])]))
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
            user, nice, system, _idle, _waiting, *interrupts = map(int, fields[:8])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, own

    def others(self) -> float | None:
        """Returns the share of all processors that others used; None if it cannot be measured."""
        end = self.measure()
        if self.start is None or end is None:
            return None
        clock, busy, own = (after - before for before, after in zip(self.start, end, strict=True))
        return max(0.0, (busy - own) / (clock * (os.cpu_count() or 1)))


def write_others(folder: Path, others: float | None) -> None:
    """Stores the share of the processors that others used beside a run's results."""
    if PartialState().is_main_process:
        with replacing(folder / OTHERS) as path:
            path.write_text(json.dumps({"others": others}) + "\n", encoding="utf-8")


def read_others(folder: Path) -> float | None:
    """Returns what `write_others` has stored; None if there is nothing, as after a run that was resumed."""
    path = folder / OTHERS
    record = read_json(path) if path.is_file() else {}
    value = record.get("others") if isinstance(record, dict) else None
    return float(value) if isinstance(value, int | float) else None


class Stopped(Exception):
    """A signal ended a training run. The same command continues with the remaining rows."""


def digest(config: Config | DiffusionConfig, output: Path) -> str:
    """Hashes all settings that decide the result of a run, so that experiments share their common runs.

    Args:
        config: settings of the run.
        output: folder of the experiments' results, which can be moved: paths within count relative to it.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in IRRELEVANT}
    settings["data"].pop("workers")
    paths = [(settings["data"], "train"), (settings["data"], "validation"), (settings["data"], "latents")]
    if isinstance(config, DiffusionConfig):
        paths += [(settings, "model"), (settings["fid"], "images")]
    else:
        paths += [(settings, key) for key in ("init", "init_decoder", "teacher", "teacher_latents")]
    results = output.resolve()
    for holder, key in paths:
        path = holder.get(key)
        if path and os.path.exists(path):
            real = Path(path).resolve()
            holder[key] = str(real.relative_to(results) if real.is_relative_to(results) else real)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def train_once(config: Config) -> Trained:
    """Trains a model, unless a complete run with the same settings is there.

    Raises:
        Stopped: a signal ended the run.
        UserError, NonFiniteError, OSError: as `litevae.training.train`.
    """
    record = finished(config.output_dir)
    if record is None:
        resumed = Path(config.output_dir).is_dir()
        usage = Usage()
        result = train(config, replace=True)  # of a run of this experiment that was stopped
        if result.stopped_by:
            raise Stopped(f"stopped by {result.stopped_by}: the same command continues")
        if not resumed:
            write_others(Path(config.output_dir), usage.others())
        PartialState().wait_for_everyone()
        record = finished(config.output_dir)
    if record is None:
        raise UserError(f"{config.output_dir}: the run did not complete")
    return Trained(config, record, read_others(Path(config.output_dir)))


def finished(folder: str) -> dict[str, Any] | None:
    """Returns the metrics.json of a run that is complete, else None."""
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        return None
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("complete"), bool):
        raise UserError(f"{path}: not the metrics of a training run: delete the folder to train again")
    return record if record["complete"] else None
