"""What is measured of an experiment's models, for each kind of experiment."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from litevae.diffusion import load_config as load_diffusion_config
from litevae.diffusion import train as train_diffusion
from litevae.evaluation.complexity import measure_complexity, measure_speed
from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.feature_maps import draw_feature_maps, feature_magnitude, imbalance
from litevae.evaluation.gradients import draw_gradient_ratios, read_gradient_ratios
from litevae.evaluation.latent_space import collect_latents, distance_from_gaussian
from litevae.evaluation.resolution import draw_resolutions, relative_degradation, sweep_resolutions
from litevae.experiments.runner import (
    Row,
    Setup,
    Stopped,
    Trained,
    held_out_images,
    squares_folder,
    wanted_metrics,
)
from litevae.experiments.spec import TINY_SIZE, Experiment, measured_size
from litevae.images import Pixels
from litevae.latents import Settings, encode_images
from litevae.loading import find_model, load_model
from litevae.models.baseline import Autoencoder
from litevae.training.checkpoint import replacing
from litevae.training.data import load_validation
from litevae.training.report import draw_reconstructions
from litevae.training.scale import measure_latents, store_scale
from litevae.training.sources import open_images

COMPLEXITY_SIZE, COMPLEXITY_BATCH = 256, {"tiny": 1, "paper": 32}
SHOWN = 3  # rows of a picture
IMBALANCE_IMAGES = 32
# the shipped configuration of the second stage, and settings that replace its own
DIFFUSION = {
    "tiny": ("small", "max_steps=600", "data.batch_size=16", "fid.measure=never"),
    "paper": ("ldm-ffhq", "fid.measure=always"),
}
MMD_IMAGES, MMD_GROUPS = 2000, {"tiny": 4, "paper": 10}


def measure(experiment: Experiment, setup: Setup, rows: Sequence[Row], pictures: Path) -> list[Path]:
    """Fills the rows' values.

    Args:
        pictures: path without suffix for those that this kind of experiment draws.

    Returns:
        The pictures.
    """
    return KINDS[experiment.kind](experiment, setup, rows, pictures)


def reconstruction(experiment: Experiment, setup: Setup, rows: Sequence[Row], _: Path) -> list[Path]:
    metrics = wanted_metrics(experiment, setup)
    for row in rows:
        for trained in row.trained:
            size = measured_size(trained.config, row.spec, setup.scale)
            images = open_images(held_out_images(setup, row.spec, size))
            workers = trained.config.data.workers
            values = evaluate(load(trained), images, metrics, size, workers=workers).values
            row.values.append({**values, "seconds": trained.seconds})
    return []


def mmd(experiment: Experiment, setup: Setup, rows: Sequence[Row], _: Path) -> list[Path]:
    groups = MMD_GROUPS[setup.scale]
    for row in rows:
        for trained in row.trained:
            size = measured_size(trained.config, row.spec, setup.scale)
            folder = held_out_images(setup, row.spec, size)
            if setup.scale == "tiny":  # the held-out photograph gives too few
                folder = str(squares_folder(setup.output, held_out=False, size=size))
            latents = collect_latents(
                load(trained), open_images(folder), size, MMD_IMAGES, workers=trained.config.data.workers
            )
            found = distance_from_gaussian(latents, groups=groups)
            row.values.append({f"sigma {d.sigma:g}": 1000 * d.mean for d in found})
    return []


def complexity(experiment: Experiment, setup: Setup, rows: Sequence[Row], _: Path) -> list[Path]:
    batch = COMPLEXITY_BATCH[setup.scale]
    models = [find_model(row.spec.model, COMPLEXITY_SIZE) for row in rows]
    if torch.accelerator.is_available():
        models = [model.to(torch.accelerator.current_accelerator()) for model in models]
    speeds = measure_speed(models, "encoder", COMPLEXITY_SIZE, batch)
    for row, model, speed in zip(rows, models, speeds, strict=True):
        values = {"parameters (M)": measure_complexity(model, COMPLEXITY_SIZE).encoder_parameters / 1e6}
        if speed.peak_memory is not None:
            values["memory (MB)"] = speed.peak_memory / 1e6
        row.values.append({**values, "images/s": speed.images_per_second})
    return []


def latents(experiment: Experiment, setup: Setup, rows: Sequence[Row], pictures: Path) -> list[Path]:
    drawn = []
    for row in rows:
        trained = row.trained[0]
        size = measured_size(trained.config, row.spec, setup.scale)
        images = named_images(held_out_images(setup, row.spec, size), size, SHOWN)
        path = pictures.with_name(f"{pictures.name}-{slug(row.spec.name)}.png")
        with replacing(path) as temporary:
            draw_reconstructions(load(trained), images, temporary, principal=False)
        drawn.append(path)
        row.values.append({"seconds": trained.seconds})
    return drawn


def features(experiment: Experiment, setup: Setup, rows: Sequence[Row], pictures: Path) -> list[Path]:
    maps, numbers = {}, {}
    shown: list[tuple[str, Pixels]] = []
    for row in rows:
        trained = row.trained[0]
        size = measured_size(trained.config, row.spec, setup.scale)
        images = named_images(held_out_images(setup, row.spec, size), size, IMBALANCE_IMAGES)
        shown = images[:: max(1, len(images) // SHOWN)][:SHOWN]
        found = {name: feature_magnitude(load(trained), pixels) for name, pixels in images}
        maps[row.spec.name] = [found[name] for name, _ in shown]
        numbers[row.spec.name] = imbalance(list(found.values()))
        row.values.append({"imbalance": numbers[row.spec.name], "seconds": trained.seconds})
    path = pictures.with_suffix(".png")
    with replacing(path) as temporary:
        draw_feature_maps(shown, maps, numbers, temporary)
    return [path]


def resolution(experiment: Experiment, setup: Setup, rows: Sequence[Row], pictures: Path) -> list[Path]:
    shrink = TINY_SIZE if setup.scale == "tiny" else 1
    sizes, metrics = [size // shrink for size in experiment.sizes], wanted_metrics(experiment, setup)
    folder = held_out_images(setup, rows[0].spec, max(sizes))  # shrunk, not enlarged
    workers = rows[0].trained[0].config.data.workers
    models = {row.spec.name: load(row.trained[0]) for row in rows}
    found = sweep_resolutions(models, open_images(folder), sizes, metrics, workers=workers)
    values = {
        name: {size: evaluation.values for size, evaluation in by_size.items()}
        for name, by_size in found.items()
    }
    for row in rows:
        own, trained_size = values[row.spec.name], models[row.spec.name].config.sample_size
        found_at = {f"{metric} at {size}": own[size][metric] for metric in metrics for size in sizes}
        worst = {
            f"worst {metric} degradation (%)": max(
                relative_degradation(
                    {size: own[size][metric] for size in sizes}, metric, trained_size
                ).values()
            )
            for metric in metrics
        }
        row.values.append({**found_at, **worst})
    path = pictures.with_suffix(".png")
    with replacing(path) as temporary:
        draw_resolutions(values, {name: m.config.sample_size for name, m in models.items()}, temporary)
    return [path]


def gradients(experiment: Experiment, setup: Setup, rows: Sequence[Row], pictures: Path) -> list[Path]:
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
    path = pictures.with_suffix(".png")
    with replacing(path) as temporary:
        draw_gradient_ratios(ratios, temporary)
    return [path]


def generation(experiment: Experiment, setup: Setup, rows: Sequence[Row], pictures: Path) -> list[Path]:
    """What `litevae scale`, `encode` and `train-diffusion` do one after the other."""
    drawn = []
    for row in rows:
        trained = row.trained[0]
        size = measured_size(trained.config, row.spec, setup.scale)
        folder, workers = trained.config.data.train, trained.config.data.workers
        if setup.scale == "tiny":
            folder = str(squares_folder(setup.output, held_out=False, size=size))
        images = open_images(folder)
        if load(trained).config.latents_mean is None:
            store_scale(
                trained.folder / "model" / "config.json", measure_latents(load(trained), images, size)
            )
        latents = trained.folder / "latents"
        encoded = encode_images(load(trained), images, latents, Settings(size, mirror=True), workers=workers)
        if encoded.stopped_by:
            raise Stopped(f"stopped by {encoded.stopped_by}; the same command goes on")
        config = load_diffusion_config(
            DIFFUSION[setup.scale][0],
            [
                *DIFFUSION[setup.scale][1:],
                f"model={trained.folder}",
                f"data.latents={latents}",
                f"fid.images={folder}",
                f"output_dir={trained.folder / 'diffusion'}",
                "resume=auto",
                *row.spec.diffusion,
            ],
        )
        result = train_diffusion(config, load(trained))
        if result.stopped_by:
            raise Stopped(f"stopped by {result.stopped_by}; the same command goes on")
        values = {} if result.fid is None else {"fid": result.fid}
        row.values.append({**values, "seconds of the second stage": result.seconds})
        path = pictures.with_name(f"{pictures.name}-{slug('-'.join(row.spec.row))}.png")
        with replacing(path) as temporary:
            shutil.copyfile(result.output_dir / "samples.png", temporary)
        drawn.append(path)
    return drawn


def named_images(folder: str, size: int, count: int) -> list[tuple[str, Pixels]]:
    """Squares of `size` pixels, with names for a picture."""
    images = load_validation(open_images(folder), size, count).images
    return [(Path(name).stem, pixels) for name, pixels in images]


def slug(name: str) -> str:
    """For a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(trained: Trained) -> Autoencoder:
    """The run's model, on the GPU if there is one."""
    model = load_model(trained.folder)
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


KINDS: dict[str, Callable[[Experiment, Setup, Sequence[Row], Path], list[Path]]] = {
    "reconstruction": reconstruction,
    "complexity": complexity,
    "mmd": mmd,
    "latents": latents,
    "features": features,
    "resolution": resolution,
    "gradients": gradients,
    "generation": generation,
}
