"""One experiment from its name to its report."""

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


def run_experiment(name: str, setup: Setup) -> Path | None:
    """Trains, measures and writes the result; returns the Markdown file's path, in the first process only.

    Args:
        name: as `load_experiment` takes it.

    Raises:
        Stopped: by a signal; what is trained is kept.
        UserError: before any training, what `prepare` raises; later what training and measuring do.
        NonFiniteError, OSError: as `litevae.training.train`.
    """
    start = time.perf_counter()
    state = PartialState(cpu=not torch.accelerator.is_available())
    experiment, configs = prepare(name, setup)
    setup.output.mkdir(parents=True, exist_ok=True)
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
