"""The public Haar functions against PyWavelets, on every backend that runs here."""

import subprocess
import sys
import warnings

import numpy as np
import ptwt
import pytest
import pywt
import torch

from litevae_kernels import haar_dwt2d, haar_idwt2d, haar_pyramid, use_backend, wavedec2, waverec2
from litevae_kernels.backend import core
from litevae_kernels.haar.shapes import MODES, level_sizes
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory, shapes

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def random_image(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def pywt_wavedec2(image, level, mode):
    """PyWavelets in float64; None where it does not allow the image (reflect on a length of 1)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "level value is too high": small images are the point
        try:
            return pywt.wavedec2(image.double().numpy(), "haar", mode=mode, level=level)
        except ValueError:
            assert mode == "reflect"
            return None


def pywt_stacked(image, levels, mode, scale):
    """PyWavelets' transform of each level in our layout: (N, 4C, h, w), times scale**level."""
    out, ll = [], image.double().numpy()
    for level in range(1, levels + 1):
        ll, details = pywt.dwt2(ll, "haar", mode=mode)
        out.append(torch.from_numpy(np.concatenate([ll, *details], axis=1)) * scale**level)
    return out


# At least 640 cases: 2 backends x 5 modes x 4 levels x 16 shapes, and a quarter for each lower instruction set; the
# layouts take turns.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_equals_pywavelets(backend, fewer, mode, levels):
    compared = 0
    # reflect does not allow shapes that shrink to a length of 1
    count = 120 if mode == "reflect" else 20
    for i, shape in enumerate(shapes(count, seed=levels)):
        if compared == fewer(count):
            break
        image = arrange(random_image(shape, seed=i), LAYOUTS[i % len(LAYOUTS)])
        expected = pywt_wavedec2(image, levels, mode)
        with use_backend(backend), poisoned_memory():
            if expected is None:
                with pytest.raises(ValueError, match="length of at least 2"):
                    wavedec2(image, levels, mode=mode)
                continue
            actual = wavedec2(image, levels, mode=mode)
            pyramid = haar_pyramid(image, levels, mode=mode)
            restored = waverec2(actual, output_size=shape[2:])
        assert len(actual) == levels + 1
        largest = image.abs().max().item() * 2**levels
        assert_within_budget(
            actual[0], torch.from_numpy(expected[0]), magnitude=largest, operations=5 * levels
        )
        for ours, theirs in zip(actual[1:], expected[1:], strict=True):
            assert len(ours) == len(theirs) == 3
            for a, b in zip(ours, theirs, strict=True):
                assert_within_budget(a, torch.from_numpy(b), magnitude=largest, operations=5 * levels)
        for a, b in zip(pyramid, pywt_stacked(image, levels, mode, 0.5), strict=True):
            assert_within_budget(a, b, magnitude=largest, operations=5 * levels)
        assert_within_budget(restored, image, magnitude=4 * largest, operations=10 * levels)
        compared += 1
    assert compared >= fewer(16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes_and_layouts(backend, layout, dtype, mode):
    for i, shape in enumerate([(2, 3, 32, 48), (1, 1, 17, 9), (2, 5, 8, 67), (3, 2, 2, 2)]):
        image = arrange(random_image(shape, dtype, seed=i), layout)
        with use_backend(backend), poisoned_memory():
            pyramid = haar_pyramid(image, 1 if min(shape[2:]) < 9 else 3, mode=mode)
            single = haar_dwt2d(image, mode=mode)
        magnitude = 4 * image.abs().max().item()
        exact = pywt_stacked(image, len(pyramid), mode, 0.5)
        for a, b in zip(pyramid, exact, strict=True):
            assert a.dtype == dtype
            assert_within_budget(a, b, magnitude=magnitude, operations=3 * len(pyramid))
        assert_within_budget(single, pywt_stacked(image, 1, mode, 1.0)[0], magnitude=magnitude, operations=3)
        channels_last = layout == "channels_last" and shape[1] > 1
        for out in (*pyramid, single):
            assert out.is_contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("in_dtype", DTYPES)
def test_pyramid_converts_dtype_and_memory_format(backend, in_dtype, out_dtype):
    image = random_image((2, 3, 24, 40), in_dtype)
    exact = pywt_stacked(image, 3, "symmetric", 0.5)
    for layout in ("contiguous", "channels_last"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            source = arrange(image, layout)
            with use_backend(backend), poisoned_memory():
                out = haar_pyramid(source, dtype=out_dtype, memory_format=memory_format)
            for a, b in zip(out, exact, strict=True):
                assert a.dtype == out_dtype
                assert a.is_contiguous(memory_format=memory_format)
                assert_within_budget(a, b, magnitude=4 * image.abs().max().item(), operations=9)


def test_pyramid_is_the_local_mean():
    image = random_image((1, 2, 16, 24))
    for level, out in enumerate(haar_pyramid(image), start=1):
        mean = torch.nn.functional.avg_pool2d(image, 2**level)
        torch.testing.assert_close(out[:, :2], mean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse(backend, dtype):
    for shape in [(2, 3, 32, 32), (1, 1, 7, 12), (2, 4, 33, 65), (1, 2, 1, 1)]:
        image = random_image(shape, dtype)
        with use_backend(backend), poisoned_memory():
            coeffs = haar_dwt2d(image)
            restored = haar_idwt2d(coeffs, output_size=shape[2:])
            whole = haar_idwt2d(coeffs)
        assert whole.shape[2:] == (2 * coeffs.shape[2], 2 * coeffs.shape[3])
        assert torch.equal(whole[..., : shape[2], : shape[3]], restored)
        c = shape[1]
        exact = torch.from_numpy(
            pywt.idwt2(
                tuple(
                    x.double().numpy()
                    if i == 0
                    else tuple(y.double().numpy() for y in coeffs[:, c:].chunk(3, 1))
                    for i, x in enumerate([coeffs[:, :c], coeffs[:, c:]])
                ),
                "haar",
            )
        )
        assert_within_budget(whole, exact, magnitude=4 * coeffs.abs().max().item(), operations=4)


def test_waverec2_takes_pywavelets_coefficients(backend):
    image = random_image((3, 45, 37))
    coeffs = pywt.wavedec2(image.numpy(), "haar", mode="periodic", level=3)
    tensors = [torch.from_numpy(coeffs[0]), *(tuple(map(torch.from_numpy, level)) for level in coeffs[1:])]
    with use_backend(backend):
        restored = waverec2(tensors)
    assert_within_budget(
        restored, torch.from_numpy(pywt.waverec2(coeffs, "haar")), magnitude=64.0, operations=15
    )
    torch.testing.assert_close(restored[..., :45, :37], image)


def test_equals_ptwt_where_ptwt_can():
    image = random_image((2, 3, 64, 48), torch.float32)
    theirs = ptwt.wavedec2(image, "haar", level=3, mode="reflect")
    ours = wavedec2(image, 3, mode="reflect")
    torch.testing.assert_close(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 2, 2, 3), (0,), (2, 0)])
def test_wavedec2_leading_dimensions(leading):
    image = random_image((*leading, 13, 10))
    coeffs = wavedec2(image, 2)
    assert coeffs[0].shape == (*leading, 4, 3)
    assert coeffs[2][0].shape == (*leading, 7, 5)
    assert waverec2(coeffs, output_size=(13, 10)).shape == image.shape
    torch.testing.assert_close(waverec2(coeffs, output_size=(13, 10)), image)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (1, 1, 1, 1), (1, 1, 1, 64), (1, 64, 2, 1)])
