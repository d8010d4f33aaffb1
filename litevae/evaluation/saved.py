"""Reconstructions on the disk: a folder of PNG files, or of arrays, or an .npz that ADM's evaluator reads."""

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from litevae.data.images import write_values
from litevae.data.pixels import RGB, PixelFormat, Values
from litevae.errors import UserError
from litevae.files import make_folder, random_sibling, replacing

Save = Callable[[Sequence[int], Tensor], None]  # takes the numbers of images and their (N, C, H, W) pictures
ARRAY = "arr_0"  # the name that ADM's evaluator (Dhariwal and Nichol, 2021) and `numpy.savez` use


def is_array(target: Path) -> bool:
    """Returns whether pictures are saved at `target` as one array and not as a folder."""
    return target.suffix.lower() == ".npz"


def prepare_folder(folder: Path, replace: bool, resuming: bool) -> None:
    """Creates a folder for pictures, and deletes those of an earlier evaluation unless this one continues it.

    Raises:
        UserError: the folder cannot be created, or holds files that must not be replaced.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    if resuming:
        return
    old = [path for path in folder.iterdir() if re.fullmatch(r"[0-9]{8,}\.(png|npy)", path.name)]
    if any(folder.iterdir()) and not replace:
        raise UserError(f"{folder} is not empty: give a new folder to --save, or add --overwrite")
    for path in old:
        path.unlink(missing_ok=True)


@contextmanager
def saving(target: Path | None, state: PartialState, pixel_format: PixelFormat = RGB) -> Iterator[Save]:
    """Yields a function that saves pictures; all processes call it with theirs.

    Args:
        target: a folder, which exists and gets a file such as 00000012.png for each picture, by its number, or with a
            range of values 00000012.npy; or a path that ends in .npz, which is complete as soon as it exists; or None
            to save nothing.
        state: state of the processes. The .npz holds the pictures of one process after those of another.
        pixel_format: what the pictures are. With a range of values, these are saved.

    Raises:
        OSError: a file cannot be written.
    """
    if target is None:
        yield lambda numbers, pictures: None
    elif is_array(target):
        own = random_sibling(target, "part")
        shapes: list[tuple[int, ...]] = []
        try:
            with own.open("xb") as file:

                def append(_: Sequence[int], pictures: Tensor) -> None:
                    pixels = np.ascontiguousarray(to_save(pictures, pixel_format))
                    shapes.append(pixels.shape)
                    file.write(pixels.data)

                yield append
            parts = gather_object([(own, shapes)])
            if state.is_main_process:
                join(
                    target,
                    [path for path, _ in parts],
                    [shape for _, each in parts for shape in each],
                    pixel_format,
                )
            state.wait_for_everyone()  # the parts are read until then
        finally:
            own.unlink(missing_ok=True)
    else:
        folder = target

        def save(numbers: Sequence[int], pictures: Tensor) -> None:
            for number, pixels in zip(numbers, to_save(pictures, pixel_format), strict=True):
                suffix = "png" if pixel_format.value_range is None else "npy"
                with replacing(folder / f"{number:08d}.{suffix}") as path:
                    write_values(path, pixels)

        yield save


def to_save(pictures: Tensor, pixel_format: PixelFormat) -> Values:
    """Returns (N, C, H, W) pictures as (N, H, W, C) uint8, or float32 values of the range if there is one."""
    pixels: Values = pictures.permute(0, 2, 3, 1).cpu().numpy()
    return pixels if pixel_format.value_range is None else pixel_format.to_values(pixels).astype(np.float32)


def join(
    target: Path, parts: Sequence[Path], shapes: Sequence[tuple[int, ...]], pixel_format: PixelFormat
) -> None:
    """Writes an .npz of one (N, H, W, C) array, uint8 or float32, whose rows are the bytes of `parts`.

    Args:
        target: file to write.
        parts: files with the bytes of consecutive rows.
        shapes: shapes of the arrays that were written to them.
        pixel_format: what the pictures are.
    """
    shape = (sum(each[0] for each in shapes), *shapes[0][1:])
    dtype = np.uint8 if pixel_format.value_range is None else np.float32
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    with (
        replacing(target) as path,
        zipfile.ZipFile(path, "w") as archive,
        archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, header)
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, array, 2**20)
