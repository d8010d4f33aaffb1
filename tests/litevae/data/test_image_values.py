"""Files whose numbers Pillow does not read as they are stored."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from litevae.data.images import decode_image, read_values
from litevae.data.pixels import BadImage

DEEP = np.linspace(0, 65535, 9 * 7).reshape(9, 7).astype(np.uint16)


@pytest.mark.parametrize(
    ("values", "options", "reason"),
    [
        (np.stack([DEEP] * 3), {"photometric": "rgb"}, "unsigned integers of 16 bits in Pillow's mode RGB"),
        (DEEP.astype(np.uint32) + 2**31, {}, "unsigned integers of 32 bits in Pillow's mode I"),
        (DEEP.astype(np.int8), {}, "signed integers of 8 bits in Pillow's mode L"),
        (np.stack([DEEP] * 5), {"photometric": "minisblack"}, "has 5 pages: store them as single images"),
        (DEEP.astype(np.uint8), {"photometric": "miniswhite"}, "is grey whose 0 is white"),
        (DEEP.astype(np.float64), {}, "with a range of values, images are .npy, PNG or TIFF files"),
    ],
)
def test_tiff_that_pillow_would_change_is_refused(tmp_path, values, options, reason):
    tifffile.imwrite(tmp_path / "x.tif", values, **options)
    with pytest.raises(BadImage, match=reason):
        read_values(tmp_path / "x.tif")


def test_frames_of_a_png_are_refused(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (0, 100)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="has 2 frames: store them as single images"):
        read_values(tmp_path / "x.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planes_of_a_picture(tmp_path, dtype, compression):
    planes = np.stack([DEEP, DEEP.T.reshape(9, 7), DEEP[::-1]])
    planes = (planes // 257).astype(np.uint8) if dtype == np.uint8 else planes
    tifffile.imwrite(tmp_path / "x.tif", planes, photometric="rgb", compression=compression)
    if dtype == np.uint16 and compression is None:
        with pytest.raises(BadImage, match="a plane of 16 bits per channel"):
            decode_image(tmp_path / "x.tif")
    else:
        # Pillow keeps the upper byte of 16 bits, at most one level below the nearest.
        expected = planes.transpose(1, 2, 0) / (1 if dtype == np.uint8 else 257)
        assert np.abs(decode_image(tmp_path / "x.tif") - expected).max() <= (dtype == np.uint16)


def test_array_without_a_range_names_the_setting(tmp_path):
    np.save(tmp_path / "x.npy", DEEP)
    with pytest.raises(BadImage, match=r"only a model with data\.value_range takes arrays"):
        decode_image(tmp_path / "x.npy")
    with pytest.raises(BadImage, match=r"data\.value_range"), (tmp_path / "x.npy").open("rb") as file:
        decode_image(file)
