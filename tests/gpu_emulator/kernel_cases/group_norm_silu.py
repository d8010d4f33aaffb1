"""GroupNorm+SiLU and its gradient, compared with torch in float64."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases.poisoned import DTYPES, LAYOUTS, Poisoned, normal
from kernel_cases.running import Kernels
from litevae_kernels.group_norm_silu import native
from litevae_kernels.testing import assert_within_budget

F32, F64, F16, BF16 = DTYPES
# Errors in half units in the last place of the bounds of _magnitudes(). z has 8 roundings and the sigmoid 10. The
# statistics have at most 32 units of 8 values per thread, about a shift that costs a factor of 9 in the worst case and
# 2 usually, and a tree of 7 merges of at most 4 roundings in a row. Everything between the blocks is float64. The sums
# of the gradients have twice a tree of 128 / 16 + 16 additions.
FORWARD = 20
CHAIN = 256 + 32
GRADIENT = 38


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    skip_channels: int
    groups: int
    height: int
    width: int
    dtype: torch.dtype
    layouts: tuple[str, str, str, str]  # x, skip, y and the incoming gradient, the outgoing ones
    parameters: tuple[torch.dtype | None, torch.dtype | None] = (torch.float32, torch.float32)
    mean: float = 0.0
    std: float = 1.0
    outlier: float = 0.0
    expanded: bool = False
    eps: float = 1e-6
    factor: float = 1.0  # multiplier of weight and bias
    clusters: bool = False  # whether CUDA's forward pass runs in clusters


def random_case(rng: random.Random) -> Case:
    dtype = rng.choice(DTYPES)
    lanes = 16 // dtype.itemsize
    per_group, groups = rng.choice(
        [(1, 1), (1, 5), (3, 2), (7, 1), (5, 32), (4, 4), (2, 16), (1, 32), (8, 3), (24, 1), (16, 16)]
    )
    c = per_group * groups
    skip = 0
    if c > 1 and rng.random() < 0.5:
        skip = rng.choice([rng.randint(1, c - 1), c // lanes // 2 * lanes])
    height, width = (rng.choice((1, 2, 4, 7, 8, 16, 31)) for _ in range(2))
    if c < 20 and rng.random() < 0.5:
        height, width = rng.choice(((67, 61), (64, 48), (1, 1021), (128, 1)))
    layouts = tuple(rng.choice(LAYOUTS) for _ in range(4))
    if rng.random() < 0.6:  # mostly layouts of the fast kernels
        layouts = (rng.choice(("contiguous", "channels_last", "channels_last_sliced")),) * 4
    mean, std = rng.choice(((0.0, 1.0), (0.0, 1.0), (3.0, 0.05), (-40.0, 1.0)))
    return Case(
        rng.randint(1, 3), c - skip, skip, groups, height, width, dtype, layouts,
        parameters=(rng.choice((None, dtype, *DTYPES)), rng.choice((None, dtype, *DTYPES))),
        mean=mean, std=std, expanded=rng.random() < 0.1, eps=rng.choice((1e-6, 1e-5, 1e-3)),
        clusters=rng.random() < 0.3,
    )  # fmt: skip


def _magnitudes(
    joined: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    groups: int,
    eps: float,
    spread: int,
) -> dict[str, Tensor]:
    """Returns bounds on the magnitudes of the sums in y and in each gradient."""
    n, c = joined.shape[:2]
    by_group = joined.reshape(n, groups, -1)
    centred = by_group - by_group.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    xhat = centred.abs() * rstd + spread**0.5
    w = torch.ones(c, 1, 1) if weight is None else weight.abs()[:, None, None]
    z = xhat.view_as(joined) * w + (0 if bias is None else bias.abs()[:, None, None])
    h = grad.abs() * (1 + z)
    wh = (h * w).reshape(n, groups, -1)
    sums = wh.mean(2, keepdim=True) + (1 + xhat) * (wh * xhat).mean(2, keepdim=True)
    return {
        "y": z,
        "joined": (rstd * (wh + sums)).view_as(joined),
        "weight": (h * xhat.view_as(h)).sum((0, 2, 3)),
        "bias": h.sum((0, 2, 3)),
    }


def statistics_of(*inputs: Tensor | None) -> list[Tensor]:
    """Returns the mean and the variance of each channel of the inputs that are not None."""
    found = [torch.var_mean(x.double(), (2, 3), correction=0) for x in inputs if x is not None]
    return [torch.stack([mean, variance], 2) for variance, mean in found]


def check_statistics(found: Tensor, x: Tensor) -> None:
    """Compares the mean and the variance of each channel of x (N, C, H, W) with PyTorch's in float64."""
    (exact,) = statistics_of(x)
    largest = (x.double() - exact[..., 0][..., None, None]).abs().amax((2, 3))
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The shift is a value of the channel, which is at most twice the largest deviation away from any other.
    for i, magnitude in enumerate((2 * largest, 4 * largest.square())):
        error = (found - exact)[..., i].to(arithmetic)
        assert_within_budget(error, torch.zeros_like(error), magnitude=magnitude, operations=CHAIN)


