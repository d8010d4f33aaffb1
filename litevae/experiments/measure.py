"""What is measured of an experiment's models, for each kind of experiment."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from litevae.evaluation.complexity import measure_complexity, measure_speed
from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.latent_space import collect_latents, distance_from_gaussian
from litevae.experiments.runner import Row, Setup, Trained, squares_folder, wanted_metrics
from litevae.experiments.spec import Experiment, measured_size
from litevae.models.baseline import Autoencoder
from litevae.training.checkpoint import replacing
from litevae.training.data import load_validation
from litevae.training.report import draw_reconstructions
from litevae.training.sources import open_images

COMPLEXITY_SIZE, COMPLEXITY_BATCH = 256, {"tiny": 1, "paper": 32}
SHOWN = 3  # rows of a picture
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
            images = open_images(trained.config.data.validation)
            workers = trained.config.data.workers
            values = evaluate(load(trained), images, metrics, size, workers=workers).values
            row.values.append({**values, "seconds": trained.seconds})
    return []


def mmd(experiment: Experiment, setup: Setup, rows: Sequence[Row], _: Path) -> list[Path]:
    groups = MMD_GROUPS[setup.scale]
    for row in rows:
        for trained in row.trained:
            size = measured_size(trained.config, row.spec, setup.scale)
            folder = trained.config.data.validation
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
    from litevae.cli.common import find_model

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
        images = load_validation(open_images(trained.config.data.validation), size, SHOWN).images
        path = pictures.with_name(f"{pictures.name}-{slug(row.spec.name)}.png")
        with replacing(path) as temporary:
            draw_reconstructions(load(trained), images, temporary, principal=False)
        drawn.append(path)
        row.values.append({"seconds": trained.seconds})
    return drawn


def slug(name: str) -> str:
    """For a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(trained: Trained) -> Autoencoder:
    """The run's model, on the GPU if there is one."""
    from litevae.cli.common import load_model

    model = load_model(trained.folder)
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


KINDS: dict[str, Callable[[Experiment, Setup, Sequence[Row], Path], list[Path]]] = {
    "reconstruction": reconstruction,
    "complexity": complexity,
    "mmd": mmd,
    "latents": latents,
}
