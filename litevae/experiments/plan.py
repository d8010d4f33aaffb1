"""The plan of an experiment: the configuration of every run, with all checks before any training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from litevae.data.pixels import RGB
from litevae.data.sources import open_images
from litevae.diffusion import DiffusionConfig, load_diffusion_config
from litevae.diffusion.fid import prepare_fid
from litevae.discriminators import build_discriminator
from litevae.errors import UserError
from litevae.evaluation.evaluate import Sums, check_metrics
from litevae.evaluation.metrics import check_metric_sizes
from litevae.experiments.demo_images import held_out_images
from litevae.experiments.spec import (
    SECOND_STAGE,
    Experiment,
    RunSpec,
    Setup,
    load_experiment,
    matches,
    measured_size,
    measured_sizes,
    training_config,
)
from litevae.experiments.trained import digest
from litevae.losses import Objective
from litevae.models.build import with_fresh_weights
from litevae.models.interface import check_size
from litevae.training.build import check_sizes
from litevae.training.config import Config, check_batch_size, list_stages

WITHOUT_WEIGHTS = ("psnr", "ssim")
WITH_METRICS = ("reconstruction", "regularisation", "resolution")  # kinds that measure chosen metrics
WITH_SEEDS = ("reconstruction", "regularisation", "mmd")  # kinds that measure all of a row's runs
OURS = (
    "seed",
    "output_dir",
    "resume",
    "data.train",
    "data.validation",
)  # settings that the experiment decides


def prepare(name: str, setup: Setup) -> tuple[Experiment, list[list[Config]]]:
    """Loads an experiment and plans the configuration of each row and seed.

    Everything that can be checked is checked here, before any training.

    Raises:
        UserError: there is no such experiment; an option has no effect at this scale or for this kind of
            experiment; a data set has no images; settings do not fit together; or the weights of a loss or a
            metric are missing and cannot be downloaded.
    """
    experiment = only_rows(load_experiment(name), setup.rows)
    check_options(experiment, setup)
    if experiment.kind == "complexity":
        return experiment, []
    if experiment.kind in WITH_METRICS:
        metrics = wanted_metrics(experiment, setup)
        check_metrics(metrics)
        Sums(metrics, None)  # raises if weights are missing
    seeds = setup.seeds or (experiment.seeds if setup.at.reduced else 1)
    configs = [[row_config(experiment, run, setup, seed) for seed in range(seeds)] for run in experiment.runs]
    for run, (config, *_) in zip(experiment.runs, configs, strict=True):
        try:
            check_run(experiment, setup, run, config)
            if experiment.kind == "generation":
                check_second_stage(experiment, setup, run, config.data.validation)
        except (UserError, ValueError) as error:
            raise UserError(f"row {run.name!r}: {error}") from None
    return experiment, configs


def only_rows(experiment: Experiment, cells: Sequence[str]) -> Experiment:
    """Returns the experiment with the rows that have one of `cells`, and the claims about them; all without cells.

    Raises:
        UserError: no row has a cell.
    """
    for cell in cells:
        if not any(cell in run.row for run in experiment.runs):
            known = dict.fromkeys(each for run in experiment.runs for each in run.row)
            raise UserError(
                f"--row {cell!r}: no row has this cell: choose from {', '.join(map(repr, known))}"
            )
    if not cells:
        return experiment
    runs = [run for run in experiment.runs if set(cells) & set(run.row)]
    claims = [
        claim
        for claim in experiment.claims
        if all(any(matches(run, row, claim.among) for run in runs) for row in (claim.better, claim.than))
    ]
    return replace(experiment, runs=runs, claims=claims)


def check_options(experiment: Experiment, setup: Setup) -> None:
    """Raises UserError for an option without effect, or one that the experiment decides itself."""
    if setup.at.demo and (setup.data or setup.validation):
        raise UserError(
            f"--data and --validation are for the scales small and paper: {setup.scale} uses scikit-image's photographs"
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
    if setup.metrics is not None and experiment.kind not in WITH_METRICS:
        raise UserError("--metrics: this experiment has its own metrics")
    if (setup.seeds or 1) > 1 and experiment.kind not in WITH_SEEDS:
        raise UserError(f"--seeds {setup.seeds}: this experiment shows one model per row")


def wanted_metrics(experiment: Experiment, setup: Setup) -> list[str]:
    if setup.metrics is not None:
        return list(setup.metrics)
    if setup.at.reduced:
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
    return replace(
        config, output_dir=str(setup.output / "runs" / digest(config, setup.output)), resume=resume
    )


def check_run(experiment: Experiment, setup: Setup, run: RunSpec, config: Config) -> None:
    """Raises UserError or ValueError for any problem that would make the run or its measurement fail."""
    if config.data.pixel_format != RGB:
        raise UserError(
            f"experiments measure RGB images of 8 bits: data.channels must be 3 and data.value_range null, got "
            f"{config.data.pixel_format}"
        )
    for path in (config.data.train, config.data.validation):
        open_images(path)
    late = [stage.start for stage in config.stages if stage.start > config.max_steps]
    late += [config.loss.adversarial_start] * bool(config.loss.adversarial)
    if max(late, default=0) > config.max_steps:
        raise UserError(
            f"max_steps={config.max_steps} ends before step {max(late)}, at which the row changes: it would be "
            "another experiment"
        )
    with torch.device("meta"):
        model = with_fresh_weights(config.model, config.data.size, config.initialise == "wavelet")
        if config.loss.adversarial:
            build_discriminator(config.discriminator, *(stage.size for stage in list_stages(config)))
    check_sizes(model, config)
    sizes = [measured_size(config, run, setup.at)]
    if experiment.kind == "resolution":
        sizes = measured_sizes(experiment, setup.at)
        for size in sizes:
            check_size(model, size)
    held_out_images(setup, run, max(sizes))  # raises if the images are smaller
    if experiment.kind in WITH_METRICS:
        check_metric_sizes(wanted_metrics(experiment, setup), sizes)
    for stage in list_stages(config):
        check_batch_size(stage.batch_size, config.optimizer.accumulation, PartialState().num_processes)
    Objective(config.loss)  # raises if VGG's weights are missing


def check_second_stage(experiment: Experiment, setup: Setup, run: RunSpec, images: str) -> None:
    config = diffusion_config(experiment, setup, run, Path("autoencoder"), "latents", images)
    check_batch_size(
        config.data.batch_size,
        config.optimizer.accumulation,
        PartialState().num_processes,
        "diffusion.data.batch_size",
    )
    prepare_fid(config)  # raises if Inception's weights are missing


def diffusion_config(
    experiment: Experiment, setup: Setup, run: RunSpec, model: Path, latents: str, images: str
) -> DiffusionConfig:
    """Returns the configuration of the second stage, whose folder is inside the autoencoder's."""
    wanted = [] if "fid" in experiment.metrics else ["fid.measure=never"]
    config = load_diffusion_config(
        setup.at.second_stage if setup.at.reduced else run.diffusion or setup.at.second_stage,
        [
            *setup.at.diffusion,
            *wanted,
            f"model={model}",
            f"data.latents={latents}",
            f"fid.images={images}",
            *setup.diffusion_overrides,
        ],
    )
    folder = model / f"diffusion-{digest(config, setup.output)}"
    return replace(config, output_dir=str(folder), resume="auto" if config.checkpoint.every else "")
