"""Folders with squares of photographs, for the scales below the paper's."""

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from litevae.data.pixels import BadImage, Pixels
from litevae.data.sources import HELD_OUT_PHOTOGRAPH, TRAINING_PHOTOGRAPHS, load_photograph, open_images
from litevae.errors import UserError
from litevae.experiments.spec import RunSpec, Setup
from litevae.files import make_folder

SQUARES = 256  # maximum number for measuring

Squares = Iterable[tuple[str, Pixels]]  # names for files, and pixels


def held_out_images(setup: Setup, run: RunSpec, size: int) -> str:
    """Returns the source of images that a row's model is not trained on, as `open_images` takes it.

    Args:
        setup: scale and folders.
        run: the row.
        size: side in pixels of the squares to measure on.
    """
    if setup.at.demo:
        return str(squares_folder(setup.output, held_out=True, size=size))
    source = setup.validation[run.dataset]
    if not setup.at.reduced:
        return source
    return str(cut_held_out(setup.output, source, size))


@functools.lru_cache
def cut_held_out(output: Path, source: str, size: int) -> Path:
    """Returns a folder, named by its content, with squares of a source of images; as `squares_folder` otherwise.

    Raises:
        UserError: an image that is due cannot be read, or as `make_squares`.
    """
    squares = list(squares_of_source(source, size))
    content = hashlib.sha256()
    for _, pixels in squares:
        content.update(pixels.tobytes())
    name = f"{content.hexdigest()[:8]}-{size}"
    return make_squares(output, name, squares, f"the images of {source}", size, SQUARES)


def squares_of_source(path: str, size: int) -> Squares:
    """Yields squares, evenly spaced in the source and in its images, and not resized: at most twice `SQUARES`.

    Raises:
        UserError: an image cannot be read.
    """
    images = open_images(path)
    step = max(1, len(images) // SQUARES)
    most = -(-SQUARES * step // len(images))  # per image
    for index in range(0, len(images), step):
        try:
            squares = cut(images.load(index), size)
        except BadImage as error:
            raise UserError(f"{images.name(index)}: {error}") from None
        places = {(2 * number + 1) * len(squares) // (2 * most) for number in range(most)}
        for place in sorted(places) if squares else ():
            yield f"{index:07d}-{place:04d}.png", squares[place].copy()


def squares_folder(output: Path, held_out: bool, size: int) -> Path:
    """Returns a folder with squares cut from the demo's photographs, and creates it if it is missing.

    Args:
        output: folder of the experiments' results.
        held_out: whether to cut from the photograph that no model trains on, or from the others.
        size: side of the squares in pixels; nothing is resized.

    Raises:
        UserError: the photographs are smaller than a square, or the folder cannot be created.
    """
    names: Sequence[str] = (HELD_OUT_PHOTOGRAPH,) if held_out else TRAINING_PHOTOGRAPHS
    squares = (
        (f"{name}-{place:04d}.png", square)
        for name in names
        for place, square in enumerate(cut(load_photograph(name), size))
    )
    folder = f"{'held-out' if held_out else 'training'}-{size}"
    return make_squares(
        output, folder, squares, "the photographs of the demo", size, 0 if held_out else SQUARES
    )


def make_squares(output: Path, name: str, squares: Squares, origin: str, size: int, most: int = 0) -> Path:
    """Returns `output/images/name`, a folder with `squares`, and creates it if it is missing.

    Args:
        output: folder of the experiments' results.
        name: name of the new folder.
        squares: what it holds.
        origin: what the squares are cut from, for messages.
        size: their side in pixels.
        most: maximum number of squares to keep, evenly spaced; 0 keeps all.

    Raises:
        UserError: there are no squares, or the folder cannot be created.
    """
    folder = output / "images" / name
    state = PartialState()
    if state.is_main_process and not folder.is_dir():
        found = list(squares)
        if not found:
            raise UserError(f"squares of {size} pixels are larger than {origin}")
        if most and len(found) > most:
            found = [found[number * len(found) // most] for number in range(most)]
        try:
            make_folder(folder.parent)
            unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        except OSError as error:
            raise UserError(f"cannot write to {output}: {error.strerror}") from None
        for file, square in found:
            Image.fromarray(square).save(unfinished / file)
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
