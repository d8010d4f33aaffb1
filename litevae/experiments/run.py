"""Running one experiment, from its name to its report."""

import time
from pathlib import Path

import torch
from accelerate import PartialState

from litevae.experiments.measure import measure
from litevae.experiments.plan import prepare
from litevae.experiments.report import write_report
from litevae.experiments.spec import Setup
from litevae.experiments.trained import Row, train_once
from litevae.files import replacing
from litevae.lock import locked_by_run


def run_experiment(name: str, setup: Setup) -> Path | None:
    """Trains and measures an experiment's models, and writes the report.

    Args:
        name: name of the experiment, or path of a YAML file, as `load_experiment` takes it.
        setup: scale, folders and overrides.

    Returns:
        The path of the Markdown file in the first process, None in the others.

    Raises:
        Stopped: a signal ended a training run. The models that are trained are kept.
        UserError: as `prepare`, before any training; later as training and measuring; or another experiment
            writes to the same folder.
        NonFiniteError, WorkerDied, OSError: as `litevae.training.train`.
    """
    start = time.perf_counter()
    state = PartialState(cpu=not torch.accelerator.is_available())
    experiment, configs = prepare(name, setup)
    with locked_by_run(setup.output, "litevae experiment"):
        configs = configs or [[] for _ in experiment.runs]
        rows = [
            Row(run, [train_once(config) for config in seeds])
            for run, seeds in zip(experiment.runs, configs, strict=True)
        ]
        pictures = measure(experiment, setup, rows)
        if not state.is_main_process:
            return None
        stem = Path(name).stem
        drawn = []
        for suffix, draw in pictures.items():
            path = setup.output / f"{stem}{suffix}.png"
            with replacing(path) as temporary:
                draw(temporary)
            drawn.append(path)
        return write_report(stem, experiment, setup, rows, drawn, time.perf_counter() - start)
