"""`litevae complexity`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import (
    BatchSizeOption,
    OverwriteOption,
    PrecisionOption,
    make_folder,
    results,
    write_json,
)
from litevae.errors import UserError
from litevae.models.loading import find_model

NAMES = ("sd-vae", "litevae-s", "litevae-b", "litevae-m", "litevae-l")


def complexity(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Folders of models or of training runs, preset names, or sd-vae; the models of Table 3 by default.",
        ),
    ] = None,
    size: Annotated[
        int, typer.Option(min=16, max=65536, metavar="PIXELS", help="Side of the square images.")
    ] = 256,
    batch_size: BatchSizeOption = 4,
    precision: PrecisionOption = "auto",
    decoder: Annotated[bool, typer.Option("--decoder", help="Measure decoders instead of encoders.")] = False,
    rounds: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Timed runs per model, after two runs that measure memory."),
    ] = 5,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the picture and the figures."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure parameters, cost, memory and speed of models on this machine, as in the paper's Table 3.

    \b
    Example: litevae complexity
             litevae complexity --size 512 --batch-size 1 --precision bf16
             litevae complexity sd-vae runs/demo --decoder -o complexity
             litevae complexity litevae-b litevae-b,aggregator=vit litevae-b,extractor=nafnet

    The models take turns in eager mode and the channels_last layout, on the GPU if there is one; images/s is the
    median over the rounds. The settings after a preset's name are those of `model` in litevae train. A MAC is one
    multiplication and one addition; GMACs are per image. The peak memory does not include weights and images;
    the paper's does, for batches of 32 on a Quadro RTX 6000. `pytest benchmarks` compares more ways to run the
    models. With -o the results are also written to complexity.json and complexity.png.
    """
    files = results(output, "complexity.json", "complexity.png", overwrite=overwrite) if output else []
    import torch

    from litevae.environment import DTYPES, choose_precision, device_name, versions
    from litevae.evaluation.complexity import Side, draw_complexity, measure_complexity, measure_speed
    from litevae.files import replacing

    names = list(dict.fromkeys(models or NAMES))  # each model once
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    chosen = choose_precision(precision, device)
    autoencoders, costs = [], []
    for name in names:
        model = find_model(name, size)
        try:
            costs.append(measure_complexity(model, size))
        except ValueError as error:
            raise UserError(f"{name}: --size {size}: {error}") from None
        # diffusers' own `to` warns about modules to keep in float32, and there are none.
        autoencoders.append(torch.nn.Module.to(model, device, DTYPES[chosen]))
    side: Side = "decoder" if decoder else "encoder"
    speeds = measure_speed(autoencoders, side, size, batch_size, rounds)

    where = device_name() if device.type in ("cpu", "cuda") else str(device)
    channels = autoencoders[0].config.in_channels
    heading = f"{batch_size} x {channels} x {size} x {size}, {chosen}; {where}; torch {torch.__version__}"
    print(heading)
    width = max(len(name) for name in (*names, side))
    print(f"{side:{width}}{'parameters':>14}{'GMACs':>10}{'peak MB':>10}{'images/s':>10}")
    for name, cost, speed in zip(names, costs, speeds, strict=True):
        parameters, macs = (
            (cost.decoder_parameters, cost.decoder_macs)
            if decoder
            else (cost.encoder_parameters, cost.encoder_macs)
        )
        peak = "unknown" if speed.peak_memory is None else f"{speed.peak_memory / 1e6:,.0f}"
        print(f"{name:{width}}{parameters:14,}{macs / 1e9:10,.2f}{peak:>10}{speed.images_per_second:10.4g}")
    if output is None:
        return
    make_folder(output)
    record = {
        "side": side,
        "batch_size": batch_size,
        "size": size,
        "precision": chosen,
        "rounds": rounds,
        "device": where,
        "versions": {"litevae": versions()},
        "models": [
            {"name": name, **asdict(cost), **asdict(speed)}
            for name, cost, speed in zip(names, costs, speeds, strict=True)
        ],
    }
    write_json(record, files[0])
    with replacing(files[1]) as path:
        draw_complexity(
            dict(zip(names, costs, strict=True)), dict(zip(names, speeds, strict=True)), side, heading, path
        )
    print(f"see {files[0]} and {files[1]}")