def test_degenerate_shapes(backend, shape):
    with use_backend(backend):
        image = torch.ones(shape)
        for out in haar_pyramid(image):
            assert out.shape[:2] == (shape[0], 4 * shape[1])
            # a constant image is its own mean, and has no details
            assert torch.equal(out[:, : shape[1]], torch.ones_like(out[:, : shape[1]]))
            assert not out[:, shape[1] :].any()


@pytest.mark.usefixtures("isa")
def test_many_levels():
    image = random_image((1, 1, 40, 70))
    expected = pywt_wavedec2(image, 16, "symmetric")
    actual = wavedec2(image, 16)
    assert_within_budget(actual[0], torch.from_numpy(expected[0]), magnitude=4.0 * 2**16, operations=80)
    torch.testing.assert_close(waverec2(actual, output_size=(40, 70)), image)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_count_does_not_change_the_bits(threads):
    image = random_image((3, 3, 130, 94), torch.float32)
    expected = [x.clone() for x in haar_pyramid(image, 3, mode="reflect")]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            for a, b in zip(haar_pyramid(image, 3, mode="reflect"), expected, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
def test_streamed_stores_give_the_same_values():
    image = random_image((16, 3, 256, 256), torch.float32)  # large enough for stores that bypass the caches
    with poisoned_memory():
        large = haar_pyramid(image)
        restored = haar_idwt2d(haar_dwt2d(image))
    for i in (0, 7, 15):
        for a, b in zip(large, haar_pyramid(image[i : i + 1]), strict=True):
            assert torch.equal(a[i : i + 1], b)
    torch.testing.assert_close(restored, image)
    torch.testing.assert_close(large[1], pywt_stacked(image, 2, "symmetric", 0.5)[1].float())


def test_every_instruction_set_and_layout_gives_the_same_bits(isa):
    for shape, mode in [
        ((2, 3, 40, 44), "symmetric"),
        ((1, 4, 33, 67), "reflect"),
        ((2, 2, 17, 130), "periodic"),
    ]:
        image = random_image(shape, torch.float32)
        grads = [random_image(x.shape, torch.float32, seed=1) for x in haar_pyramid(image, mode=mode)]
        results = {}
        for name in dict.fromkeys(("baseline", isa)):
            core.set_isa(name)
            for layout in ("contiguous", "channels_last", "sliced", "transposed"):
                source = arrange(image, layout).detach().requires_grad_()
                with poisoned_memory():
                    out = haar_pyramid(source, mode=mode)
                    back = haar_idwt2d(haar_dwt2d(source, mode=mode), output_size=shape[2:])
                    (grad,) = torch.autograd.grad(out, source, grads)
                results[name, layout] = [*out, back, grad]
        first = results["baseline", "contiguous"]
        exact = pywt_stacked(image, 3, mode, 0.5)
        for a, b in zip(first, exact, strict=False):
            assert_within_budget(a.detach(), b, magnitude=4 * image.abs().max().item(), operations=9)
        for values in results.values():
            for a, b in zip(values, first, strict=True):
                assert torch.equal(a, b)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_instruction_set_rounds_as_torch(dtype):
    bits = (
        torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, 256, 256)
    )  # every value of the dtype
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(1, 1, 256, 256, generator=generator) * torch.logspace(-9, 4, 256)
    # the mean of a 2x2 block of four equal values is exact
    widened = bits.repeat_interleave(2, 2).repeat_interleave(2, 3)
    ours = haar_pyramid(widened, 1, dtype=torch.float32)[0][:, :1]
    finite = bits.float().abs() < 8e37  # the sum of four larger values overflows
    assert torch.equal(ours[finite], bits.float()[finite])
    assert ours[bits.isnan()].isnan().all()
    rounded = haar_pyramid(floats.repeat_interleave(2, 2).repeat_interleave(2, 3), 1, dtype=dtype)[0][:, :1]
    assert torch.equal(rounded, floats.to(dtype))


