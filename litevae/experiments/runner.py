"""Runs an experiment: trains its models, once each over all experiments, and measures them."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from litevae.errors import UserError
from litevae.evaluation.evaluate import Sums, check_metrics
from litevae.experiments.spec import (
    Experiment,
    RunSpec,
    Scale,
    load_experiment,
    training_config,
)
from litevae.images import Pixels
from litevae.training import train
from litevae.training.config import Config, list_stages
from litevae.training.sources import HELD_OUT_PHOTOGRAPH, TRAINING_PHOTOGRAPHS, load_photograph

WITHOUT_WEIGHTS = ("psnr", "ssim")
TINY_SQUARES = 256  # of the training photographs, at most, where their latents are wanted


@dataclass(frozen=True)
class Setup:
    """How an experiment is run.

    Args:
        scale: "tiny": on scikit-image's photographs, in a minute or so a row on two CPU cores; "paper": the
            published setting.
        output: folder for trained models and results, shared by all experiments of a scale.
        data: for "paper": each dataset's images to train on, as `data.train` of training takes them.
        validation: those to measure on.
        overrides: settings of training, which replace the experiment's.
        metrics: instead of the experiment's; at the tiny scale, psnr and ssim, which need no weights.
        seeds: instead of the experiment's.
    """

    scale: Scale
    output: Path
    data: Mapping[str, str] = field(default_factory=dict)
    validation: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    metrics: Sequence[str] | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Trained:
    """A training run that is done."""

    config: Config
    record: dict[str, Any]  # its metrics.json

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def seconds(self) -> float:
        return float(self.record["seconds"])

    def after(self, seconds: float) -> dict[str, float]:
        """PSNR and SSIM of the last validation within `seconds`, at the run's mean speed."""
        history = self.record["validation"]["history"]
        steps = self.record["steps"] * seconds / self.seconds
        return next((point for point in reversed(history) if point["step"] <= steps), history[0])


@dataclass
class Row:
    """A row of the result: what was trained for it, once for each seed, and what was measured of each."""

    spec: RunSpec
    trained: list[Trained]
    values: list[dict[str, float]] = field(default_factory=list)


class Stopped(Exception):
    """A signal ended a training run: nothing is lost, and the same command goes on."""


def prepare(name: str, setup: Setup) -> tuple[Experiment, list[list[Config]]]:
    """The experiment, and the configuration of each row and seed: all that can be wrong shows here.

    Raises:
        UserError: no such experiment, a dataset without images, settings that do not fit, or weights of a
            metric that are not to be had.
    """
    experiment = load_experiment(name)
    if experiment.kind == "complexity":
        return experiment, []
    metrics = wanted_metrics(experiment, setup)
    if experiment.kind in ("reconstruction", "resolution"):
        check_metrics(metrics)
        Sums(metrics, None)  # raises now, not after the training, for weights that are missing
    seeds = setup.seeds or (experiment.seeds if setup.scale == "tiny" else 1)
    return experiment, [
        [row_config(experiment, run, setup, seed) for seed in range(seeds)] for run in experiment.runs
    ]


def wanted_metrics(experiment: Experiment, setup: Setup) -> list[str]:
    if setup.metrics is not None:
        return list(setup.metrics)
    if setup.scale == "tiny":
        return [name for name in experiment.metrics if name in WITHOUT_WEIGHTS]
    return list(experiment.metrics)


def row_config(experiment: Experiment, run: RunSpec, setup: Setup, seed: int) -> Config:
    config = training_config(experiment, run, setup.scale, setup.overrides, seed)
    if setup.scale == "paper":
        for option, given in (("--data", setup.data), ("--validation", setup.validation)):
            if run.dataset not in given:
                raise UserError(
                    f"row {run.name!r} needs images of {run.dataset}: give {option} {run.dataset}=PATH"
                )
        config.data.train = setup.data[run.dataset]
    config.data.validation = held_out_images(setup, run, list_stages(config)[-1].size)
    return with_folder(config, setup.output)


def held_out_images(setup: Setup, run: RunSpec, size: int) -> str:
    """Where images are that a row's model is not trained on.

    Args:
        size: in pixels, that they are wanted at.
    """
    if setup.scale == "paper":
        return setup.validation[run.dataset]
    return str(squares_folder(setup.output, held_out=True, size=size))


def with_folder(config: Config, output: Path) -> Config:
    """A folder of its own for each set of settings, so that experiments share the runs that they have in common."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("output_dir", "resume")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    resume = "auto" if config.checkpoint.every else ""
    return replace(config, output_dir=str(output / "runs" / digest), resume=resume)


def train_once(config: Config) -> Trained:
    """Trains what is not trained yet.

    Raises:
        Stopped: by a signal.
        UserError, NonFiniteError, OSError: as `litevae.training.train`.
    """
    record = finished(config)
    if record is None:
        result = train(config)
        if result.stopped_by:
            raise Stopped(f"stopped by {result.stopped_by}; the same command goes on")
        PartialState().wait_for_everyone()
        record = finished(config)
    if record is None:
        raise UserError(f"{config.output_dir}: the run left no metrics.json of all its steps")
    return Trained(config, record)


def finished(config: Config) -> dict[str, Any] | None:
    """The metrics.json of a run that went to its end."""
    path = Path(config.output_dir) / "metrics.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record["steps"] + record["skipped_steps"] >= config.max_steps else None


def squares_folder(output: Path, held_out: bool, size: int) -> Path:
    """A folder with squares of the demo's photographs, cut, not resized; made where it is not there.

    Args:
        held_out: of the one that no model trains on, else of the others.
    """
    folder = output / "images" / f"{'held-out' if held_out else 'training'}-{size}"
    state = PartialState()
    if state.is_main_process and not folder.is_dir():
        names = (HELD_OUT_PHOTOGRAPH,) if held_out else TRAINING_PHOTOGRAPHS
        squares = [
            (f"{name}-{place:04d}.png", square)
            for name in names
            for place, square in enumerate(cut(load_photograph(name), size))
        ]
        if not held_out:
            squares = squares[:: max(1, -(-len(squares) // TINY_SQUARES))]
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, square in squares:
            Image.fromarray(square).save(unfinished / name)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:  # there by now, from another experiment, or a failure of the disk's
            shutil.rmtree(unfinished)
            if not folder.is_dir():
                raise
    state.wait_for_everyone()
    return folder


def cut(image: Pixels, size: int) -> list[Pixels]:
    """The squares of an (H, W, 3) image that lie side by side from its upper left corner."""
    height, width = image.shape[:2]
    return [
        image[top : top + size, left : left + size]
        for top in range(0, height - size + 1, size)
        for left in range(0, width - size + 1, size)
    ]
