"""Runs an experiment's training, each model once over all experiments, and makes sure beforehand that it can."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from litevae.diffusion import DiffusionConfig
from litevae.diffusion import load_config as load_diffusion_config
from litevae.diffusion.fid import prepare_fid
from litevae.discriminators import build_discriminator
from litevae.errors import UserError
from litevae.evaluation.evaluate import Sums, check_metrics, check_size
from litevae.experiments.spec import SCALES, Experiment, RunSpec, Scale, load_experiment, training_config
from litevae.images import Pixels
from litevae.losses import Objective
from litevae.training import train
from litevae.training.build import with_fresh_weights
from litevae.training.config import Config, list_stages
from litevae.training.sources import (
    HELD_OUT_PHOTOGRAPH,
    TRAINING_PHOTOGRAPHS,
    load_photograph,
    open_images,
)

WITHOUT_WEIGHTS = ("psnr", "ssim")
TRAINING_SQUARES = 256  # of the demo's photographs, at most, where their latents are wanted
OURS = ("seed", "output_dir", "resume", "data.train", "data.validation")  # settings that the experiment makes
# what does not change what a run comes to
IRRELEVANT = ("output_dir", "resume", "tracker", "log_every", "checkpoint")
SECOND_STAGE = "diffusion."  # begins an override that is not of the autoencoder's training


@dataclass(frozen=True)
class Setup:
    """How an experiment is run.

    Args:
        scale: one of `SCALES`.
        output: folder for trained models and results, shared by all experiments of a scale.
        data: for "paper": each dataset's images to train on, as `data.train` of training takes them.
        validation: those to measure on.
        overrides: settings of training, which replace the experiment's; those of the second stage begin with
            "diffusion.".
        metrics: instead of the experiment's; below the paper's scale, psnr and ssim, which need no weights.
        seeds: instead of the experiment's.
    """

    scale: str
    output: Path
    data: Mapping[str, str] = field(default_factory=dict)
    validation: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    metrics: Sequence[str] | None = None
    seeds: int | None = None

    @property
    def at(self) -> Scale:
        return SCALES[self.scale]

    @property
    def training_overrides(self) -> list[str]:
        return [each for each in self.overrides if not each.startswith(SECOND_STAGE)]

    @property
    def diffusion_overrides(self) -> list[str]:
        return [each.removeprefix(SECOND_STAGE) for each in self.overrides if each.startswith(SECOND_STAGE)]


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

    def validated(self, within: float) -> dict[str, float] | None:
        """The last measurement during training that was there after so many seconds; None if none was."""
        history: list[dict[str, float]] = self.record["validation"]["history"]
        return next((point for point in reversed(history) if point["seconds"] <= within), None)


@dataclass
class Row:
    """A row of the result: what was trained for it, once for each seed, and what was measured of each."""

    spec: RunSpec
    trained: list[Trained]
    values: list[dict[str, float]] = field(default_factory=list)
    count: int | None = None  # images measured on


class Stopped(Exception):
    """A signal ended a training run: the same command goes on with the rows that are left."""


def prepare(name: str, setup: Setup) -> tuple[Experiment, list[list[Config]]]:
    """The experiment, and the configuration of each row and seed. What can be wrong shows here, before training.

    Raises:
        UserError: no such experiment; options that do nothing at this scale or for this kind of experiment; a
            dataset without images; settings that do not fit; or weights of a loss or a metric that are not to be
            had.
    """
    experiment = load_experiment(name)
    check_options(experiment, setup)
    if experiment.kind == "complexity":
        return experiment, []
    if experiment.kind in ("reconstruction", "resolution"):
        metrics = wanted_metrics(experiment, setup)
        check_metrics(metrics)
        Sums(metrics, None)  # raises for weights that are missing
    seeds = setup.seeds or (experiment.seeds if setup.at.demo else 1)
    configs = [[row_config(experiment, run, setup, seed) for seed in range(seeds)] for run in experiment.runs]
    for run, (config, *_) in zip(experiment.runs, configs, strict=True):
        try:
            check_run(experiment, setup, config)
            if experiment.kind == "generation":
                check_second_stage(experiment, setup, run)
        except (UserError, ValueError) as error:
            raise UserError(f"row {run.name!r}: {error}") from None
    return experiment, configs


def check_options(experiment: Experiment, setup: Setup) -> None:
    """UserError for an option that would do nothing, or would undo what the experiment does."""
    if setup.at.demo and (setup.data or setup.validation):
        raise UserError(
            f"--data and --validation are for --scale paper: {setup.scale} is on scikit-image's photographs"
        )
    datasets = {run.dataset for run in experiment.runs}
    for option, given in (("--data", setup.data), ("--validation", setup.validation)):
        for unknown in given.keys() - datasets:
            raise UserError(f"{option} {unknown}=...: this experiment's data sets are {', '.join(datasets)}")
    for override in setup.overrides:
        if override.partition("=")[0] in OURS:
            raise UserError(f"{override}: the experiment sets this itself")
    if experiment.kind == "complexity" and setup.overrides:
        raise UserError(f"{setup.overrides[0]}: this experiment trains nothing")
    if setup.diffusion_overrides and experiment.kind != "generation":
        raise UserError(f"{SECOND_STAGE}{setup.diffusion_overrides[0]}: this experiment has no second stage")
    if setup.metrics is not None and experiment.kind not in ("reconstruction", "resolution"):
        raise UserError("--metrics: this experiment has its own")
    if (setup.seeds or 1) > 1 and experiment.kind not in ("reconstruction", "mmd"):
        raise UserError(f"--seeds {setup.seeds}: this experiment shows one model a row")


def wanted_metrics(experiment: Experiment, setup: Setup) -> list[str]:
    if setup.metrics is not None:
        return list(setup.metrics)
    if setup.at.demo:
        return [name for name in experiment.metrics if name in WITHOUT_WEIGHTS]
    return list(experiment.metrics)


def row_config(experiment: Experiment, run: RunSpec, setup: Setup, seed: int) -> Config:
    config = training_config(experiment, run, setup.at, setup.training_overrides, seed)
    if not setup.at.demo:
        for option, given in (("--data", setup.data), ("--validation", setup.validation)):
            if run.dataset not in given:
                raise UserError(
                    f"row {run.name!r} needs images of {run.dataset}: give {option} {run.dataset}=PATH"
                )
        config.data.train = setup.data[run.dataset]
    config.data.validation = held_out_images(setup, run, list_stages(config)[-1].size)
    resume = "auto" if config.checkpoint.every else ""
    return replace(config, output_dir=str(setup.output / "runs" / digest(config)), resume=resume)


def digest(config: Config | DiffusionConfig) -> str:
    """Of all that decides what a run comes to: experiments share the runs that they have in common."""
    settings = {key: value for key, value in asdict(config).items() if key not in IRRELEVANT}
    settings["data"].pop("workers")
    for key in ("train", "validation", "latents"):
        path = settings["data"].get(key)
        if path and os.path.exists(path):
            settings["data"][key] = os.path.realpath(path)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def check_run(experiment: Experiment, setup: Setup, config: Config) -> None:
    """UserError or ValueError for what the run, or measuring it, would fail over."""
    for path in (config.data.train, config.data.validation):
        open_images(path)
    late = [stage.start for stage in config.stages if stage.start > config.max_steps]
    late += [config.loss.adversarial_start] * bool(config.loss.adversarial)
    if max(late, default=0) > config.max_steps:
        raise UserError(
            f"max_steps={config.max_steps} ends before step {max(late)}, at which the row changes: it would be "
            "another experiment"
        )
    parts = PartialState().num_processes * config.optimizer.accumulation
    with torch.device("meta"):
        model = with_fresh_weights(config.model, config.data.size)
        sizes = [stage.size for stage in list_stages(config)]
        if config.loss.adversarial:
            build_discriminator(config.discriminator, *sizes)
    if experiment.kind == "resolution":
        sizes += [size // setup.at.size for size in experiment.sizes]
    for size in sizes:
        check_size(model, size)
    for stage in list_stages(config):
        if stage.batch_size % parts:
            raise UserError(f"data.batch_size={stage.batch_size} cannot be shared in {parts} parts")
    Objective(config.loss)  # raises for VGG's weights


def check_second_stage(experiment: Experiment, setup: Setup, run: RunSpec) -> None:
    config = diffusion_config(
        experiment, setup, Path("autoencoder"), "latents", held_out_images(setup, run, 64)
    )
    parts = PartialState().num_processes * config.optimizer.accumulation
    if config.data.batch_size % parts:
        raise UserError(
            f"diffusion.data.batch_size={config.data.batch_size} cannot be shared in {parts} parts"
        )
    prepare_fid(config)  # raises for Inception's weights


def diffusion_config(
    experiment: Experiment, setup: Setup, model: Path, latents: str, images: str
) -> DiffusionConfig:
    """Of the second stage; in a folder of its own in the autoencoder's."""
    wanted = [] if "fid" in experiment.metrics else ["fid.measure=never"]
    config = load_diffusion_config(
        setup.at.second_stage,
        [
            *setup.at.diffusion,
            *wanted,
            f"model={model}",
            f"data.latents={latents}",
            f"fid.images={images}",
            *setup.diffusion_overrides,
        ],
    )
    folder = model / f"diffusion-{digest(config)}"
    return replace(config, output_dir=str(folder), resume="auto" if config.checkpoint.every else "")


def held_out_images(setup: Setup, run: RunSpec, size: int) -> str:
    """Where images are that a row's model is not trained on.

    Args:
        size: in pixels, that they are wanted at.
    """
    if not setup.at.demo:
        return setup.validation[run.dataset]
    return str(squares_folder(setup.output, held_out=True, size=size))


def train_once(config: Config) -> Trained:
    """Trains what is not trained yet.

    Raises:
        Stopped: by a signal.
        UserError, NonFiniteError, OSError: as `litevae.training.train`.
    """
    record = finished(config.output_dir)
    if record is None:
        result = train(config)
        if result.stopped_by:
            raise Stopped(f"stopped by {result.stopped_by}: the same command goes on")
        PartialState().wait_for_everyone()
        record = finished(config.output_dir)
    if record is None:
        raise UserError(f"{config.output_dir}: the run did not come to its end")
    return Trained(config, record)


def finished(folder: str) -> dict[str, Any] | None:
    """The metrics.json of a run that went to its end."""
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record if record["complete"] else None


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
        if not squares:
            raise UserError(f"squares of {size} pixels are larger than the photographs of the demo")
        if not held_out:
            squares = squares[:: max(1, -(-len(squares) // TRAINING_SQUARES))]
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
