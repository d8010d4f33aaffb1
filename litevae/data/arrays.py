"""Arrays of numbers in .npy files, whose header is checked before anything is read."""

from typing import IO

import numpy as np

from litevae.data.pixels import CHANNELS, BadImage, Values
from litevae.errors import shorten

READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def is_npy(file: IO[bytes]) -> bool:
    """Returns whether a file begins as an .npy file does, and goes back to its beginning."""
    prefix = file.read(len(np.lib.format.MAGIC_PREFIX))
    file.seek(0)
    return prefix == np.lib.format.MAGIC_PREFIX


def read_npy(file: IO[bytes], most_pixels: int) -> Values:
    """Reads an array (H, W) or (H, W, C) of integers or floats.

    Args:
        file: content of an .npy file, from its beginning on.
        most_pixels: limit of H W.

    Raises:
        BadImage: the array is of another shape or dtype, such as Python objects, or has too many pixels.
        Exception: the file is corrupt or truncated.
    """
    version = np.lib.format.read_magic(file)
    if version not in READERS:  # version 3 is for names of columns
        raise BadImage(f"is an .npy file of version {version[0]}.{version[1]}, and not 1.0 or 2.0")
    shape, _, dtype = READERS[version](file)
    if dtype.kind not in "iuf":
        raise BadImage(f"holds values of type {shorten(str(dtype))}, and not integers or floats")
    if len(shape) not in (2, 3) or min(shape) < 1 or (len(shape) == 3 and shape[2] not in CHANNELS):
        raise BadImage(f"has the shape {shorten(shape)}, and not (H, W) or (H, W, C) with C=1, 3 or 4")
    if shape[0] * shape[1] > most_pixels:
        raise BadImage(
            f"has {shape[0] * shape[1]} pixels, more than {most_pixels}; "
            "LITEVAE_MAX_IMAGE_PIXELS=N allows N pixels"
        )
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
