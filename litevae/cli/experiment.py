"""`litevae experiment`."""

from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import METRIC_NAMES, parse_metrics
from litevae.errors import UserError


def experiment(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name such as table09 or figure05; list prints all names.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Training settings to change.")
    ] = None,
    scale: Annotated[
        str, typer.Option(metavar="SCALE", help="tiny, small, or paper (the published setting).")
    ] = "tiny",
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SET=PATH", help="Training images of a data set, for small and paper."),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="SET=PATH", help="Images of a data set to measure on, for small and paper."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help=f"Metrics, from {METRIC_NAMES}; the experiment's by default."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Runs per row.")] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CELL", help="Run only the rows that have this cell, and report only them; repeatable."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for models and results.  [default: runs/experiments/SCALE]",
        ),
    ] = None,
) -> None:
    """Run one of the paper's tables or figures, or one of ours.

    \b
    Example: litevae experiment list
             litevae experiment table09
             litevae experiment table05 --scale paper --data imagenet=TRAIN --validation imagenet=VAL
             litevae experiment table04 max_steps=20
             litevae experiment kl --scale small --data imagenet=TRAIN --validation imagenet=VAL --seeds 3
             torchrun --nproc-per-node 2 --no-python litevae experiment table01 --scale paper ...

    Trains every model of the experiment and writes NAME.md, with our figures beside the paper's, yardsticks without
    any learning, and a verdict on each of the paper's statements, for which several seeds are needed; NAME.json with
    every setting; and the figures as PNG files. tiny is a smoke test, whose report says only that everything ran. It
    runs the same code with the full encoders on scikit-image's photographs, at a quarter of the image size, for 0.2%
    of the steps and with a small decoder: about a minute per model on two CPU cores. small takes your photographs, at
    the paper's image sizes, for 0.5% of the steps, with a small decoder too. The figures of both cannot be compared
    with the paper's.

    Models are stored in DIR/runs under a hash of their settings. Experiments share the models that they have in
    common, and an interrupted command continues with the remaining models (above the tiny scale, from the last
    checkpoint). One experiment at a time can write to DIR. The data sets are imagenet, ffhq, celeba-hq and
    deepfashion. Settings of the second stage begin with "diffusion.", as in diffusion.max_steps=100.
    """
    from litevae.experiments.spec import load_experiment, shipped_experiments

    if name == "list":
        for each in shipped_experiments():
            print(f"{each}  {load_experiment(each).title}")
        return
    from accelerate import PartialState

    from litevae.experiments.run import run_experiment
    from litevae.experiments.spec import SCALES, Setup
    from litevae.experiments.trained import Stopped

    if scale not in SCALES:
        raise UserError(f"--scale {scale}: must be one of {', '.join(SCALES)}")
    setup = Setup(
        scale,
        output or Path("runs/experiments") / scale,
        pairs("--data", data),
        pairs("--validation", validation),
        overrides or (),
        parse_metrics(metrics) if metrics is not None else None,
        seeds,
        row or (),
    )
    try:
        report = run_experiment(name, setup)
    except Stopped as stopped:
        if PartialState().is_main_process:
            print(stopped)
        return
    if report is not None:
        print(report.read_text(encoding="utf-8"))
        print(f"see {report}")


def pairs(option: str, values: list[str] | None) -> dict[str, str]:
    """Parses the SET=PATH values of an option."""
    result = {}
    for value in values or ():
        key, sign, path = value.partition("=")
        if not (key and sign and path):
            raise UserError(f"{option} {value}: write SET=PATH, such as imagenet=path/to/images")
        result[key] = path
    return result
