"""Folders with squares of scikit-image's photographs, for the small scales."""

import shutil
import tempfile
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from litevae.data.pixels import Pixels
from litevae.data.sources import HELD_OUT_PHOTOGRAPH, TRAINING_PHOTOGRAPHS, load_photograph
from litevae.errors import UserError
from litevae.experiments.spec import RunSpec, Setup
from litevae.files import make_folder

TRAINING_SQUARES = 256  # maximum number for measuring latents


def held_out_images(setup: Setup, run: RunSpec, size: int) -> str:
    """Returns the source of images that a row's model is not trained on, as `open_images` takes it.

    Args:
        setup: scale and folders.
        run: the row.
        size: side in pixels of the squares to measure on.
    """
    if not setup.at.demo:
        return setup.validation[run.dataset]
    return str(squares_folder(setup.output, held_out=True, size=size))


def squares_folder(output: Path, held_out: bool, size: int) -> Path:
    """Returns a folder with squares cut from the demo's photographs, and creates it if it is missing.

    Args:
        output: folder of the experiments' results.
        held_out: whether to cut from the photograph that no model trains on, or from the others.
        size: side of the squares in pixels; nothing is resized.

    Raises:
        UserError: the photographs are smaller than a square, or the folder cannot be created.
    """
    folder = output / "images" / f"{'held-out' if held_out else 'training'}-{size}"
    state = PartialState()
    if state.is_main_process and not folder.is_dir():
        names = (HELD_OUT_PHOTOGRAPH,) if held_out else TRAINING_PHOTOGRAPHS
        squares = [
            (f"{name}-{place:04d}.png", square)
            for name in names
            for place, square in enumerate(cut(load_photograph(name), size))
        ]
        if not squares:
            raise UserError(f"squares of {size} pixels are larger than the photographs of the demo")
        if not held_out:
            squares = squares[:: max(1, -(-len(squares) // TRAINING_SQUARES))]
        try:
            make_folder(folder.parent)
            unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        except OSError as error:
            raise UserError(f"cannot write to {output}: {error.strerror}") from None
        for name, square in squares:
            Image.fromarray(square).save(unfinished / name)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:  # another experiment has made it meanwhile, or the disk failed
            shutil.rmtree(unfinished)
            if not folder.is_dir():
                raise
    state.wait_for_everyone()
    return folder


def cut(image: Pixels, size: int) -> list[Pixels]:
    """Cuts an (H, W, 3) image into adjacent squares, from its upper left corner."""
    height, width = image.shape[:2]
    return [
        image[top : top + size, left : left + size]
        for top in range(0, height - size + 1, size)
        for left in range(0, width - size + 1, size)
    ]
