"""GroupNorm+SiLU on a GPU, through the public function, on every backend that serves one.

tests/gpu_emulator runs the same kernels on an emulated GPU, and test_triton.py the Triton ones in its interpreter.
"""

import random

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.backend import why_not
from litevae_kernels.group_norm_silu import native
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory, shapes

BACKENDS = ("native", "triton")
REASONS = {b: why_not(b, "cuda") if torch.cuda.is_available() else "no CUDA device" for b in BACKENDS}
pytestmark = pytest.mark.gpu
on_each_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.skipif(r is not None, reason=str(r))) for b, r in REASONS.items()],
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CASES = {"native": 30, "triton": 3}  # per test; Triton compiles kernels for nearly every case
DENSE = (torch.contiguous_format, torch.channels_last)

# Half units in the last place of what `bounds` gives, as tests/gpu_emulator counts them: 8 roundings of z and 10 of its
# sigmoid, 38 of the gradients; sums of at most 288 additions before they are float64 or cut in pieces.
FORWARD, GRADIENT, CHAIN = 20, 38, 288


def values(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def run(x, groups, weight, bias, skip, grad, eps=1e-6):
    """Returns y and the gradients of the given inputs."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, skip, weight, bias)]
    y = group_norm_silu(inputs[0], groups, inputs[2], inputs[3], eps=eps, skip=inputs[1])
    wanted = [t for t in inputs if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def exact(x, groups, weight, bias, skip, grad, eps=1e-6):
    """Returns the same from torch in float64, and for each a bound on the magnitudes of its sums."""
    inputs = [
        None if t is None else t.detach().double().clone().requires_grad_() for t in (x, skip, weight, bias)
    ]
    joined = inputs[0] if skip is None else torch.cat(inputs[:2], 1)
    n, c = joined.shape[:2]
    by_group = joined.reshape(n, groups, -1)
    mean = by_group.detach().mean(2, keepdim=True)  # changes only the accuracy of torch
    centred = (by_group - mean).view(joined.shape)
    z = torch.group_norm(centred.contiguous(), groups, None, None, eps)
    # applied by hand, because torch 2.11 has no gradient where one of them is missing
    z = z if inputs[2] is None else z * inputs[2][:, None, None]
    z = z if inputs[3] is None else z + inputs[3][:, None, None]
    y, grad = F.silu(z), grad.double()
    gradients = torch.autograd.grad(y, [t for t in inputs if t is not None], grad)
    with torch.no_grad():
        square = (by_group - mean).square().mean(2, keepdim=True)
        rstd = (square + eps).rsqrt()
        xhat = (by_group - mean).abs() * rstd + 2**0.5
        w = torch.ones(c, 1, 1, device=x.device) if weight is None else inputs[2].abs()[:, None, None]
        size = xhat.view_as(joined) * w + (0 if bias is None else inputs[3].abs()[:, None, None])
        h = grad.abs() * (1 + size)
        wh = (h * w).reshape(n, groups, -1)
        sums = wh.mean(2, keepdim=True) + (1 + xhat) * (wh * xhat).mean(2, keepdim=True)
        of_x = (rstd * (wh + sums)).view_as(joined)
        bounds = [size, of_x[:, : x.shape[1]]]
        bounds += [] if skip is None else [of_x[:, x.shape[1] :]]
        bounds += [] if weight is None else [(h * xhat.view_as(h)).sum((0, 2, 3))]
        bounds += [] if bias is None else [h.sum((0, 2, 3))]
    return [y.detach(), *gradients], bounds


def check(backend, x, groups, weight, bias, skip, grad, eps=1e-6):
    call = (x, groups, weight, bias, skip, grad, eps)
    with use_backend(backend), poisoned_memory():
        actual = run(*call)
    expected, bounds = exact(*call)
    for i, (a, e, bound) in enumerate(zip(actual, expected, bounds, strict=True)):
        if x.dtype != torch.float64 and a.dtype == torch.float64:
            a = a.float()  # only as exact as its arithmetic
        operations = FORWARD + CHAIN if i == 0 else GRADIENT + 2 * CHAIN
        assert_within_budget(a.cpu(), e.cpu(), magnitude=bound.cpu(), operations=operations)
    return actual


def random_call(rng, dtype, layout, seed):
    ((n, _, h, w),) = shapes(1, seed=seed)
    per_group, groups = rng.choice(
        [(1, 1), (1, 5), (3, 2), (4, 4), (7, 1), (5, 32), (2, 16), (8, 3), (16, 32)]
    )
    c = per_group * groups
    x_channels = rng.choice([c, c, max(c // 16 * 8, 1), rng.randint(1, c)])
    joined = (
        (values((n, c, h, w), seed=seed) * rng.choice([1.0, 0.05]) + rng.choice([0.0, 3.0])).to(dtype).cuda()
    )
    parameters = []
    for i in (1, 2):
        of = rng.choice([None, dtype, *DTYPES])
        parameters.append(None if of is None else values((c,), of, seed=seed + i).cuda())
    skip = None
    if x_channels < c:
        skip = arrange(joined[:, x_channels:], rng.choice([layout, *LAYOUTS]))
    grad = arrange(values((n, c, h, w), dtype, seed=seed + 3).cuda(), rng.choice([layout, *LAYOUTS]))
    return arrange(joined[:, :x_channels], layout), groups, *parameters, skip, grad, rng.choice([1e-6, 1e-3])


@on_each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_in_float64(backend, dtype, layout):
    rng = random.Random(f"{layout} {dtype}")
    for i in range(CASES[backend]):
        call = random_call(rng, dtype, layout, seed=10 * i)
        y, grad_x = check(backend, *call)[:2]
        x = call[0]
        channels_last = layout == "channels_last" and x.shape[1] > 1
        for t in (y, grad_x):
            assert t.is_contiguous(memory_format=DENSE[channels_last])


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "c", "skip_channels", "size"),
    [(1, 128, 0, 128), (2, 96, 64, 64), (3, 512, 512, 16), (8, 64, 0, 33)],
)
def test_the_models_shapes(backend, n, c, skip_channels, size, dtype, memory_format):
    total = c + skip_channels
    joined = values((n, total, size, size), dtype, seed=1).cuda()
    x = joined[:, :c].contiguous(memory_format=memory_format)
    skip = joined[:, c:].contiguous(memory_format=memory_format) if skip_channels else None
    weight, bias = (values(total, torch.float32, seed=s).cuda() for s in (2, 3))
    grad = values(joined.shape, dtype, seed=4).cuda().contiguous(memory_format=memory_format)
    check(backend, x, 32, weight, bias, skip, grad)


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_addition(backend, dtype, other, memory_format):
    """Biases and residuals of another dtype, and y itself as a residual; the statistics of the sum."""
    for shape in ((2, 40, 7, 9), (1, 64, 64, 64)):
        y, residual = (
            values(shape, d, seed=s).cuda().contiguous(memory_format=memory_format)
            for s, d in ((1, dtype), (2, other))
        )
        biases = [values(shape[1], d, seed=s).cuda() for s, d in ((3, dtype), (4, other))]
        for of_other in (True, False):
            total, plain = y.clone(), y.clone()
            outcomes = []
            for into, measure in ((total, True), (plain, False)):
                residuals = [residual, into] if of_other else [into]
                call = (into, residuals, biases, measure, backend)
                outcomes.append(torch.ops.litevae.add_residuals_(*call))
            assert torch.equal(total, plain)
            terms = [y, y, *([residual] if of_other else []), *(b[:, None, None] for b in biases)]
            exact, magnitude = (sum(f(t.double()) for t in terms).cpu() for f in (torch.clone, torch.abs))
            assert_within_budget(total.cpu(), exact, magnitude=magnitude, operations=len(terms))
            variance, mean = torch.var_mean(total.double(), (2, 3), correction=0)
            largest = (total.double() - mean[..., None, None]).abs().amax((2, 3))
            arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
            for i, (exact, magnitude) in enumerate(((mean, 2 * largest), (variance, 4 * largest.square()))):
                error = (outcomes[0][..., i] - exact).to("cpu", arithmetic)
                none = torch.zeros_like(error)
                assert_within_budget(error, none, magnitude=magnitude.cpu(), operations=CHAIN)


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (-1e6, 1.0), (1e3, 1e-3)])
def test_a_large_mean(backend, mean, std, memory_format):
    for shape, groups in [((2, 8, 24, 20), 2), ((1, 32, 128, 131), 8), ((1, 64, 64, 64), 32)]:
        x = (values(shape) * std + mean).float().cuda().contiguous(memory_format=memory_format)
        parameters = [values(shape[1], torch.float32, seed=s).cuda() for s in (1, 2)]
        check(backend, x, groups, *parameters, None, values(shape, torch.float32, seed=3).cuda())


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_arguments_of_the_sigmoid(backend, dtype, memory_format):
    x = values((1, 8, 16, 16), dtype).cuda().contiguous(memory_format=memory_format)
    bias = torch.tensor([-1000.0, 1000.0, -100.0, 100.0, -88.5, 88.5, -20.0, 0.0]).cuda()
    check(backend, x, 4, None, bias, None, values(x.shape, dtype, seed=1).cuda())


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
def test_runs_are_identical(backend, memory_format):
    x = values((3, 96, 61, 64), torch.bfloat16).cuda().contiguous(memory_format=memory_format)
    skip = values((3, 64, 61, 64), torch.bfloat16, seed=1).cuda().contiguous(memory_format=memory_format)
    weight, bias = (values(160, torch.float32, seed=s).cuda() for s in (2, 3))
    grad = values((3, 160, 61, 64), torch.bfloat16, seed=4).cuda()
    with use_backend(backend):
        first, *others = [run(x, 32, weight, bias, skip, grad) for _ in range(4)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# The name lets the checkers of benchmarks/gpu/steps.py choose it.
@pytest.mark.parametrize("memory_format", DENSE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_in_clusters_are_identical_and_exact(monkeypatch, dtype, memory_format):
    if REASONS["native"] is not None or native.why_no_clusters(torch.cuda.current_device()) is not None:
        pytest.skip(REASONS["native"] or native.why_no_clusters(torch.cuda.current_device()))
    monkeypatch.setattr(native, "mode", "clusters")
    for n, c, skip_channels, height, width in [(1, 96, 0, 64, 64), (2, 96, 64, 61, 32), (40, 64, 64, 32, 32)]:
        joined = values((n, c + skip_channels, height, width), dtype).cuda()
        x = joined[:, :c].contiguous(memory_format=memory_format)
        skip = joined[:, c:].contiguous(memory_format=memory_format) if skip_channels else None
        weight, bias = (values(c + skip_channels, torch.float32, seed=s).cuda() for s in (2, 3))
        grad = values(joined.shape, dtype, seed=4).cuda()
        first, *others = [check("native", x, 32, weight, bias, skip, grad)[0] for _ in range(3)]
        assert all(torch.equal(first, other) for other in others)


def needs_memory(gibibytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free:.0f} are free")


@on_each_backend
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 64, 4104, 4104), torch.channels_last),
        ((2, 64, 4104, 4104), torch.contiguous_format),
        ((2, 63, 4111, 4177), torch.channels_last),  # single elements
        ((1_050_000, 64, 8, 4), torch.channels_last),  # many images
        ((1_050_000, 64, 8, 4), torch.contiguous_format),
    ],
)
def test_more_than_2_to_31_elements(backend, shape, memory_format):
    needs_memory(40)
    assert torch.Size(shape).numel() > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).normal_()
    groups = 32 if shape[1] % 32 == 0 else 7
    bias = values(shape[1], torch.float32).cuda()
    with use_backend(backend):
        # Images are independent, and the last ones lie beyond element 2^31.
        last = x[-1:].clone(memory_format=torch.preserve_format).requires_grad_()
        small = group_norm_silu(last, groups, bias=bias)
        (small_grad,) = torch.autograd.grad(small, last, small.detach())
        x.requires_grad_()
        y = group_norm_silu(x, groups, bias=bias)
        close(y[-1:].detach(), small.detach())
        (grad,) = torch.autograd.grad(y, x, y.detach())
    close(grad[-1:], small_grad)


def close(actual, expected):
    """Compares results that may differ by one rounding, because the image is divided in two ways."""
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-9)


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
def test_many_images_and_channels(backend, memory_format):
    for shape, groups in [((70_000, 8, 2, 2), 4), ((2, 80_000, 1, 3), 16_000), ((1, 70_000, 1, 1), 1)]:
        x = values(shape, torch.float32).cuda().contiguous(memory_format=memory_format)
        check(backend, x, groups, None, None, None, values(shape, torch.float32, seed=1).cuda(), eps=1e-3)


@on_each_backend
def test_runs_on_the_current_stream(backend):
    x = values((2, 64, 67, 128), torch.float32).cuda()
    with use_backend(backend):
        expected = group_norm_silu(x, 32)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a kernel on another stream would read the zeros
            late.copy_(x)
            actual = group_norm_silu(late, 32)
        stream.synchronize()
    assert torch.equal(actual, expected)


@on_each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device(backend):
    x, grad = values((2, 64, 16, 24), torch.float32), values((2, 64, 16, 24), torch.float32, seed=1)
    results = []
    with use_backend(backend):
        for device in ("cuda:0", "cuda:1"):
            results.append(run(x.to(device), 32, None, None, None, grad.to(device)))
    assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


@on_each_backend
@pytest.mark.parametrize("memory_format", DENSE)
def test_graph_capture_and_replay(check_graph_replay, backend, memory_format):
    shape = (2, 64, 61, 64)
    x = values(shape, torch.bfloat16).cuda().contiguous(memory_format=memory_format)
    weight, bias = (values(64, torch.float32, seed=s).cuda() for s in (1, 2))
    grad = values(shape, torch.bfloat16, seed=3).cuda()

    def step():
        return run(x, 32, weight, bias, None, grad)

    with use_backend(backend):
        check_graph_replay(step, lambda seed: x.copy_(values(shape, torch.bfloat16, seed=seed)))
