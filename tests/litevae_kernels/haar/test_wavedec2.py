"""wavedec2 and waverec2 against PyWavelets and ptwt: axes, the maximum level, dtypes and the names of modes."""

import numpy as np
import ptwt
import pytest
import pywt
import torch

from litevae_kernels import haar_dwt2d, haar_pyramid, use_backend, wavedec2, waverec2
from litevae_kernels.haar.shapes import MODES

AXES = [(-2, -1), (-1, -2), (0, 1), (1, 0), (-3, -2), (3, 1), [1, -1]]


def random_image(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def flat(coeffs):
    return [torch.as_tensor(coeffs[0]), *(torch.as_tensor(band) for bands in coeffs[1:] for band in bands)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b)  # shapes and dtypes, too


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("level", [1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_axes_and_level_equal_pywavelets_and_ptwt(dtype, level, axes, backend):
    image = random_image(8, 12, 4, 6, dtype=dtype)
    options = {"level": level, "mode": "symmetric", "axes": tuple(axes)}
    with use_backend(backend):
        ours = wavedec2(image, level, axes=axes)
        restored = waverec2(ours, axes=axes)
    assert_equal(ours, pywt.wavedec2(image.numpy(), "haar", **options))
    assert_equal(ours, ptwt.wavedec2(image, "haar", **options))
    torch.testing.assert_close(restored, ptwt.waverec2(ours, "haar", axes=tuple(axes)))
    torch.testing.assert_close(waverec2(ours, axes=axes, output_size=[image.shape[a] for a in axes]), image)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (7, 2), (8, 8), (31, 64), (33, 17)])
def test_the_default_level_is_pywavelets_maximum(shape, mode):
    image = random_image(2, *shape)
    ours = wavedec2(image, mode=mode)
    assert len(ours) - 1 == pywt.dwtn_max_level(shape, "haar")
    assert_equal(ours, pywt.wavedec2(image.numpy(), "haar", mode=mode))
    torch.testing.assert_close(waverec2(ours, output_size=shape), image)


def test_transposed_axes_exchange_the_details():
    image = random_image(1, 6, 8)
    (_, (h, v, d)), (_, (h2, v2, d2)) = wavedec2(image, 1), wavedec2(image, 1, axes=(-1, -2))
    torch.testing.assert_close((h2, v2, d2), (v, h, d))


def test_gradients_and_compilation_along_other_axes():
    image = random_image(4, 6, 2).requires_grad_()

    def both(x):
        return waverec2(
            [c if i == 0 else tuple(b * 2 for b in c) for i, c in enumerate(wavedec2(x, axes=(0, 1)))],
            axes=(0, 1),
        )

    assert torch.autograd.gradcheck(both, image)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="eager")(image), both(image))


def test_half_precision_keeps_its_dtype():
    for dtype in (torch.float16, torch.bfloat16):
        coeffs = wavedec2(random_image(4, 6, 2, dtype=dtype), axes=(0, 1))
        assert {c.dtype for c in flat(coeffs)} == {dtype}
        assert waverec2(coeffs, axes=(0, 1)).shape == (4, 6, 2)


@pytest.mark.parametrize(
    "axes", [(0, 1, 2), (1,), (1, 1), (1, -2), (0, 3), (-4, 0), (0, 1.0), (True, 0), 1, None, "01"]
)
def test_bad_axes(axes):
    image = torch.zeros(4, 4, 4)
    for call in (lambda: wavedec2(image, 1, axes=axes), lambda: waverec2([image, (image,) * 3], axes=axes)):
        with pytest.raises(
            (TypeError, ValueError), match=r"^axes is .*two different axes from -3 to 2 are needed$"
        ):
            call()


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1)])
def test_an_image_without_a_maximum_level(shape):
    assert pywt.dwtn_max_level(shape, "haar") == 0
    with pytest.raises(
        ValueError, match=f"^level is None, whose maximum is 0 for {shape[0]}x{shape[1]}; allowed: 1 to 16"
    ):
        wavedec2(torch.zeros(shape))


UNSUPPORTED = [*sorted({*pywt.Modes.modes} - {*MODES}), "sym", "zpd", "cpd", "ppd", "sp1", "per"]


@pytest.mark.filterwarnings("ignore:.* has been renamed")  # PyWavelets says so of its old names.
@pytest.mark.parametrize(
    "mode", [*UNSUPPORTED, "Symmetric", "mirror", "", None, 2, ("zero", "zero"), ["zero"], np.ones(2)]
)
@pytest.mark.parametrize("function", [haar_dwt2d, haar_pyramid, wavedec2])
def test_modes_that_are_refused_by_name(function, mode):
    with pytest.raises(
        ValueError, match=r"^mode is .*; allowed: symmetric, reflect, zero, periodic, constant$"
    ) as caught:
        function(torch.zeros(1, 1, 4, 4), mode=mode)
    if isinstance(mode, str) and mode in UNSUPPORTED:
        pywt.dwt2(np.zeros((4, 4)), "haar", mode=mode)  # PyWavelets knows it.
        assert f"mode is '{mode}', PyWavelets' name" in str(caught.value)
