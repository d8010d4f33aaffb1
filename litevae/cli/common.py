"""Arguments, options and helpers that several commands share."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from litevae.data.config import MOST_WORKERS
from litevae.errors import UserError
from litevae.files import why_missing
from litevae.models.loading import DIFFUSERS, model_folder

if TYPE_CHECKING:
    import torch

# By metric: heading, and digits after the decimal point.
COLUMNS = {
    "rfid": ("rFID", 3),
    "lpips": ("LPIPS", 4),
    "st_lpips": ("ST-LPIPS", 4),
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 4),
}
METRIC_NAMES = "rfid, lpips, st_lpips, psnr and ssim"

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a model or of a training run, or diffusers:FOLDER for an AutoencoderKL.",
    ),
]
ModelsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL...",
        help="Folders of models or of training runs, or diffusers:FOLDER for an AutoencoderKL.",
    ),
]
NamesOption = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Names for the picture; the folders' names by default."),
]
DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="Folder of images, or any other source that data.train takes.")
]
FolderOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the picture and the figures.")
]
MetricsOption = Annotated[str, typer.Option(metavar="NAMES", help=f"Metrics, from {METRIC_NAMES}.")]
SizeOption = Annotated[int, typer.Option(min=16, metavar="PIXELS", help="Side that images are resized to.")]
CountOption = Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of images to measure.")]
OptionalCountOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Maximum number of images to measure; all by default.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, metavar="N", help="Images per batch.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MOST_WORKERS,
        metavar="N",
        help="Processes that read images, per process of the command.  [default: all cores shared, at most 16]",
    ),
]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
PrecisionOption = Annotated[
    Precision,
    typer.Option(help="auto: bf16 where the GPU or CPU multiplies it, otherwise fp32."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]


def cores_per_process() -> int:
    """Returns the number of cores that this process may use, if each process of `torchrun` uses as many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def choose_workers(given: int | None) -> int:
    """Returns the number of processes that read images: the one that the user gives, or the default."""
    return min(cores_per_process(), 16) if given is None else given


def choose_device(name: str | None) -> "torch.device":
    """Returns the device that the user names, or else the GPU if there is one.

    Raises:
        UserError: there is no such device, or it does not work.
    """
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # This fails on "meta", where tensors have no values.
    # PyTorch raises AssertionError if it was built without the device's code.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name}: {reason}") from None
    return device


def stopped_message(signal_name: str, steps: int, has_checkpoints: bool) -> str:
    """Returns what a command prints when a signal has stopped a training run."""
    count = f"{steps} step{'s' * (steps != 1)}"
    if has_checkpoints:
        return f"stopped by {signal_name} after {count}; everything is saved: continue with resume=auto"
    return (
        f"stopped by {signal_name} after {count}; the results are saved, but no checkpoint (checkpoint.every=0), "
        "so the run cannot be resumed"
    )


def parse_metrics(text: str) -> list[str]:
    """Splits comma-separated names: each once, the known ones first, in the order of `COLUMNS`."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = [name for name in COLUMNS if name in names]
    return known + [name for name in names if name not in COLUMNS]


def name_each(paths: Sequence[Path], names: str | None) -> dict[str, Path]:
    """Names each path: by the user's comma-separated names, or by its last part where these differ.

    Raises:
        UserError: the number of names is not that of the paths, or a name occurs twice.
    """
    chosen = [os.path.basename(os.path.realpath(str(path).removeprefix(DIFFUSERS))) for path in paths]
    if names is not None:
        chosen = [name.strip() for name in names.split(",")]
    elif len(set(chosen)) < len(chosen):
        chosen = [str(path) for path in paths]
    if len(chosen) != len(paths) or len(set(chosen)) < len(chosen) or "" in chosen:
        raise UserError(
            f"--names must be {len(paths)} different names, separated by commas, got {', '.join(chosen)}"
        )
    return dict(zip(chosen, paths, strict=True))


def check_new(*files: Path, overwrite: bool) -> None:
    """Raises UserError if one of the files exists and may not be replaced."""
    for file in files:
        if file.exists() and not overwrite:
            raise UserError(f"{file} already exists: choose another place with -o, or add --overwrite")


def check_new_file(file: Path, overwrite: bool) -> None:
    """Raises UserError if the file exists and may not be replaced, or if its folder does not exist."""
    check_new(file, overwrite=overwrite)
    if not os.path.isdir(file.parent):
        raise UserError(f"{file.parent}: {why_missing(file.parent, 'folder')}")


def check_picture(file: Path) -> None:
    """Raises UserError unless the name ends in .png; Matplotlib chooses the format by it, or adds to it."""
    if file.suffix.lower() != ".png":
        raise UserError(f"{file}: the picture's name must end in .png")


def results(folder: Path, *names: str, overwrite: bool) -> list[Path]:
    """Returns the files to write to `folder`; raises UserError if one exists and may not be replaced."""
    files = [folder / name for name in names]
    check_new(*files, overwrite=overwrite)
    return files


def make_folder(folder: Path) -> None:
    """Creates a folder; raises UserError if that is not possible."""
    from litevae import files

    try:
        files.make_folder(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None


def write_json(record: Mapping[str, Any], file: Path) -> None:
    """Writes a result to a JSON file, which is complete as soon as it exists."""
    from litevae.files import replacing

    with replacing(file) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def finite(value: float) -> float | None:
    """Returns `value`, or None if it is not finite: JSON has no infinity."""
    return value if math.isfinite(value) else None


def provenance(model: Path, data: str, *sizes: int, pixels: str) -> dict[str, Any]:
    """Returns the model, data, crop and versions of a measurement, for the JSON file of its result.

    Args:
        model: folder of the model, as `load_model` takes it.
        data: source of the images, as `open_images` takes it.
        sizes: sides of the squares in pixels.
        pixels: description of the model's `PixelFormat`.
    """
    from litevae.data.remote import redact_pattern

    return {
        **model_provenance(model),
        "data": redact_pattern(data),
        "crop": f"middle square, resized to {' and '.join(f'{size} x {size}' for size in sizes)} (Pillow's "
        f"bicubic, antialiased), {pixels}",
    }


def model_provenance(model: Path) -> dict[str, Any]:
    """Returns the folder of a model, the digests of its weights, and the versions of the software."""
    from importlib.metadata import version

    from litevae.environment import versions
    from litevae.files import sha256

    folder = model_folder(model)
    # diffusers prefers safetensors too.
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    packages = ("diffusers", "torchvision", "torchmetrics")
    return {
        "model": str(model),
        "weights": {file.name: sha256(file) for file in files},
        "versions": {"litevae": versions()} | {package: version(package) for package in packages},
    }
