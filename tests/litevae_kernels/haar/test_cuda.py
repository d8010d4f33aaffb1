"""The CUDA C++ kernels on a GPU through the public functions; tests/gpu_emulator emulates one."""

import random

import pytest
import torch
from torch import Tensor

from litevae_kernels import haar_dwt2d, haar_idwt2d, haar_pyramid, use_backend, wavedec2, waverec2
from litevae_kernels.backend import why_not
from litevae_kernels.haar.shapes import MODES
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory, shapes

REASON = why_not("native", "cuda") if torch.cuda.is_available() else "no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = [(a, b) for a in DTYPES for b in DTYPES] + [
    (torch.float64, torch.float64),
    (torch.float32, torch.float64),
    (torch.float64, torch.bfloat16),
]
# Sizes for the fast paths, in addition to the odd sizes of `shapes`.
FAST_SHAPES = [
    (2, 3, 64, 64),
    (1, 3, 40, 264),
    (2, 3, 62, 250),
    (2, 4, 32, 24),
    (3, 1, 16, 136),
    (1, 6, 72, 8),
]


def random_tensor(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def too_small_to_reflect(shape, levels, mode):
    return mode == "reflect" and (min(shape[2:]) - 1) >> (levels - 1) == 0


def pyramid(image, levels, mode, dtype, memory_format):
    return haar_pyramid(image, levels, mode=mode, dtype=dtype, memory_format=memory_format)


@pytest.mark.parametrize(("image_dtype", "coeff_dtype"), PAIRS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("mode", MODES)
def test_pyramid_and_gradient_equal_reference(mode, image_dtype, coeff_dtype):
    compared = 0
    for i, shape in enumerate([*FAST_SHAPES, *shapes(12, seed=len(mode))]):
        levels = 1 + i % 5
        if too_small_to_reflect(shape, levels, mode):
            continue
        layout, grad_layout = LAYOUTS[i % len(LAYOUTS)], LAYOUTS[(i // 2) % len(LAYOUTS)]
        memory_format = (torch.contiguous_format, torch.channels_last)[i % 2]
        image = random_tensor(shape, image_dtype, seed=i)
        with use_backend("reference"):
            wide = arrange(image.double(), layout).detach().requires_grad_()
            exact = pyramid(wide, levels, mode, torch.float64, memory_format)
            grads = [random_tensor(x.shape, coeff_dtype, seed=j) for j, x in enumerate(exact)]
            exact_grads = [arrange(g.double(), grad_layout) for g in grads]
            exact_grad = torch.autograd.grad(exact, wide, exact_grads)[0]
        with use_backend("native"), poisoned_memory():
            on_gpu = arrange(image.cuda(), layout).detach().requires_grad_()
            actual = pyramid(on_gpu, levels, mode, coeff_dtype, memory_format)
            grad = torch.autograd.grad(actual, on_gpu, [arrange(g.cuda(), grad_layout) for g in grads])[0]
        for level, (a, e) in enumerate(zip(actual, exact, strict=True), 1):
            assert a.is_contiguous(memory_format=memory_format)
            assert_within_budget(a.cpu(), e, magnitude=8.0, operations=4 * level)
        assert_within_budget(grad.cpu(), exact_grad, magnitude=64.0, operations=8 * levels)
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("mode", MODES)
def test_wavedec2_equals_reference(mode, dtype):
    for i, shape in enumerate([*FAST_SHAPES, *shapes(12, seed=7)]):
        levels = 1 + i % 5
        if too_small_to_reflect(shape, levels, mode):
            continue
        image = random_tensor(shape, dtype, seed=i)
        layout = LAYOUTS[i % len(LAYOUTS)]
        with use_backend("reference"):
            exact = flat(wavedec2(arrange(image.double(), layout), levels, mode=mode))
        with use_backend("native"), poisoned_memory():
            actual = flat(wavedec2(arrange(image.cuda(), layout), levels, mode=mode))
        for a, e in zip(actual, exact, strict=True):
            assert_within_budget(a.cpu(), e, magnitude=8.0 * 2**levels, operations=4 * levels)


def flat(coeffs):
    return [x for entry in coeffs for x in (entry if isinstance(entry, tuple) else (entry,))]


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "expanded"])
def test_inverse_gives_the_image_back(layout):
    for i, shape in enumerate([*FAST_SHAPES, *shapes(12, seed=3)]):
        image = random_tensor(shape, torch.float32, seed=i)
        levels = 1 + i % 5
        with use_backend("native"), poisoned_memory():
            coeffs = wavedec2(arrange(image.cuda(), layout), levels)
            back = waverec2(coeffs, output_size=shape[2:])
            once = haar_idwt2d(haar_dwt2d(arrange(image.cuda(), layout)), output_size=shape[2:])
        assert_within_budget(back.cpu(), image.double(), magnitude=16.0 * 2**levels, operations=8 * levels)
        assert_within_budget(once.cpu(), image.double(), magnitude=32.0, operations=8)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_runs_are_identical(memory_format):
    image = random_tensor((4, 3, 200, 257), torch.float32).cuda().requires_grad_()
    results = []
    with use_backend("native"):
        for _ in range(3):
            out = haar_pyramid(image, 4, mode="reflect", dtype=torch.bfloat16, memory_format=memory_format)
            results.append([*out, *torch.autograd.grad(out, image, [x.detach() for x in out])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def small_integers(shape, dtype):
    """Sums of a few of these are exact in float32, and those of the first levels in bfloat16 too."""
    return torch.randint(-2, 3, shape, dtype=torch.int8, device="cuda").to(dtype)


def needs_memory(gibibytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 3, 20000, 20000), torch.contiguous_format),  # planar vectors
        ((2, 3, 20000, 20000), torch.channels_last),  # pixels
        ((2, 3, 19999, 19999), torch.contiguous_format),  # single elements, edges
        ((2, 4, 16384, 16448), torch.channels_last),  # pairs of channels
    ],
)
def test_more_than_2_to_31_elements(shape, memory_format):
    needs_memory(40)
    image = small_integers(shape, torch.bfloat16).contiguous(memory_format=memory_format)
    assert image.numel() > 2**31
    with use_backend("native"):
        whole = haar_pyramid(image, 3)
        # The corner lies beyond element 2^31; its sizes are odd where those of the whole image are.
        height, width = shape[2] % 128 + 128, shape[3] % 128 + 128
        corner = haar_pyramid(image[1:, :, -height:, -width:].contiguous(memory_format=memory_format), 3)
        for a, b in zip(whole, corner, strict=True):
            assert torch.equal(a[1:, :, -b.shape[2] :, -b.shape[3] :], b)
        x = [level.contiguous(memory_format=memory_format) for level in whole]
        leaf = torch.zeros_like(image, requires_grad=True)
        grad = torch.autograd.grad(haar_pyramid(leaf, 3), leaf, x)[0]
        small_leaf = torch.zeros_like(image[1:, :, -height:, -width:], requires_grad=True)
        small = torch.autograd.grad(haar_pyramid(small_leaf, 3), small_leaf, list(corner))[0]
    assert torch.equal(grad[1:, :, -height:, -width:], small)


@pytest.mark.parametrize("shape", [(3_000_000, 3, 8, 8), (70_000, 70, 3, 5), (1, 200_000, 16, 8)])
def test_many_planes(shape):
    needs_memory(24)
    image = small_integers(shape, torch.float32)
    with use_backend("native"):
        actual = haar_pyramid(image, 3)
    with use_backend("reference"):
        expected = haar_pyramid(image, 3)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def spin(cycles=200_000_000):
    torch.cuda._sleep(cycles)


@pytest.mark.parametrize("levels", [3, 5])
def test_runs_on_the_current_stream(levels):
    image = random_tensor((2, 3, 67, 128), torch.float32).cuda()
    with use_backend("native"):
        expected = [x.clone() for x in haar_pyramid(image, levels)]
        late = torch.zeros_like(image)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            spin()  # a kernel on another stream would still read the zeros
            late.copy_(image)
            actual = haar_pyramid(late, levels)
        stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device():
    image = random_tensor((2, 3, 64, 72), torch.float32)
    with use_backend("native"):
        first = haar_pyramid(image.to("cuda:0"), 4)
        second = haar_pyramid(image.to("cuda:1"), 4)
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 61, 67)])
def test_graph_capture_and_replay(check_graph_replay, shape):
    image = random_tensor(shape, torch.float32).cuda().requires_grad_()
    levels = 5  # two kernels and scratch memory between them

    def step() -> list[Tensor]:
        out = haar_pyramid(image, levels, dtype=torch.bfloat16, memory_format=torch.channels_last)
        return [*out, *torch.autograd.grad(out, image, [x.detach() for x in out])]

    with use_backend("native"):
        check_graph_replay(step, lambda seed: image.copy_(random_tensor(shape, torch.float32, seed=seed)))


def test_strides_of_every_kind():
    """Images and coefficients have poisoned neighbours and every alignment."""
    rng = random.Random(0)
    for case in range(60):
        n, c = rng.randint(1, 3), rng.choice((1, 2, 3, 4))
        height, width = rng.choice((8, 24, 33, 64)), rng.choice((8, 24, 40, 57, 64))
        skip = rng.randrange(9)
        dtype = rng.choice(DTYPES)
        values = random_tensor((n, c, height, width), dtype, seed=case)
        big = torch.full((n, c, height + 1, width + 16), torch.nan, dtype=dtype, device="cuda")
        view = big[:, :, 1:, skip : skip + width]
        view.copy_(values)
        with use_backend("native"), poisoned_memory():
            actual = haar_pyramid(view, 3)
        with use_backend("reference"):
            exact = haar_pyramid(values.double(), 3)
        for a, e in zip(actual, exact, strict=True):
            assert_within_budget(a.cpu(), e, magnitude=8.0, operations=12)
