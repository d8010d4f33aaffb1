"""`litevae experiment`."""

from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import parse_metrics
from litevae.errors import UserError


def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as table09 or figure05; list shows all.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of training to change.")
    ] = None,
    scale: Annotated[
        str, typer.Option(metavar="SCALE", help="tiny, medium, or paper for the published setting.")
    ] = "tiny",
    data: Annotated[
        list[str] | None, typer.Option(metavar="SET=PATH", help="A data set's images, for paper.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="SET=PATH", help="Its images to measure on, for paper.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Of rfid, lpips, psnr, ssim; the experiment's by default."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Runs of each row.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Default: runs/experiments/SCALE."),
    ] = None,
) -> None:
    """Run one of the paper's tables or figures.

    \b
    Example: litevae experiment list
             litevae experiment table09
             litevae experiment table05 --scale paper --data imagenet=TRAIN --validation imagenet=VAL
             litevae experiment table04 max_steps=20
             torchrun --nproc-per-node 2 --no-python litevae experiment table01 --scale paper ...

    Trains every model of the experiment and writes NAME.md: our figures with the paper's beside them, and
    whether what the paper says of them shows; NAME.json has every setting; figures come as PNG. tiny is the
    same code with the whole encoders on scikit-image's photographs, a quarter of the image size, 0.2% of the
    steps and a small decoder: a minute or so a model on two CPU cores. medium, for a GPU, has half the size, 1%
    of the steps and the whole decoder. Their figures are no measure of the paper's.

    Models lie in DIR/runs under a digest of their settings: experiments share those that they have in common,
    and a command that was interrupted goes on with those that are left (at paper's scale, from its checkpoint).
    Data sets are imagenet, ffhq, celeba-hq and deepfashion. Settings of the second stage begin with diffusion.,
    as in diffusion.max_steps=100.
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
    """SET=PATH of an option."""
    result = {}
    for value in values or ():
        key, sign, path = value.partition("=")
        if not (key and sign and path):
            raise UserError(f"{option} {value}: write SET=PATH, such as imagenet=path/to/images")
        result[key] = path
    return result
