"""Tests weight modulation on a GPU, through the public function, on every backend that serves a GPU.

tests/gpu_emulator runs the same kernels on an emulated GPU.
"""

import random

import pytest
import torch

from litevae_kernels import modulate_weight, use_backend
from litevae_kernels.backend import why_not
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory

BACKENDS = ("native", "triton")
REASONS = {b: why_not(b, "cuda") if torch.cuda.is_available() else "no CUDA device" for b in BACKENDS}
pytestmark = pytest.mark.gpu
on_each_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.skipif(r is not None, reason=str(r))) for b, r in REASONS.items()],
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CASES = {"native": 12, "triton": 2}  # per test; Triton compiles kernels for nearly every case
DENSE = (torch.contiguous_format, torch.channels_last)


def values(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def run(weight, scale, gain, grad, eps, dtype, memory_format):
    inputs = [t.detach().requires_grad_() for t in (weight, scale, gain) if t is not None]
    modulated = modulate_weight(*inputs, eps=eps, dtype=dtype, memory_format=memory_format)
    return [modulated.detach(), *torch.autograd.grad(modulated, inputs, grad)]


def exact(weight, scale, gain, grad, eps):
    """Returns torch's results in float64, and for each a bound on the values that are added up."""
    inputs = [t.detach().double().clone().requires_grad_() for t in (weight, scale, gain) if t is not None]
    filters, channels = weight.shape[:2]
    groups = scale.shape[0] // channels
    scales = inputs[1].view(groups, -1).repeat_interleave(filters // groups, 0)[:, :, None, None]
    v = inputs[0] * scales
    norm = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    modulated = v / (norm + eps) * (1 if gain is None else inputs[2])
    gradients = torch.autograd.grad(modulated, inputs, grad.double())
    with torch.no_grad():
        d, g = norm + eps, grad.double().abs()
        along = (g * v.abs()).sum((1, 2, 3), keepdim=True)
        slope = g / d + v.abs() * along / (norm * d * d).clamp(min=1e-300)
        slope = slope * (1 if gain is None else inputs[2].abs())
        by_filter = (slope * inputs[0].abs()).sum((2, 3)).view(groups, -1, channels)
        bounds = [
            modulated.abs(),
            slope * scales.abs(),
            by_filter.sum(1).flatten(),
            (along / d).sum().view(1),
        ]
    return [modulated.detach(), *gradients], bounds


def check(backend, weight, scale, gain, grad, eps, dtype, memory_format):
    with use_backend(backend), poisoned_memory():
        actual = run(weight, scale, gain, grad, eps, dtype, memory_format)
    expected, bounds = exact(weight, scale, gain, grad, eps)
    taps = weight.shape[2] * weight.shape[3]
    # These are products and quotients, a thread's sum over a filter, trees of partial sums, and a channel's taps.
    operations = 12 + weight[0].numel() // 128 + 1 + 64 + taps
    wide = torch.float64 in (weight.dtype, dtype)
    for i, (a, e, bound) in enumerate(zip(actual, expected, bounds, strict=False)):
        assert a.isfinite().all()
        if not wide and a.dtype == torch.float64:
            a = a.float()  # judged by the dtype of the arithmetic
        assert_within_budget(a.cpu(), e.cpu(), magnitude=bound.cpu(), operations=operations * (1 + (i > 0)))
    return actual


@on_each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_in_float64(backend, dtype, weight_dtype, layout):
    rng = random.Random(f"{layout} {dtype} {weight_dtype}")
    for i in range(CASES[backend]):
        groups = rng.choice((1, 1, 2, 3))
        filters, channels = groups * rng.choice((1, 3, 8)), rng.choice((1, 3, 16, 33, 64, 300))
        shape = (filters, channels, *rng.choice(((1, 1), (3, 3), (1, 3), (2, 2), (5, 4))))
        weight = arrange(values(shape, weight_dtype, seed=i).cuda(), layout)
        scale = (1 + 0.3 * values((groups * channels, 2), seed=i + 1)).to(rng.choice(DTYPES)).cuda()[:, 0]
        gain = torch.tensor([1.7], dtype=rng.choice(DTYPES)).cuda() if rng.random() < 0.7 else None
        grad = arrange(values(shape, dtype, seed=i + 2).cuda(), rng.choice(LAYOUTS))
        memory_format = rng.choice(DENSE)
        eps = rng.choice((1e-8, 1e-3))
        modulated = check(backend, weight, scale, gain, grad, eps, dtype, memory_format)[0]
        assert modulated.is_contiguous(memory_format=memory_format)


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
@pytest.mark.parametrize("channels", [512, 1400, 3000])  # for shared memory in both passes, forward, neither
def test_large_filters(backend, channels, memory_format):
    weight = values((64, channels, 3, 3), torch.float32).cuda()
    scale, gain = values(channels, torch.float32, seed=1).cuda(), torch.ones(1).cuda()
    grad = values(weight.shape, torch.bfloat16, seed=2).cuda().contiguous(memory_format=memory_format)
    check(backend, weight, scale, gain, grad, 1e-8, torch.bfloat16, memory_format)
    check(backend, weight.double(), scale, gain, grad.double(), 1e-8, torch.float64, memory_format)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zeros_and_small_weights(backend, dtype):
    weight = values((8, 16, 3, 3), torch.float64).mul(1e-4).to(dtype).cuda()
    weight[3] = 0
    scale = values(16, torch.float32, seed=1).cuda()
    scale[5] = 0
    grad = values(weight.shape, dtype, seed=2).cuda()
    eps = 1e-8 if dtype == torch.float32 else 1e-3
    modulated = check(backend, weight, scale, None, grad, eps, dtype, None)[0]
    assert not modulated[3].any()
    modulated = check(backend, weight, scale * 0, None, grad, eps, dtype, None)[0]
    assert not modulated.any()


@on_each_backend
def test_depthwise(backend):
    weight = values((70_000, 1, 3, 3), torch.float32).cuda()
    scale = (1 + 0.3 * values(70_000, seed=1)).float().cuda()
    grad = values(weight.shape, torch.float32, seed=2).cuda()
    check(backend, weight, scale, None, grad, 1e-8, torch.float32, None)


@on_each_backend
def test_more_than_2_to_31_elements(backend):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 40:
        pytest.skip(f"needs 40 GiB of GPU memory, {free:.0f} are free")
    shape = (2**20 + 8, 256, 3, 3)
    weight = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    scale = (1 + 0.3 * values(256)).float().cuda()
    assert weight.numel() > 2**31
    with use_backend(backend):
        last = weight[-4:].clone().requires_grad_()
        small = modulate_weight(last, scale)
        (small_grad,) = torch.autograd.grad(small, last, small.detach() + 1)
        weight.requires_grad_()
        modulated = modulate_weight(weight, scale)
        assert torch.equal(modulated[-4:], small)  # filters are independent
        (grad,) = torch.autograd.grad(modulated, weight, modulated.detach() + 1)
    assert torch.equal(grad[-4:], small_grad)


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
def test_runs_are_identical(backend, memory_format):
    weight = values((130, 70, 3, 3), torch.float32).cuda()
    scale, gain = values(70, torch.float32, seed=1).cuda(), torch.ones(1).cuda()
    grad = values(weight.shape, torch.bfloat16, seed=2).cuda()
    with use_backend(backend):
        first, *others = [
            run(weight, scale, gain, grad, 1e-8, torch.bfloat16, memory_format) for _ in range(4)
        ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@on_each_backend
def test_runs_on_the_current_stream(backend):
    weight, scale = values((256, 128, 3, 3), torch.float32).cuda(), torch.ones(128).cuda()
    with use_backend(backend):
        expected = modulate_weight(weight, scale)
        late = torch.zeros_like(weight)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a kernel on another stream would read the zeros
            late.copy_(weight)
            actual = modulate_weight(late, scale)
        stream.synchronize()
    assert torch.equal(actual, expected)


@on_each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device(backend):
    weight, scale, gain = values((16, 24, 3, 3), torch.float32), torch.ones(24), torch.ones(1)
    results = []
    with use_backend(backend):
        for device in ("cuda:0", "cuda:1"):
            inputs = [t.to(device) for t in (weight, scale, gain, weight)]
            results.append(run(*inputs, 1e-8, torch.float32, None))
    assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


@on_each_backend
@pytest.mark.parametrize("channels", [64, 1400])  # the second one requests more shared memory
def test_graph_capture_and_replay(check_graph_replay, backend, channels):
    weight = values((16, channels, 3, 3), torch.float32).cuda()
    scale, gain = values(channels, torch.float32, seed=1).cuda(), torch.ones(1).cuda()
    grad = values(weight.shape, torch.bfloat16, seed=2).cuda()

    def step():
        return run(weight, scale, gain, grad, 1e-8, torch.bfloat16, torch.channels_last)

    with use_backend(backend):
        check_graph_replay(step, lambda seed: weight.copy_(values(weight.shape, torch.float32, seed=seed)))
