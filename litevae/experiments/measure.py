"""Measurements of an experiment's models: one function per kind of experiment."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from litevae.data.pixels import Pixels
from litevae.data.sources import open_images
from litevae.data.squares import load_validation
from litevae.diffusion import DiffusionConfig, LatentDiffusionPipeline
from litevae.diffusion import train as train_diffusion
from litevae.diffusion.pictures import draw_samples
from litevae.diffusion.pipeline import generate
from litevae.errors import UserError
from litevae.evaluation.complexity import count_parameters, measure_complexity, measure_speed
from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.feature_maps import draw_feature_maps, feature_magnitude, imbalance, inside
from litevae.evaluation.latent_space import SIGMAS, collect_latents, distance_from_gaussian
from litevae.evaluation.pictures import draw_reconstructions
from litevae.evaluation.resolution import draw_resolutions, relative_degradation, sweep_resolutions
from litevae.evaluation.yardsticks import YARDSTICKS, yardstick_labels
from litevae.experiments.demo_images import held_out_images, squares_folder
from litevae.experiments.plan import diffusion_config, wanted_metrics
from litevae.experiments.spec import Experiment, Setup, measured_size, measured_sizes
from litevae.experiments.trained import Row, Stopped, Trained, finished
from litevae.experiments.verdict import error_bar
from litevae.latents import Settings, encode_images
from litevae.latents.statistics import latent_statistics, measure_latents, store_scale
from litevae.models import LiteVAE
from litevae.models.encoder import Encoder
from litevae.models.interface import Autoencoder
from litevae.models.loading import find_model, load_model
from litevae.training.gradient_ratio import draw_gradient_ratios, read_gradient_ratios

COMPLEXITY_SIZE = 256
COMPLEXITY_REPETITIONS = 3  # for a confidence interval
SHOWN = 3  # images per picture
IMBALANCE_IMAGES = 32
MMD_IMAGES = 2000

Pictures = dict[str, Callable[[Path], None]]  # suffix of the file name, and function that draws the picture


def measure(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    """Measures the rows' models and stores the values in the rows, the same in all processes.

    Returns:
        The pictures for the first process to draw.
    """
    return KINDS[experiment.kind](experiment, setup, rows)


def reconstruction(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    metrics = wanted_metrics(experiment, setup)
    for row in rows:
        for trained in row.trained:
            size = measured_size(trained.config, row.spec, setup.at)
            images = held_out_images(setup, row.spec, size)
            result = evaluate(
                load(trained),
                open_images(images),
                metrics,
                size,
                workers=trained.config.data.workers,
                partial=trained.folder / f"evaluation-{size}.partial",
                identity={"images": images, "steps": trained.record["steps"]},
            )
            row.values.append({**parameters(row, trained), **result.values, "seconds": trained.seconds})
            row.count = result.count
            row.yardsticks = labelled(trained, result.yardsticks)
    return {}


def labelled(trained: Trained, values: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the values of the yardsticks by what they are called for this model."""
    labels = yardstick_labels(load(trained))
    return {labels[name]: each for name, each in values.items()}


