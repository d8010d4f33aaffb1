import numpy as np
import pytest
import pywt
import torch

from litevae_kernels.haar import reference, shapes
from litevae_kernels.haar.shapes import MODES

# height, width, levels; "reflect" needs lengths of at least 2 at every level
CASES = [(8, 12, 2), (7, 13, 1), (11, 6, 2), (37, 45, 3)]


def random_image(height, width):
    return torch.randn(
        2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height)
    )


def by_pywavelets(image, levels, mode):
    """Returns LL and then H, V and D of each level, coarsest level first."""
    ll, *details = pywt.wavedec2(image.numpy(), "haar", mode=mode, level=levels)
    return [torch.from_numpy(band) for band in (ll, *(band for level in details for band in level))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width", "levels"), CASES)
def test_analysis_equals_pywavelets(height, width, levels, mode):
    image = random_image(height, width)
    expected = by_pywavelets(image, levels, mode)
    flat = reference.analysis(image, levels, mode, 1.0, False, torch.float64, False)
    stacked = reference.analysis(image, levels, mode, 0.5, True, torch.float64, True)
    for actual, band in zip(flat, expected, strict=True):
        torch.testing.assert_close(actual, band)
    for level, actual in enumerate(stacked, start=1):
        assert actual.is_contiguous(memory_format=torch.channels_last)
        first = 1 + 3 * (levels - level)
        details = torch.cat(expected[first : first + 3], 1)
        torch.testing.assert_close(actual[:, 3:], details * 0.5**level)
    torch.testing.assert_close(stacked[-1][:, :3], expected[0] * 0.5**levels)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("height", "width", "levels"), CASES)
def test_synthesis_is_the_transposed_matrix_of_analysis(height, width, levels, stacked, mode):
    image = random_image(height, width).requires_grad_()
    coeffs = reference.analysis(image, levels, mode, 0.5, stacked, torch.float64, False)
    grads = [
        torch.from_numpy(np.random.default_rng(i).standard_normal(c.shape)) for i, c in enumerate(coeffs)
    ]
    (expected,) = torch.autograd.grad(coeffs, image, grads)
    actual = reference.synthesis(grads, height, width, mode, 0.5, stacked, torch.float64, False)
    torch.testing.assert_close(actual, expected)


def test_the_oracle_shares_no_shape_arithmetic_with_what_it_judges(monkeypatch):
    def fail(*_):
        raise AssertionError("the reference must not use the shapes of the other backends")

    monkeypatch.setattr(shapes, "level_sizes", fail)
    monkeypatch.setattr(shapes, "extension_index", fail)
    assert not {"level_sizes", "extension_index", "MODES", "shapes"} & set(vars(reference))
    for mode in MODES:
        coeffs = reference.analysis(random_image(7, 9), 2, mode, 1.0, False, torch.float64, False)
        reference.synthesis(coeffs, 7, 9, mode, 1.0, False, torch.float64, False)


def test_half_precision_is_rounded_once():
    image = random_image(16, 16).half()
    (actual,) = reference.analysis(image, 1, "symmetric", 1.0, True, torch.float16, False)
    (wide,) = reference.analysis(image, 1, "symmetric", 1.0, True, torch.float32, False)
    assert torch.equal(actual, wide.half())
