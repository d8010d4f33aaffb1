"""Arrays in .npy files, with numpy as the writer."""

import io
import tracemalloc

import numpy as np
import pytest

from litevae.data.arrays import is_npy, read_npy
from litevae.data.pixels import BadImage


def written(array):
    file = io.BytesIO()
    np.save(file, array)
    file.seek(0)
    return file


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "i1", "<f2", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_wrote_them(shape, dtype, order):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype, order=order)
    file = written(array)
    assert is_npy(file)
    found = read_npy(file, 35)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([[{}]], dtype=object), "holds values of type 'object', and not integers or floats"),
        (np.zeros((4, 4), bool), "holds values of type 'bool'"),
        (np.zeros((4, 4), complex), "holds values of type 'complex128'"),
        (np.zeros((4, 4), "f4,f4"), "and not integers or floats"),
        (np.zeros(9), r"has the shape \(9,\), and not \(H, W\) or \(H, W, C\) with C=1, 3 or 4"),
        (np.zeros((3, 8, 8)), r"has the shape \(3, 8, 8\)"),
        (np.zeros((1, 8, 8, 3)), r"has the shape \(1, 8, 8, 3\)"),
        (np.zeros((0, 8)), r"has the shape \(0, 8\)"),
        (np.zeros((8, 9)), "has 72 pixels, more than 64; LITEVAE_MAX_IMAGE_PIXELS=N allows N pixels"),
    ],
)
def test_arrays_that_are_no_images(array, reason):
    with pytest.raises(BadImage, match=reason):
        read_npy(written(array), 64)


def test_a_huge_array_takes_no_memory():
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**5, 10**5)}
    np.lib.format.write_array_header_1_0(file, header)
    file.seek(0)
    tracemalloc.start()
    with pytest.raises(BadImage, match="has 10000000000 pixels"):
        read_npy(file, 10**8)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_other_versions_are_refused():
    file = io.BytesIO(b"\x93NUMPY\x03\x00" + bytes(8))
    with pytest.raises(BadImage, match=r"version 3\.0"):
        read_npy(file, 64)
    assert not is_npy(io.BytesIO(b"\x89PNG"))