def regularisation(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    """Measures the reconstructions, the spread of the latents and their distance from a Gaussian."""
    reconstruction(experiment, setup, rows)
    for row in rows:
        for trained, values in zip(row.trained, row.values, strict=True):
            latents = sample_latents(setup, row, trained)
            statistics = latent_statistics(latents)
            values["spread of the latents"] = 1 / statistics.scaling_factor
            values |= distances(setup, latents)
    return {}


def sample_latents(setup: Setup, row: Row, trained: Trained) -> Tensor:
    """Returns latents of held-out images, (N, n_z, h, w)."""
    size = measured_size(trained.config, row.spec, setup.at)
    images = open_images(held_out_images(setup, row.spec, size))
    return collect_latents(load(trained), images, size, MMD_IMAGES, workers=trained.config.data.workers)


def distances(setup: Setup, latents: Tensor) -> dict[str, float]:
    """Returns 1000 times the squared MMD for each of Table 6's kernels, each with its error bar."""
    found = distance_from_gaussian(latents, groups=min(setup.at.mmd_groups, len(latents) // 2))
    values: dict[str, float] = {}
    for sigma, each in zip(SIGMAS, found, strict=True):
        name = f"sigma {sigma:g}"
        values |= {name: 1000 * each.mean, error_bar(name): 1000 * each.half_width}
    return values


def parameters(row: Row, trained: Trained) -> dict[str, float]:
    """Counts the parameters whose number the paper prints."""
    model = load(trained)
    found = {"parameters (M)": count_parameters(model)[0] / 1e6}
    if isinstance(model, LiteVAE) and isinstance(model.encoder, Encoder):
        aggregator = dict(model.encoder.feature_aggregator.named_parameters())
        found["aggregator (M)"] = sum(p.numel() for n, p in aggregator.items() if n != "pos_embed") / 1e6
    return {name: value for name, value in found.items() if name in row.spec.paper}


def mmd(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    for row in rows:
        for trained in row.trained:
            latents = sample_latents(setup, row, trained)
            row.count = len(latents)
            row.values.append(distances(setup, latents))
    return {}


def complexity(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    if PartialState().num_processes > 1:
        raise UserError("this experiment times models on one device: run it in one process")
    models = [on_device(find_model(row.spec.model, COMPLEXITY_SIZE)) for row in rows]
    for _ in range(COMPLEXITY_REPETITIONS):
        speeds = measure_speed(models, "encoder", COMPLEXITY_SIZE, setup.at.complexity_batch)
        for row, model, speed in zip(rows, models, speeds, strict=True):
            cost = measure_complexity(model, COMPLEXITY_SIZE)
            values = {"parameters (M)": cost.encoder_parameters / 1e6, "GMACs": cost.encoder_macs / 1e9}
            if speed.peak_memory is not None:
                values["memory (MB)"] = speed.peak_memory / 1e6
            row.values.append({**values, "images/s": speed.images_per_second})
    return {}


def latents(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    pictures: Pictures = {}
    for row in rows:
        trained = row.trained[0]
        size = measured_size(trained.config, row.spec, setup.at)
        images = named_images(held_out_images(setup, row.spec, size), size, SHOWN)

        def draw(path: Path, trained: Trained = trained, images: list[tuple[str, Pixels]] = images) -> None:
            draw_reconstructions(load(trained), images, path, principal=False)

        pictures[f"-{slug(row.spec.name)}"] = draw
        row.values.append({"seconds": trained.seconds})
        row.count = len(images)
    return pictures


def features(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    maps, numbers = {}, {}
    shown: list[tuple[str, Pixels]] = []
    for row in rows:
        trained = row.trained[0]
        size = measured_size(trained.config, row.spec, setup.at)
        images = named_images(held_out_images(setup, row.spec, size), size, IMBALANCE_IMAGES)
        shown = images[:: max(1, len(images) // SHOWN)][:SHOWN]
        model = load(trained)
        found = {name: inside(feature_magnitude(model, pixels)) for name, pixels in images}
        maps[row.spec.name] = [found[name] for name, _ in shown]
        numbers[row.spec.name] = imbalance(list(found.values()))
        row.values.append({"imbalance": numbers[row.spec.name], "seconds": trained.seconds})
        row.count = len(images)
    shown = [(name, inside(pixels)) for name, pixels in shown]
    return {"": lambda path: draw_feature_maps(shown, maps, numbers, path)}


def resolution(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    sizes, metrics = measured_sizes(experiment, setup.at), wanted_metrics(experiment, setup)
    folder = held_out_images(setup, rows[0].spec, max(sizes))  # so that images are shrunk, not enlarged
    workers = rows[0].trained[0].config.data.workers
    models = {row.spec.name: load(row.trained[0]) for row in rows}
    trained_sizes = {name: model.config.sample_size for name, model in models.items()}
    found = sweep_resolutions(models, open_images(folder), sizes, metrics, workers=workers)
    values = {
        name: {size: evaluation.values for size, evaluation in by_size.items()}
        for name, by_size in found.items()
    }
    for row in rows:
        name = row.spec.name
        by_metric = {metric: {size: values[name][size][metric] for size in sizes} for metric in metrics}
        row.count = found[name][sizes[0]].count
        row.yardsticks = labelled(
            row.trained[0],
            {
                key: {
                    f"{metric} at {size}": found[name][size].yardsticks[key][metric]
                    for metric in metrics
                    for size in sizes
                }
                for key in YARDSTICKS
            },
        )
        row.values.append(
            {f"{metric} at {size}": by_metric[metric][size] for metric in metrics for size in sizes}
            | {
                f"worst {metric} degradation (%)": max(
                    relative_degradation(by_metric[metric], metric, trained_sizes[name]).values()
                )
                for metric in metrics
            }
        )
    return {"": lambda path: draw_resolutions(values, trained_sizes, path)}


def gradients(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    ratios = {row.spec.name: read_gradient_ratios(row.trained[0].folder) for row in rows}
    for row in rows:
        found = ratios[row.spec.name]
        row.values.append(
            {
                "median ratio": found.median,
                "5th percentile": found.low,
                "95th percentile": found.high,
                "spread": found.spread,
            }
        )
    return {"": lambda path: draw_gradient_ratios(ratios, path)}


def generation(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> Pictures:
    """Does what `litevae scale`, `encode` and `train-diffusion` do, one after the other."""
    pictures: Pictures = {}
    for row in rows:
        trained = row.trained[0]
        size, workers = measured_size(trained.config, row.spec, setup.at), trained.config.data.workers
        source = many_images(setup, size) if setup.at.demo else setup.data[row.spec.dataset]
        images = open_images(source)
        if load(trained).config.scaling_factor == 1:
            found = measure_latents(load(trained), images, size, workers=workers)
            PartialState().wait_for_everyone()  # until all have read the configuration
            if PartialState().is_main_process:
                store_scale(trained.folder / "model" / "config.json", found)
            PartialState().wait_for_everyone()
        folder = trained.folder / "latents"
        encoded = encode_images(load(trained), images, folder, Settings(size, mirror=True), workers=workers)
        if encoded.stopped_by:
            raise Stopped(f"stopped by {encoded.stopped_by}: the same command continues")
        config = diffusion_config(experiment, setup, row.spec, trained.folder, str(folder), source)
        record = finished(config.output_dir)
        if record is None:
            result = train_diffusion(config, load(trained), replace=True)
            if result.stopped_by:
                raise Stopped(f"stopped by {result.stopped_by}: the same command continues")
            record = finished(config.output_dir)
        if record is None:
            raise UserError(f"{config.output_dir}: the run did not complete")
        fid = record["fid"]["fid"]
        values = {} if fid is None else {"fid": fid}
        row.values.append(
            {**values, "steps of the second stage": record["steps"], "its seconds": record["seconds"]}
        )
        row.count = encoded.total
        # A table with FID has no pictures, because figures show the same models.
        if "fid" not in experiment.metrics:
            pictures[f"-{slug('-'.join(row.spec.row))}"] = partial(
                draw_generated, config, experiment.first_sample
            )
    return pictures


def draw_generated(config: DiffusionConfig, first: int, path: Path) -> None:
    """Draws `config.sample.count` images of a trained diffusion model, whose numbers begin at `first`."""
    pipeline = LatentDiffusionPipeline.from_pretrained(Path(config.output_dir) / "pipeline")
    pipeline.to(PartialState().device)
    pipeline.set_progress_bar_config(disable=True)
    settings = config.sample
    numbers = range(first, first + settings.count)
    batches = generate(pipeline, numbers, config.seed, settings.steps, settings.batch_size)
    draw_samples(torch.cat(list(batches)), path)


def many_images(setup: Setup, size: int) -> str:
    """Returns the folder of squares for the second stage at the tiny scale.

    These are the training images, because one held-out photograph gives too few.
    """
    return str(squares_folder(setup.output, held_out=False, size=size))


def named_images(folder: str, size: int, count: int) -> list[tuple[str, Pixels]]:
    """Loads squares of `size` pixels, with names for a picture."""
    images = load_validation(open_images(folder), size, count).images
    return [(Path(name).stem, pixels) for name, pixels in images]


def slug(name: str) -> str:
    """Returns `name` in a form that suits a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(trained: Trained) -> Autoencoder:
    """Loads the run's model on this process's device."""
    return on_device(load_model(trained.folder))


def on_device(model: Autoencoder) -> Autoencoder:
    return model.to(PartialState().device)


KINDS: dict[str, Callable[[Experiment, Setup, Sequence[Row]], Pictures]] = {
    "reconstruction": reconstruction,
    "complexity": complexity,
    "mmd": mmd,
    "regularisation": regularisation,
    "latents": latents,
    "features": features,
    "resolution": resolution,
    "gradients": gradients,
    "generation": generation,
}
