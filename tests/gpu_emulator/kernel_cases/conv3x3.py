"""The 3x3 convolution with all that is fused into it, compared with torch in float64."""

import itertools
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernel_cases.group_norm_silu import check_statistics
from kernel_cases.poisoned import Poisoned, normal
from kernel_cases.running import Kernels
from litevae_kernels.testing import assert_within_budget

F16, BF16 = torch.float16, torch.bfloat16
# A tensor core adds eight products to a sum: it cuts nine terms off at half a unit in the last place of the largest,
# and then the sum at a whole unit.
PER_PRODUCT = 11 / 8
TILE_P = 128  # pixels of a program
LAYOUTS = ("channels_last", "channels_last_sliced", "channels_last_pitched")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int, int]  # batch, input channels, output channels, height, width
    dtype: torch.dtype
    layout: str = "channels_last"  # of the inputs and the residual
    skip: int = 0  # channels of a second input
    affine: bool = False
    silu: bool = False
    bias: torch.dtype | None = None
    residual: bool = False
    measure: bool = False  # whether the kernel makes the statistics of its result


def random_case(rng: random.Random) -> Case:
    channels, outputs = (rng.choice((1, 3, 8, 12, 16, 20, 33, 64, 72)) for _ in range(2))
    shape = (rng.randint(1, 2), channels, outputs, rng.randint(1, 13), rng.randint(1, 13))
    dtype = rng.choice((F16, BF16))
    flags = [rng.random() < 0.5 for _ in range(4)]
    bias, skip = rng.choice((None, dtype, torch.float32)), rng.choice((0, 0, 1, 8, 24, 40))
    return Case(shape, dtype, rng.choice(LAYOUTS), skip, flags[0], flags[1], bias, *flags[2:])


def check(kernels: Kernels, rng: random.Random, case: Case) -> None:
    n, c, o, height, width = case.shape

    def tensor(channels: int, layout: str) -> Poisoned:
        t = Poisoned(rng, (n, channels, height, width), case.dtype, layout)
        t.view.copy_(normal(rng, t.view.shape))
        return t

    inputs, y = c + case.skip, tensor(o, "channels_last")
    x, skip = tensor(c, case.layout).view, tensor(case.skip, case.layout).view if case.skip else None
    residual = tensor(o, case.layout).view if case.residual else None
    weight = normal(rng, (o, 3, 3, inputs)).to(case.dtype)
    bias = None if case.bias is None else normal(rng, (o, 2)).to(case.bias)[:, 1]
    affine = normal(rng, (3, n, inputs)).float() if case.affine else None
    y.view.fill_(torch.nan)

    partials = None
    if case.measure:
        partials = torch.full((3, n, -(-height * width // TILE_P), o), torch.nan)
    arguments = (x, skip, affine, weight, bias, residual, case.silu, y.view, partials)
    kernels.run("conv3x3", "forward", *arguments, written=[y.view, partials])

    z = x.double() if skip is None else torch.cat([x, skip], 1).double()
    if affine is not None:
        mean, slope, offset = affine.double()[..., None, None]
        z = (z - mean) * slope + offset
    h = F.silu(z) if case.silu else z
    filters = weight.double().permute(0, 3, 1, 2)
    exact = F.conv2d(h, filters, padding=1)
    magnitude = F.conv2d(h.abs(), filters.abs(), padding=1)
    for term in (None if bias is None else bias[:, None, None], residual):
        if term is not None:
            exact, magnitude = exact + term.double(), magnitude + term.double().abs()
    operations = int(9 * inputs * PER_PRODUCT) + 2
    if case.affine or case.silu:
        # The normalised input is rounded to the weight's dtype, which counts as many roundings in float32. Its slope,
        # its exponential and its quotient have 12 roundings, as wrong as the largest argument makes the exponential.
        operations += round(torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps)
        operations += 12 * (int(z.abs().max()) + 1)
    assert_within_budget(y.view, exact, magnitude=magnitude, operations=operations)
    if case.measure:
        statistics = torch.full((n, o, 2), torch.nan, dtype=torch.float64)
        arguments = (partials, statistics, height * width, TILE_P)
        kernels.run("group_norm_silu", "channel_statistics", *arguments, written=[statistics])
        check_statistics(statistics, y.view)
    y.check_surroundings("y")


# Batch, input channels, output channels, height and width: odd sizes, several tiles of pixels, of input channels and of
# output channels, and channels that no vector, no tile and no matrix of the tensor cores divides.
SHAPES = (
    (1, 96, 20, 3, 4),
    (2, 3, 12, 5, 7),
    (1, 40, 40, 13, 11),
    (3, 16, 3, 9, 1),
    (1, 12, 130, 1, 23),
    (2, 32, 32, 8, 8),
    (1, 1, 1, 1, 1),
    (1, 36, 192, 6, 5),
)
SKIPS = (48, 8, 1)
FEATURES = ("affine", "silu", "bias", "residual", "skip", "statistics")


def _covering() -> dict[str, Case]:
    """Returns a case for every combination of features; half of them measure their result."""
    cases = {}
    for i, features in enumerate(itertools.product((True, False), repeat=5)):
        affine, silu, bias, residual, skip = features
        # Neither is the same for all cases with a feature.
        shape, dtype, layout = SHAPES[(i + i // 8) % 8], (F16, BF16)[i.bit_count() % 2], LAYOUTS[i % 3]
        of_bias = (dtype, torch.float32)[i // 8 % 2] if bias else None
        measure = (affine + silu + bias + residual + skip) % 2 == 1
        of_skip = SKIPS[i % 3] if skip else 0
        case = Case(shape, dtype, layout, of_skip, affine, silu, of_bias, residual, measure)
        words = [word for word, on in zip(FEATURES, (*features, measure), strict=True) if on] or ["plain"]
        cases[" ".join([*words, str(dtype)[6:], "x".join(map(str, shape))])] = case
    # Without tensor cores; a GPU's float32 calls go to cuDNN.
    cases["float32"] = Case((2, 40, 20, 5, 7), torch.float32, LAYOUTS[1], 8, True, True, torch.float32, True)
    return cases


COVERING = {"triton": _covering()}
