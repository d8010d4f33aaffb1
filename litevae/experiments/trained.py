"""Training runs that experiments share: trained once, then reused."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from litevae.diffusion import DiffusionConfig
from litevae.errors import UserError
from litevae.experiments.spec import RunSpec
from litevae.files import read_json
from litevae.training import train
from litevae.training.config import Config

# Settings that do not change the result of a run.
IRRELEVANT = ("output_dir", "resume", "tracker", "log_every", "checkpoint")


@dataclass(frozen=True)
class Trained:
    """A training run that is complete."""

    config: Config
    record: dict[str, Any]  # content of its metrics.json

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def seconds(self) -> float:
        return float(self.record["seconds"])

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


class Stopped(Exception):
    """A signal ended a training run. The same command continues with the remaining rows."""


def digest(config: Config | DiffusionConfig) -> str:
    """Hashes all settings that decide the result of a run, so that experiments share their common runs."""
    settings = {key: value for key, value in asdict(config).items() if key not in IRRELEVANT}
    settings["data"].pop("workers")
    for key in ("train", "validation", "latents"):
        path = settings["data"].get(key)
        if path and os.path.exists(path):
            settings["data"][key] = os.path.realpath(path)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def train_once(config: Config) -> Trained:
    """Trains a model, unless a complete run with the same settings is there.

    Raises:
        Stopped: a signal ended the run.
        UserError, NonFiniteError, OSError: as `litevae.training.train`.
    """
    record = finished(config.output_dir)
    if record is None:
        result = train(config, replace=True)  # of a run of this experiment that was stopped
        if result.stopped_by:
            raise Stopped(f"stopped by {result.stopped_by}: the same command continues")
        PartialState().wait_for_everyone()
        record = finished(config.output_dir)
    if record is None:
        raise UserError(f"{config.output_dir}: the run did not complete")
    return Trained(config, record)


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
