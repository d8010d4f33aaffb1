"""`litevae resolution`."""

from typing import Annotated, Any

import typer

from litevae.cli.common import (
    COLUMNS,
    BatchSizeOption,
    DataArgument,
    FolderOption,
    MetricsOption,
    ModelsArgument,
    NamesOption,
    OptionalCountOption,
    OverwriteOption,
    WorkersOption,
    choose_workers,
    finite,
    make_folder,
    name_each,
    parse_metrics,
    provenance,
    results,
    write_json,
)
from litevae.errors import UserError
from litevae.models.loading import load_model


def resolution(
    models: ModelsArgument,
    data: DataArgument,
    output: FolderOption,
    sizes: Annotated[
        str, typer.Option(metavar="PIXELS", help="Sides that images are resized to.")
    ] = "64,128,256,512",
    metrics: MetricsOption = "psnr,ssim",
    names: NamesOption = None,
    count: OptionalCountOption = None,
    batch_size: BatchSizeOption = 16,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure models at several resolutions, as in the paper's Figures 5 and 8.

    \b
    Example: litevae resolution runs/imagenet-b runs/imagenet-sd-vae path/to/images -o resolution
             litevae resolution runs/smc runs/group path/to/images -o resolution --names SMC,GroupNorm
             litevae resolution runs/demo demo -o resolution --sizes 32,64,128

    Writes resolution.json, and resolution.png with each metric against the resolution and the degradation from
    the model's training size in percent (from its best value, if that size is not measured). Each metric is
    measured as by litevae eval, on the mode of the posterior. Images smaller than a size are enlarged, so use
    large ones.
    """
    record_file, picture = results(output, "resolution.json", "resolution.png", overwrite=overwrite)
    pixels = parse_sizes(sizes)
    wanted = parse_metrics(metrics)
    paths = name_each(models, names)
    autoencoders = {name: load_model(path) for name, path in paths.items()}

    import torch
    from accelerate import PartialState

    from litevae.data.sources import open_images
    from litevae.evaluation.resolution import draw_resolutions, relative_degradation, sweep_resolutions
    from litevae.evaluation.yardsticks import BELOW, below_haar, for_json, yardstick_labels
    from litevae.files import replacing
    from litevae.models.interface import shared_pixel_format

    images_of = shared_pixel_format(autoencoders)
    images = open_images(data, images_of)
    has_device = torch.accelerator.is_available()
    state = PartialState(cpu=not has_device)
    if has_device:
        for autoencoder in autoencoders.values():
            autoencoder.to(state.device)
    found = sweep_resolutions(
        autoencoders, images, pixels, wanted, count, batch_size, choose_workers(workers)
    )
    if not state.is_main_process:  # only the first process reports
        return
    make_folder(output)
    labels = {name: yardstick_labels(model) for name, model in autoencoders.items()}
    trained = {name: int(model.config.sample_size) for name, model in autoencoders.items()}
    values = {
        name: {size: result.values for size, result in by_size.items()} for name, by_size in found.items()
    }
    with replacing(picture) as path:
        draw_resolutions(values, trained, path)

    records, rows = [], []
    for name, by_size in found.items():
        worse = {
            metric: relative_degradation(
                {size: result.values[metric] for size, result in by_size.items()}, metric, trained[name]
            )
            for metric in wanted
        }
        measured: list[dict[str, Any]] = []
        for size, result in by_size.items():
            measured.append(
                {
                    "size": size,
                    "count": result.count,
                    "unreadable": result.unreadable,
                    "without_error": result.exact,
                    "metrics": {metric: finite(value) for metric, value in result.values.items()},
                    "yardsticks": {
                        labels[name][key]: each for key, each in for_json(result.yardsticks).items()
                    },
                    "degradation_percent": {metric: finite(worse[metric][size]) for metric in wanted},
                }
            )
            figures = [
                f"{result.values[metric]:10.{COLUMNS[metric][1]}f}{worse[metric][size]:+10.1f} %"
                for metric in wanted
            ]
            mark = f"  {BELOW}" * below_haar(result.values, result.yardsticks)
            rows.append((name, f"{size:6}" + "".join(figures) + mark))
        record = provenance(paths[name], data, *pixels, pixels=str(images_of))
        records.append({"name": name, "trained_at": trained[name], **record, "results": measured})
    write_json({"latent": "mode", "models": records}, record_file)

    counts = sorted({result.count for by_size in found.values() for result in by_size.values()})
    print(f"{' or '.join(map(str, counts))} images, middle square, {images_of}; mode of the posterior")
    width = max(len(name) for name in found)
    print(
        " " * width + "  size" + "".join(f"{COLUMNS[metric][0]:>10}{'degradation':>12}" for metric in wanted)
    )
    for name, row in rows:
        print(f"{name:{width}}{row}")
    print(f"see {record_file} and {picture}")


def parse_sizes(text: str) -> list[int]:
    """Parses comma-separated sides in pixels, in ascending order; raises UserError for anything else."""
    try:
        sizes = sorted(int(part) for part in text.split(","))
    except ValueError:
        sizes = []
    if not sizes or len(set(sizes)) < len(sizes):
        raise UserError(f"--sizes must be different whole numbers such as 64,128,256, got {text!r}")
    return sizes