def test_an_instruction_set_that_is_not_there():
    with pytest.raises(ValueError, match="does not run 'neon' code; the best is"):
        core.set_isa("neon")


def test_zero_extension_of_an_infinity(backend):
    image = torch.zeros(1, 1, 4, 5)
    image[0, 0, 1, 4] = float("inf")
    with use_backend(backend):
        assert haar_dwt2d(image, mode="zero")[0, :, 0, 2].tolist() == [float("inf"), -float("inf")] * 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_out_of_memory_is_an_exception():
    code = """
import resource, torch
from litevae_kernels.haar import native, op
image = torch.zeros(1, 1, 8, 2**21)
coeffs = op._empty_coeffs(image, 3, True, image.dtype, False)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, -1))
for function in (native.analysis, native.synthesis):
    try:
        function(image, coeffs, 3, "symmetric", 0.5, True)
    except MemoryError:
        print("MemoryError")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["MemoryError"] * 2, result.stderr


def test_infinities_and_nan_stay_where_they_are():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)
    image[0, 0, 0, 0], image[0, 0, 7, 7] = float("nan"), float("inf")
    out = haar_dwt2d(image)
    assert out[:, :, 0, 0].isnan().all()
    assert out[:, :, 3, 3].isinf().all()
    out[:, :, 0, 0] = out[:, :, 3, 3] = 0
    assert not out.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: haar_dwt2d("x"), TypeError, "image is a str; a torch.Tensor is needed"),
        (lambda x: haar_dwt2d(x.int()), TypeError, "image has dtype torch.int32; allowed: float32"),
        (lambda x: haar_dwt2d(x[0]), ValueError, "image has 3 dimensions; 4 are needed"),
        (lambda x: haar_dwt2d(x[:, :, :0]), ValueError, "height and width must be at least 1"),
        (lambda x: haar_dwt2d(x, mode="mirror"), ValueError, "mode is 'mirror'; allowed: symmetric, reflect"),
        (lambda x: haar_dwt2d(x[..., :1], mode="reflect"), ValueError, "level 1 transforms 6x1"),
        (lambda x: haar_pyramid(x, 4, mode="reflect"), ValueError, "level 4 transforms 1x1"),
        (lambda x: haar_pyramid(x, 0), ValueError, "levels is 0; allowed: 1 to 16"),
        (lambda x: haar_pyramid(x, 17), ValueError, "levels is 17; allowed: 1 to 16"),
        (lambda x: haar_pyramid(x, 2.0), TypeError, "levels is 2.0; an integer"),
        (lambda x: haar_pyramid(x, dtype=torch.int8), TypeError, "dtype is torch.int8; allowed"),
        (lambda x: haar_pyramid(x, memory_format=torch.channels_last_3d), ValueError, "memory_format is"),
        (lambda x: haar_idwt2d(x), ValueError, "coeffs has 3 channels; a multiple of 4"),
        (
            lambda x: haar_idwt2d(x[:, :1].expand(-1, 4, -1, -1), output_size=(9, 16)),
            ValueError,
            "height of 11 or 12 and a width of 15 or 16",
        ),
        (
            lambda x: haar_idwt2d(x.repeat(1, 4, 1, 1), output_size=6),
            ValueError,
            "output_size is 6; two whole numbers",
        ),
        (
            lambda x: haar_idwt2d(x.repeat(1, 4, 1, 1), output_size=(12.0, 16)),
            TypeError,
            "output_size is (12.0, 16); two whole numbers",
        ),
        (
            lambda x: haar_dwt2d(x.to_sparse()),
            TypeError,
            "image is torch.sparse_coo; a dense (strided) tensor",
        ),
        (lambda x: waverec2(None), TypeError, "coeffs must be"),
        (lambda x: waverec2([x, None]), TypeError, "details of level 1 must be three tensors"),
        (lambda x: waverec2([x[0, 0, 0], (x, x, x)]), ValueError, "cA has shape (8,)"),
        (lambda x: waverec2([x] + [(x, x, x)] * 17), ValueError, "coeffs has 17 levels; allowed: 1 to 16"),
        (lambda x: wavedec2(x[0, 0, 0], 1), ValueError, "image has 1 dimensions; at least 2"),
        (lambda x: wavedec2(x, 0), ValueError, "level is 0; allowed: 1 to 16"),
        (lambda x: waverec2(x), TypeError, "coeffs must be"),
        (lambda x: waverec2([x]), TypeError, "coeffs must be"),
        (lambda x: waverec2([x, (x, x)]), TypeError, "details of level 1 must be three tensors"),
        (lambda x: waverec2([x, (x, x, None)]), TypeError, "cD of level 1 is a NoneType"),
        (lambda x: waverec2([x, (x, x, x.double())]), TypeError, "allowed: cA's, torch.float32"),
        (lambda x: waverec2([x, (x, x, x[..., :2])]), ValueError, "cD of level 1 has shape"),
        (lambda x: waverec2([x[..., :2], (x, x, x)]), ValueError, "details of level 1 are 6x8"),
        (lambda x: waverec2([x, (x, x, x), (x, x, x)]), ValueError, "does not fit the 6x8 of level 2"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call(torch.zeros(2, 3, 6, 8))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_level_sizes():
    assert level_sizes(67, 2, 3) == [(67, 2), (34, 1), (17, 1), (9, 1)]
