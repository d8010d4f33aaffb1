"""What several commands need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from litevae.errors import UserError
from litevae.models.loading import DIFFUSERS, model_folder

# heading, digits after the point
COLUMNS = {"rfid": ("rFID", 3), "lpips": ("LPIPS", 4), "psnr": ("PSNR", 2), "ssim": ("SSIM", 4)}

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="Folder of a model or of a training run, or diffusers:FOLDER of a VAE."
    ),
]
ModelsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL...", help="Folders of models or of training runs, or diffusers:FOLDER of a VAE."
    ),
]
NamesOption = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="What to call them in the picture; their folders' names by default."),
]
DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="Folder of images, or what else data.train may be.")
]


def parse_metrics(text: str) -> list[str]:
    """Names with commas between: each once, the known ones in the order of `COLUMNS`."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = [name for name in COLUMNS if name in names]
    return known + [name for name in names if name not in COLUMNS]


def name_each(paths: Sequence[Path], names: str | None) -> dict[str, Path]:
    """The paths by the names that the user gave, with commas between, or by their last parts where they differ.

    Raises:
        UserError: another number of names than of paths, or the same twice.
    """
    chosen = [Path(str(path).removeprefix(DIFFUSERS)).resolve().name for path in paths]
    if names is not None:
        chosen = [name.strip() for name in names.split(",")]
    elif len(set(chosen)) < len(chosen):
        chosen = [str(path) for path in paths]
    if len(chosen) != len(paths) or len(set(chosen)) < len(chosen) or "" in chosen:
        raise UserError(
            f"--names must be {len(paths)} different ones, with commas between, got {', '.join(chosen)}"
        )
    return dict(zip(chosen, paths, strict=True))


def results(folder: Path, *names: str, overwrite: bool) -> list[Path]:
    """The files to write to `folder`; UserError if one is there and may not be replaced."""
    files = [folder / name for name in names]
    for file in files:
        if file.exists() and not overwrite:
            raise UserError(f"{file} is there already: give another folder with -o, or --overwrite")
    return files


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None


def provenance(model: Path, data: str, *sizes: int) -> dict[str, Any]:
    """What was measured, and with what, for the JSON file of a result.

    Args:
        model: as `load_model` takes it.
        data: as `open_images` takes it.
        sizes: of the squares, in pixels.
    """
    from importlib.metadata import version

    from litevae.environment import versions
    from litevae.files import sha256

    folder = model_folder(model)
    # diffusers prefers safetensors too
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    packages = ("diffusers", "torchvision", "torchmetrics")
    return {
        "model": str(model),
        "weights": {file.name: sha256(file) for file in files},
        "data": data,
        "crop": f"middle square, resized to {' and '.join(f'{size} x {size}' for size in sizes)} (Pillow's "
        "bicubic, antialiased), 8 bits",
        "versions": {"litevae": versions()} | {package: version(package) for package in packages},
    }
