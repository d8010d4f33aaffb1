"""Weight modulation and its gradient, compared with torch in float64."""

import random
from dataclasses import dataclass

import torch

from kernel_cases.poisoned import DTYPES, LAYOUTS, Poisoned, normal
from kernel_cases.running import Kernels
from litevae_kernels.testing import assert_within_budget

F32, F64, F16, BF16 = DTYPES
OPERATIONS = 12  # products and quotients, in half units in the last place
# The sum of squares (or of g v) is a sum per thread, and then two sums of 16 partial sums in CUDA, or a tree in Triton.
THREADS = {"cuda": 256, "triton": 128}
PARTIALS = {"cuda": 32, "triton": 64}


@dataclass(frozen=True)
class Case:
    filters: int
    channels: int  # channels of a filter
    kernel: tuple[int, int]
    groups: int
    dtypes: tuple[torch.dtype, ...]  # weight, scale, gain, modulated and its gradient
    layouts: tuple[str, str, str]  # weight, modulated and its gradient, weight's gradient
    has_gain: bool = True
    size: float = 1.0
    zeros: str = ""
    eps: float = 1e-8


def random_case(rng: random.Random) -> Case:
    groups = rng.choice((1, 1, 1, 2, 3))
    filters = groups * rng.choice((1, 2, 5, 8))
    channels = rng.choice((1, 2, 3, 7, 16, 33, 64, 100, 300))
    kernel = rng.choice(((1, 1), (3, 3), (1, 3), (3, 1), (2, 2), (5, 4), (7, 7)))
    dtypes = tuple(rng.choices(DTYPES, (4, 1, 2, 2), k=4))
    layouts = (rng.choice(LAYOUTS), rng.choice(LAYOUTS), rng.choice(LAYOUTS))
    has_gain, size, zeros = (
        rng.random() < 0.7,
        rng.choice((1.0, 0.02, 1e-3)),
        rng.choice(("", "", "filter", "scale")),
    )
    # If all are zero, the slope is 1 / eps, which float16 must be able to represent.
    eps = 1e-3 if zeros else rng.choice((1e-8, 1e-6, 1e-3))
    return Case(filters, channels, kernel, groups, dtypes, layouts, has_gain, size, zeros, eps)


def check(kernels: Kernels, rng: random.Random, case: Case) -> None:
    shape = case.filters, case.channels, *case.kernel
    weight_dtype, scale_dtype, gain_dtype, dtype = case.dtypes
    weight = Poisoned(rng, shape, weight_dtype, case.layouts[0])
    weight.view.copy_(normal(rng, shape) * case.size)
    scale = (1 + 0.3 * normal(rng, (case.groups * case.channels, 2))).to(scale_dtype)[:, 0]
    if case.zeros == "filter":
        weight.view[case.filters // 2].zero_()
    elif case.zeros == "scale":
        scale[0] = 0
    elif case.zeros == "scales":
        scale.zero_()
    gain = torch.tensor([1.7], dtype=gain_dtype) if case.has_gain else None
    wide = torch.float64 if torch.float64 in (weight_dtype, dtype) else torch.float32
    norm = torch.full((case.filters,), torch.nan, dtype=wide)
    modulated, grad = (Poisoned(rng, shape, dtype, case.layouts[1]) for _ in range(2))
    grad.view.copy_(normal(rng, shape))
    grad_weight = Poisoned(rng, shape, weight_dtype, case.layouts[2])
    grad_scale, grad_gain = (
        None if t is None else torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (scale, gain)
    )

    inputs, gradients = (weight.view, scale, gain), (grad_weight.view, grad_scale, grad_gain)
    kernels.run("smc", "forward", *inputs, modulated.view, norm, case.eps, written=[modulated.view, norm])
    kernels.run("smc", "backward", grad.view, *inputs, norm, *gradients, case.eps, written=gradients)
    for scratch in kernels.scratch:
        assert not scratch.view(wide).isnan().any(), "more scratch memory than the kernels use"

    leaves = [t.double().clone().contiguous().requires_grad_() for t in inputs if t is not None]
    by_filter = leaves[1].view(case.groups, -1).repeat_interleave(case.filters // case.groups, 0)
    v = leaves[0] * by_filter[:, :, None, None]
    n = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    exact = v / (n + case.eps) * (leaves[2] if case.has_gain else 1)
    wide_grad = grad.view.double()
    exact_grads = torch.autograd.grad(exact, leaves, wide_grad)

    count = case.channels * case.kernel[0] * case.kernel[1]
    sums = count // THREADS[kernels.name] + 1 + PARTIALS[kernels.name]
    operations = OPERATIONS + sums + case.kernel[0] * case.kernel[1]
    with torch.no_grad():
        d, g = n + case.eps, torch.ones(1).double() if gain is None else gain.double()
        along = (wide_grad * v).abs().sum((1, 2, 3), keepdim=True)
        slope = g * (wide_grad.abs() / d + v.abs() * along / (n * d * d).clamp(min=1e-300))
        by_channel = (slope * leaves[0].abs()).sum((2, 3))
        parts = by_channel.view(case.groups, -1, case.channels).sum(1).flatten()
        bounds = [slope * by_filter.abs()[:, :, None, None], parts, (along / d).sum().view(1)]
    exact, n = exact.detach(), n.detach().flatten()
    assert_within_budget(norm, n, magnitude=n, operations=operations)
    assert_within_budget(modulated.view, exact, magnitude=exact.abs(), operations=operations)
    for got, want, bound in zip([t for t in gradients if t is not None], exact_grads, bounds, strict=False):
        if wide != torch.float64 and got.dtype == torch.float64:
            got = got.float()  # only as exact as its arithmetic
        assert bool(got.isfinite().all())
        assert_within_budget(got, want, magnitude=bound, operations=2 * operations)
    for name, t in {
        "weight": weight,
        "modulated": modulated,
        "grad": grad,
        "grad_weight": grad_weight,
    }.items():
        t.check_surroundings(name)


def _covering() -> dict[str, Case]:
    cases = {}
    for dtype in DTYPES:
        layouts = (
            ("contiguous", "channels_last", "contiguous") if dtype.itemsize == 4 else ("channels_last",) * 3
        )
        dtypes = (dtype, F32, F32, dtype)
        cases[f"{str(dtype)[6:]} 3x3"] = Case(5, 33, (3, 3), 1, dtypes, layouts)
    cases["groups, no gain"] = Case(6, 7, (2, 3), 3, (F32, F16, F32, BF16), ("wild",) * 3, has_gain=False)
    return cases


COVERING = {"cuda": _covering(), "triton": _covering()}
# Shared memory serves both passes, the forward pass, neither.
LARGE = {
    f"{channels} {str(dtype)[6:]} {layouts[0]}": Case(
        2, channels, (3, 3), 1, (dtype,) * 4, (*layouts, layouts[0])
    )
    for channels in (512, 1400, 3000)
    for dtype in (F32, F64)
    for layouts in (("contiguous", "channels_last"), ("channels_last", "contiguous"))
}
SPECIAL = {
    "depthwise": Case(70, 1, (3, 3), 70, (F32,) * 4, ("contiguous",) * 3),
    "small fp16": Case(
        8, 64, (3, 3), 1, (F16, F32, F32, F16), ("contiguous", "channels_last", "contiguous"), size=1e-4
    ),
    **{
        f"zero {zeros} {str(dtype)[6:]}": Case(
            4, 16, (3, 3), 1, (dtype,) * 4, ("channels_last",) * 3, zeros=zeros
        )
        for zeros in ("filter", "scale", "scales")
        for dtype in (F32, F64)
    },
}
