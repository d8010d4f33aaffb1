"""What is measured of an experiment's models, for each kind of experiment."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.latent_space import collect_latents, distance_from_gaussian
from litevae.experiments.runner import Row, Setup, Trained, squares_folder, wanted_metrics
from litevae.experiments.spec import Experiment, measured_size
from litevae.models.baseline import Autoencoder
from litevae.training.sources import open_images

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


def load(trained: Trained) -> Autoencoder:
    """The run's model, on the GPU if there is one."""
    from litevae.cli.common import load_model

    model = load_model(trained.folder)
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


KINDS: dict[str, Callable[[Experiment, Setup, Sequence[Row], Path], list[Path]]] = {
    "reconstruction": reconstruction,
    "mmd": mmd,
}