def _check_sum(kernels: Kernels, y: Poisoned, residuals: list[Tensor], biases: list[Tensor]) -> None:
    """Checks the addition to `y`, and the statistics of the sum."""
    before = y.view.clone()
    terms = [y.view.double(), *(t.double() for t in residuals), *(t.double()[:, None, None] for t in biases)]
    shape = y.view.shape
    exact, magnitude = (sum(map(f, terms)).expand(shape) for f in (torch.clone, torch.abs))
    found = torch.full((*shape[:2], 2), torch.nan, dtype=torch.float64)
    kernels.run("group_norm_silu", "add", y.view, residuals, biases, found, written=[y.view, found])
    measured = y.view.clone()
    y.view.copy_(before)
    kernels.run("group_norm_silu", "add", y.view, residuals, biases, None, written=[y.view])
    assert torch.equal(y.view, measured)
    assert_within_budget(y.view, exact, magnitude=magnitude, operations=len(terms))
    check_statistics(found, y.view)
    y.check_surroundings("sum")


def check(kernels: Kernels, rng: random.Random, case: Case) -> None:
    n, cx, cs, h, w = case.batch, case.channels, case.skip_channels, case.height, case.width
    c = cx + cs

    def tensor(channels: int, layout: str, filled: Tensor | None = None) -> Poisoned:
        t = Poisoned(rng, (n, channels, h, w), case.dtype, layout)
        if filled is not None:
            t.view.copy_(filled)
            if case.expanded:
                t.view = t.view[:1].expand(n, -1, -1, -1)
        return t

    joined = normal(rng, (n, c, h, w)) * case.std + case.mean
    if case.outlier:
        joined.flatten(2)[..., :1] = case.outlier
    x = tensor(cx, case.layouts[0], joined[:, :cx]).view
    skip = tensor(cs, case.layouts[1], joined[:, cx:]).view if cs else None
    # The part along x makes the mean of dz xhat matter.
    along = (joined - case.mean) / case.std
    grad = tensor(c, case.layouts[2], normal(rng, (n, c, h, w)) + along).view
    results = {"y": tensor(c, case.layouts[2]), "x": tensor(cx, case.layouts[3])}
    if cs:
        results["skip"] = tensor(cs, case.layouts[3])
    weight, bias = (
        None if d is None else (normal(rng, (c, 2)) * case.factor).to(d)[:, 1] for d in case.parameters
    )
    grad_weight, grad_bias = (
        None if t is None else torch.full((c,), torch.nan, dtype=t.dtype) for t in (weight, bias)
    )
    stats = torch.full((n, case.groups, 2), torch.nan, dtype=torch.float64)

    inputs, y = (x, skip, weight, bias), results["y"].view
    clusters = case.clusters and kernels.name == "cuda"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "mode", "clusters" if clusters else "off")
        kernels.run(
            "group_norm_silu", "forward", *inputs, y, stats, case.groups, case.eps, written=[y, stats]
        )
    assert any("Clustered" in name for name in kernels.emulator.kernels()) == clusters
    outgoing = (results["x"].view, results["skip"].view if cs else None, grad_weight, grad_bias)
    kernels.run("group_norm_silu", "backward", grad, *inputs, stats, *outgoing, case.groups, written=outgoing)

    given = tensor(c, case.layouts[2])
    of_inputs = statistics_of(x, skip)
    arguments = (*inputs, given.view, torch.empty_like(stats), case.groups, case.eps, None, of_inputs)
    kernels.run("group_norm_silu", "forward", *arguments, written=[given.view, arguments[5]])
    biases = [t for t in (weight, bias) if t is not None]

    def summand() -> Poisoned:
        t = tensor(c, case.layouts[3])
        t.view.copy_(joined)
        return t

    _check_sum(kernels, summand(), [grad, y][: 1 + len(biases) // 2], biases)
    if kernels.name == "cuda":
        _check_sum(kernels, summand(), [], biases)
        others = [grad.to(d) for d in rng.sample(DTYPES, 2)]
        _check_sum(kernels, summand(), others, biases[:1])
        same = summand()
        _check_sum(kernels, same, [same.view], biases)

    named = zip(("x", "skip", "weight", "bias"), inputs, strict=True)
    wide = {k: t.double().clone().contiguous().requires_grad_() for k, t in named if t is not None}
    whole = torch.cat([wide[k] for k in ("x", "skip") if k in wide], 1)
    by_group = whole.reshape(n, case.groups, -1)
    mean = by_group.detach().mean(2, keepdim=True)  # changes only the accuracy of torch
    centred = (by_group - mean).view(whole.shape)
    exact = F.silu(torch.group_norm(centred, case.groups, wide.get("weight"), wide.get("bias"), case.eps))
    expected = dict(zip(wide, torch.autograd.grad(exact, list(wide.values()), grad.double()), strict=True))
    expected["y"] = exact.detach()
    spread = 9 if case.outlier else 2
    parameters = [None if t is None else t.double() for t in (weight, bias)]
    bounds = _magnitudes(whole.detach(), *parameters, grad.double(), case.groups, case.eps, spread)
    bounds["x"], bounds["skip"] = bounds["joined"][:, :cx], bounds["joined"][:, cx:]

    var = (by_group.detach() - mean).square().mean(2)
    atol = 1e-4 * float(var.max() ** 0.5) + 1e-12 * float(mean.abs().max())
    torch.testing.assert_close(stats[..., 0], mean[..., 0], rtol=0, atol=atol)
    torch.testing.assert_close(stats[..., 1], (var + case.eps).rsqrt(), rtol=1e-4, atol=0)
    statistics = CHAIN * max(1, spread // 2)
    actual = {name: t.view for name, t in results.items()}
    actual |= {name: t for name, t in (("weight", grad_weight), ("bias", grad_bias)) if t is not None}
    for name, got in actual.items():
        if case.dtype != torch.float64 and got.dtype == torch.float64:
            got = got.float()  # only as exact as its arithmetic
        operations = statistics + (FORWARD if name == "y" else GRADIENT + CHAIN)
        try:
            assert_within_budget(got, expected[name], magnitude=bounds[name], operations=operations)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    # Exact statistics leave the roundings of z and of its sigmoid.
    assert_within_budget(given.view, expected["y"], magnitude=bounds["y"], operations=FORWARD)
    for name, t in (*results.items(), ("y of given statistics", given)):
        t.check_surroundings(name)


def _covering_cuda() -> dict[str, Case]:
    # 32 groups of 5 channels, one of which has channels of x and of skip. Vectors of contiguous pixels need whole rows.
    widths = {"channels_last": 7, "channels_last_sliced": 8, "contiguous": 8, "wild": 7}
    cases = {
        f"{layout} {str(dtype)[6:]}": Case(2, 96, 64, 32, 4, width, dtype, (layout,) * 4)
        for layout, width in widths.items()
        for dtype in DTYPES
    }
    # Clusters of 2 to 8 blocks, the last of which have fewer pixels.
    for layout, width in widths.items():
        for dtype in DTYPES:
            case = Case(2, 24, 16, 8, 49, width, dtype, (layout,) * 4, clusters=True)
            cases[f"{layout} {str(dtype)[6:]} in clusters"] = case
    layouts = ("channels_last",) * 4
    cases["blocks without pixels"] = Case(1, 4096, 0, 1, 3, 3, BF16, layouts, clusters=True)
    cases["a slab that is not full"] = Case(2, 120, 0, 24, 9, 7, BF16, layouts, clusters=True)
    cases["clusters of 16 blocks"] = Case(1, 48, 0, 16, 70, 32, BF16, layouts, clusters=True)
    return cases


def _covering_triton() -> dict[str, Case]:
    layouts = {F32: "channels_last", BF16: "contiguous", F16: "channels_last_sliced", F64: "wild"}
    return {
        f"{layout} {str(dtype)[6:]}": Case(2, 24, 16, 8, 5, 7, dtype, (layout,) * 4)
        for dtype, layout in layouts.items()
    }


COVERING = {"cuda": _covering_cuda(), "triton": _covering_triton()}


def _special() -> dict[str, Case]:
    cases = {}
    for layout in ("channels_last", "contiguous", "transposed"):
        # Large means and outliers.
        for mean, std, outlier in (
            (1e4, 1.0, 0.0),
            (-1e6, 1.0, 0.0),
            (1e3, 1e-3, 0.0),
            (0.0, 1.0, 1e4),
            (0.0, 1.0, -1e6),
        ):
            for c, groups, height, width in ((8, 2, 64, 40), (16, 4, 33, 36), (4, 1, 100, 64)):
                case = Case(
                    1, c, 0, groups, height, width, F32, (layout,) * 4, mean=mean, std=std, outlier=outlier
                )
                name = f"{layout} {c} channels, mean {mean:g}, std {std:g}, outlier {outlier:g}"
                cases[name], cases[f"{name}, clusters"] = case, replace(case, clusters=True)
    shapes = {
        "one group of two slabs": (1, 512, 1, 8, 8),
        "many chunks": (1, 8, 8, 128, 128),
        "a slab that is not full": (5, 264, 33, 1, 1),
        "many images": (70, 8, 2, 4, 4),
        "one value": (1, 1, 1, 1, 1),
    }
    for name, (n, c, groups, height, width) in shapes.items():
        for dtype in (F32, BF16):
            for layout in ("channels_last", "contiguous"):
                cases[f"{name}, {str(dtype)[6:]} {layout}"] = Case(
                    n, c, 0, groups, height, width, dtype, (layout,) * 4
                )
    for dtype in (F32, F64, BF16):
        case = Case(1, 8, 0, 8, 16, 16, dtype, ("channels_last",) * 4, factor=1000.0)
        cases[f"huge arguments of the sigmoid, {str(dtype)[6:]}"] = case
    return cases


SPECIAL = _special()
