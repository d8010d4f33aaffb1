"""`litevae eval`."""

import glob
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import (
    COLUMNS,
    METRIC_NAMES,
    BatchSizeOption,
    DataArgument,
    ModelArgument,
    OptionalCountOption,
    OverwriteOption,
    PrecisionOption,
    SizeOption,
    WorkersOption,
    check_new_file,
    choose_workers,
    finite,
    model_provenance,
    parse_metrics,
    provenance,
    write_json,
)
from litevae.models.loading import load_model


def evaluate(
    model: ModelArgument,
    data: DataArgument,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help=f"Metrics, from {METRIC_NAMES}; by default those of rfid, lpips, psnr and ssim that take the "
            "model's images.",
        ),
    ] = None,
    size: SizeOption = 256,
    count: OptionalCountOption = None,
    batch_size: BatchSizeOption = 16,
    workers: WorkersOption = None,
    precision: PrecisionOption = "auto",
    sample: Annotated[
        bool, typer.Option("--sample", help="Decode a sample of each posterior instead of its mode.")
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="The autoencoder that the model's encoder was distilled from, to compare them.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="JSON file for the result.")
    ] = Path("eval.json"),
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder for the reconstructions as PNG files, or an .npz file for them, which ADM's evaluator reads.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure a model's reconstructions: rFID, LPIPS, ST-LPIPS, PSNR and SSIM.

    \b
    Example: litevae eval runs/imagenet-b path/to/images -o imagenet-b.json
             litevae eval diffusers:path/to/sd-vae path/to/images -o sd-vae.json
             litevae eval runs/demo demo --size 64 --metrics psnr,ssim
             litevae eval runs/demo demo --size 64 --metrics st_lpips,psnr
             litevae eval runs/distill path/to/images --teacher path/to/sd-vae
             litevae eval runs/imagenet-b path/to/images --save reconstructions.npz
             torchrun --nproc-per-node 2 --no-python litevae eval runs/imagenet-b path/to/images

    Images are cropped to the middle square and resized; images and reconstructions are rounded to 8 bits before
    every metric, unless the model was trained with data.value_range. PSNR (in dB), SSIM, LPIPS (VGG16) and
    ST-LPIPS (AlexNet) are means over the images. rFID compares Inception features and is biased upwards if there are
    few images: compare it only at equal counts. rFID, LPIPS and ST-LPIPS are for RGB images of 8 bits. st_lpips is not
    LPIPS; it needs pip install 'litevae[perceptual]' and downloads nothing.

    Three yardsticks without any learning are measured on the same pixels: the mean colour, the enlarged means of
    f x f blocks, and as many of each block's coarsest Haar coefficients as the latent has channels. A model below the
    last one is marked.

    --teacher also measures the autoencoder that the model was distilled from, the speed of both encoders, and in
    float32 the errors of the model's posterior: the error of its mean relative to the standard deviation of the
    teacher's posterior at that place (two samples of that posterior differ by 1.41) and relative to that of the
    teacher's latents, and the error of its log-variance.

    --save DIR writes each reconstruction as an 8-bit PNG file, named by the image's number. --save FILE.npz writes
    all of them as arr_0, (N, size, size, 3) uint8, in ADM's format; such an evaluation cannot be continued. With
    data.value_range, they are .npy files and float32, with values of that range.

    The JSON file records the crop, the count, the precision, the SHA-256 of the weights and the versions beside the
    figures. An interrupted evaluation continues from FILE.partial when the same command runs in as many processes.
    diffusers:FOLDER is any diffusers AutoencoderKL, or a pipeline with one. The weights of Inception (for rfid)
    and of VGG16 (for lpips) are downloaded if they are missing. The averaged weights of a checkpoint are
    evaluated.
    """
    names = parse_metrics(metrics or "")
    check_new_file(output, overwrite)
    partial: Path | None = output.with_name(output.name + ".partial")
    if save is not None:
        from litevae.evaluation.saved import is_array, prepare_folder

        if is_array(save):
            check_new_file(save, overwrite)
            partial = None
        else:
            prepare_folder(save, overwrite, any(output.parent.glob(f"{glob.escape(output.name)}.partial*")))
    autoencoder = load_model(model)
    other = None
    if teacher is not None:
        from litevae.evaluation.teacher import check_same_latents, compare_latents
        from litevae.training.teacher import load_teacher, teacher_folder

        other = load_teacher(teacher)
        check_same_latents(autoencoder, other)

    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from litevae.data.sources import open_images
    from litevae.environment import DTYPES, choose_precision
    from litevae.evaluation.complexity import measure_speed
    from litevae.evaluation.evaluate import evaluate as run
    from litevae.evaluation.fid import INCEPTION_NAME
    from litevae.evaluation.metrics import DEFAULT_METRICS, check_metrics_apply, split_metrics
    from litevae.evaluation.yardsticks import BELOW, below_haar, for_json, yardstick_labels
    from litevae.losses.st_lpips import ST_LPIPS_NAME
    from litevae.models.interface import pixel_format

    images_of = pixel_format(autoencoder)
    left_out: list[str] = []
    if metrics is None:
        names, left_out = split_metrics(DEFAULT_METRICS, images_of)
    else:
        check_metrics_apply(names, images_of, "--metrics: ")
    has_device = torch.accelerator.is_available()
    state = PartialState(cpu=not has_device)
    if left_out and state.is_main_process:
        print(
            f"without {' and '.join(left_out)}, which compare RGB images of 8 bits: the model's are {images_of}",
            file=sys.stderr,
        )
    chosen = [choose_precision(precision, state.device, images_of.value_range is not None)]
    broadcast_object_list(chosen)  # the machines of the processes may differ
    images, loading = open_images(data, images_of), (size, count, batch_size, choose_workers(workers))
    if other is not None:
        # In float32: half precision rounds a mean by more than the standard deviation of a narrow posterior.
        errors = compare_latents(autoencoder.to(state.device), other.to(state.device), images, *loading)
    # diffusers' own `to` warns about modules to keep in float32, and there are none.
    torch.nn.Module.to(autoencoder, state.device, DTYPES[chosen[0]])
    measured = provenance(model, data, size, pixels=str(images_of))
    result = run(
        autoencoder,
        images,
        names,
        *loading,
        sample,
        partial,
        {"data": measured["data"], "weights": measured["weights"], "precision": chosen[0]}
        | ({} if save is None else {"save": str(save)}),
        save=save,
    )
    rows = {"model": result.values}
    if other is not None:
        torch.nn.Module.to(other, state.device, DTYPES[chosen[0]])
        rows["teacher"] = run(other, images, names, *loading, sample).values
    if not state.is_main_process:  # only the first process reports
        return
    labels = yardstick_labels(autoencoder)
    below = below_haar(result.values, result.yardsticks)
    record = {
        **measured,
        "count": result.count,
        "unreadable": result.unreadable,
        "latent": "sample" if sample else "mode",
        "precision": chosen[0],
        "metrics": {name: finite(value) for name, value in result.values.items()},
        "yardsticks": {labels[key]: values for key, values in for_json(result.yardsticks).items()},
        "below_haar_yardstick": below,
        "without_error": result.exact,
        "saved": save and str(save),
        "networks": {
            name: network
            for name, network in (
                ("rfid", INCEPTION_NAME),
                ("lpips", "LPIPS 0.1, VGG16"),
                ("st_lpips", ST_LPIPS_NAME),
            )
            if name in names
        },
    }
    if other is not None and teacher is not None:
        speeds = measure_speed([autoencoder, other], "encoder", size)
        record["teacher"] = {
            "model": teacher,
            "weights": model_provenance(teacher_folder(teacher))["weights"],
            "metrics": {name: finite(value) for name, value in rows["teacher"].items()},
            "latent_errors": {name: finite(value) for name, value in asdict(errors).items()},
            "encoder_images_per_second": {
                "model": speeds[0].images_per_second,
                "teacher": speeds[1].images_per_second,
            },
        }
    write_json(record, output)

    print(
        f"{result.count} images, middle square, {size} x {size}, {images_of}; {record['latent']} of the posterior; "
        f"{chosen[0]}"
    )
    for file, digest in measured["weights"].items():
        print(f"weights: {file}, SHA-256 {digest}")
    width = max(len(label) for label in labels.values())
    print(" " * width + "".join(f"{COLUMNS[name][0]:>10}" for name in result.values))
    rows |= {labels[key]: values for key, values in result.yardsticks.items()}
    for label, values in rows.items():
        figures = "".join(f"{value:10.{COLUMNS[name][1]}f}" for name, value in values.items())
        print(f"{label:{width}}{figures}{f'  {BELOW}' * (below and label == 'model')}")
    if other is not None:
        own, others = (speed.images_per_second for speed in speeds)
        print(
            f"error of the latent's mean: {errors.sigmas:.3g} standard deviations of the teacher's posterior, "
            f"{errors.relative:.2%} of the latents' standard deviation; of its log-variance: {errors.logvar:.3g}"
        )
        print(f"encoder: {own:.4g} images/s, the teacher's {others:.4g} images/s ({own / others:.1f}x)")
    for name, network in record["networks"].items():
        print(f"{COLUMNS[name][0]}: {network}")
    if result.exact and "psnr" in names:
        print(f"images reconstructed without an error: {result.exact}; the PSNR is the mean of the others")
    if result.unreadable:
        print(f"unreadable images, left out: {result.unreadable}")
    print(f"see {output}" + (f" and {save}" if save else ""))
