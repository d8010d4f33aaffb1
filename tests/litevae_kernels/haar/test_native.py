import pytest
import pywt
import torch

from litevae_kernels.backend import core, cuda_built
from litevae_kernels.haar import native
from litevae_kernels.haar.shapes import MODES
from litevae_kernels.tensors import native_view

needs_cuda_build = pytest.mark.skipif(not cuda_built, reason="the core was built without CUDA")


def poisoned(*shape):
    """Returns a slice of a larger tensor of NaN."""
    n, c, h, w = shape
    whole = torch.full((n, c + 1, h + 2, w + 3), float("nan"), dtype=torch.float64)
    return whole[:, 1:, 1:-1, 2:-1]


def random_image(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mode", MODES)
def test_analysis_fills_given_tensors_as_pywavelets_does(mode):
    image = random_image(2, 3, 7, 10)
    ll, details = pywt.wavedec2(image.numpy(), "haar", mode=mode, level=1)
    expected = [torch.from_numpy(band) for band in (ll, *details)]
    flat = [poisoned(2, 3, 4, 5) for _ in range(4)]
    native.analysis(image, flat, 1, mode, 1.0, False)
    stacked = poisoned(2, 12, 4, 5)
    native.analysis(image, [stacked], 1, mode, 1.0, True)
    for actual, band in zip(flat, expected, strict=True):
        torch.testing.assert_close(actual, band)
    assert torch.equal(stacked, torch.cat(flat, 1))


@pytest.mark.usefixtures("isa")
def test_synthesis_is_the_inverse_for_even_sizes():
    image = random_image(2, 3, 8, 12)
    coeffs = [
        poisoned(2, 3, 2, 3),
        *(poisoned(2, 3, 2, 3) for _ in "HVD"),
        *(poisoned(2, 3, 4, 6) for _ in "HVD"),
    ]
    native.analysis(image, coeffs, 2, "symmetric", 1.0, False)
    restored = poisoned(2, 3, 8, 12)
    native.synthesis(restored, coeffs, 2, "symmetric", 1.0, False)
    torch.testing.assert_close(restored, image)


@pytest.mark.parametrize(
    ("shape", "levels", "message"),
    [
        ((2, 12, 4, 4), 1, "coefficients of level 1 do not fit the image"),
        ((2, 11, 4, 5), 1, "coefficients of level 1 do not fit the image"),
        ((2, 12, 4, 5), 2, "wrong number of coefficient tensors"),
        ((2, 12, 4, 5), 0, "wrong number of coefficient tensors"),
    ],
)
def test_the_core_refuses_coefficients_that_do_not_fit(shape, levels, message):
    with pytest.raises(ValueError, match=message):
        native.analysis(random_image(2, 3, 7, 10), [poisoned(*shape)], levels, "zero", 1.0, True)


# tests/gpu_emulator shows that the kernels use exactly this much.
@needs_cuda_build
def test_scratch_memory_holds_the_ll_between_passes_of_three_levels():
    def scratch_bytes(levels, image_dtype=torch.float32, coeff_dtype=torch.float32):
        image = torch.empty(2, 3, 67, 130, dtype=image_dtype, device="meta")
        coeffs = torch.empty(2, 12, 34, 65, dtype=coeff_dtype, device="meta")
        return core.haar_scratch_bytes(native_view(image), native_view(coeffs), levels)

    assert [scratch_bytes(levels) for levels in (1, 2, 3)] == [0, 0, 0]
    after_3, after_6 = 2 * 3 * 9 * 17, 2 * 3 * 2 * 3
    assert [scratch_bytes(levels) for levels in (4, 6, 7)] == [
        4 * after_3,
        4 * after_3,
        4 * (after_3 + after_6),
    ]
    assert scratch_bytes(7, torch.float16, torch.float64) == 8 * (after_3 + after_6)
    assert scratch_bytes(4, torch.bfloat16, torch.float16) == 4 * after_3
    with pytest.raises(ValueError, match="levels out of range"):
        scratch_bytes(17)
