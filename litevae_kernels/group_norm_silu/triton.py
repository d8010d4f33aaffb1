"""GroupNorm+SiLU in Triton, for any CUDA device and for the CPU under Triton's interpreter.

Both functions fill tensors that the caller allocated, and take any strides. A tile is (pixels, channels). Each program
reduces a chunk, which is one or more tiles along the pixels, to partial results for each channel. A small kernel joins
those of a group, and another pass over the pixels applies the result. x and skip have separate launches, so a group
may have channels of both. The partition depends on shapes and layouts only, so the same inputs give the same bits.

Strides and sizes are separate parameters of a kernel because Triton types the elements of a tuple by their values and
specialises on them, whatever `do_not_specialize` says, so that new shapes would compile new kernels.
"""

# Triton types the kernels, and a name may have different types where a branch is compiled away.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litevae_kernels.tensors import accumulate_dtype
from litevae_kernels.triton_support import grid_of, kernel, on_device, program_index

TILE = 2048  # elements, 16 per thread
PROGRAMS = 4096  # number that fills a GPU; a program that writes takes several tiles only if that many remain
# A program that sums takes at least four tiles, which it loads at once, and more if this many programs remain. Its
# partial results then take about a fortieth of the memory of x.
SUMMING_PROGRAMS = 512
SUMMED_STEPS = 4
# The most tiles that share a shift: their squares add up to at most MAX_STEPS + 1 times the squares about the mean.
MAX_STEPS = 64


@triton.jit
def _place(program, channels, chunks, TILE_C: tl.constexpr):
    """Returns the image, the chunk, the channels and a mask of those that exist, for a program."""
    blocks = tl.cdiv(channels, TILE_C)
    channel = program % blocks * TILE_C + tl.arange(0, TILE_C)
    return program // blocks // chunks, program // blocks % chunks, channel, channel < channels


@triton.jit
def _offsets(
    n, channel, pixel, strides, width, INNER: tl.constexpr, PIXELS: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Returns offsets (pixels, channels) in int64, for strides (n, c, h, w) in units of VEC elements.

    The compiler can see that they are contiguous along INNER and multiples of VEC along the other axes.
    """
    s_n, s_c, s_h, s_w = strides
    if PIXELS == "flat":
        down = pixel if INNER == "pixels" else pixel * (s_w * VEC)
    else:
        # int32 division is several times faster, and "rows" have fewer than 2^31 pixels
        index = tl.int32 if PIXELS == "rows" else tl.int64
        row = (pixel.to(index) // width.to(index)).to(tl.int64)
        down = row * (s_h * VEC) + (pixel - row * width) * (s_w * VEC)
    across = channel if INNER == "channels" else channel * (s_c * VEC)
    return n * (s_n * VEC) + down[:, None] + across[None, :]


@triton.jit
def _parameters(
    n, channel, mask, first, groups, group_channels, weight, bias, weight_c, bias_c, stats, ACC: tl.constexpr
):
    """Returns the two parts of each channel's mean, rstd, weight and bias, each (1, channels)."""
    at = first + channel
    group = n * groups + at // group_channels
    mean = tl.load(stats + 2 * group, mask=mask, other=0)
    rstd = tl.load(stats + 2 * group + 1, mask=mask, other=0).to(ACC)
    high = mean.to(ACC)
    low = (mean - high.to(tl.float64)).to(ACC)
    w = tl.full(channel.shape, 1, ACC)
    b = tl.full(channel.shape, 0, ACC)
    if weight is not None:
        w = tl.load(weight + at * weight_c, mask=mask, other=0).to(ACC)
    if bias is not None:
        b = tl.load(bias + at * bias_c, mask=mask, other=0).to(ACC)
    return high[None, :], low[None, :], rstd[None, :], w[None, :], b[None, :]


@triton.jit
def _slope(x, grad, high, low, rstd, w, b):
    """Returns the normalised x, and grad times the derivative of SiLU."""
    normal = ((x - high) - low) * rstd
    z = tl.fma(normal, w, b)
    sigmoid = 1 / (1 + tl.exp(-z))
    return normal, grad * sigmoid * tl.fma(z, 1 - sigmoid, 1.0)


@triton.jit
def _store_partials(
    partials, shift, total, squares, valid, n, chunk, channel, has_channel, batch, chunks, all_channels,
    ACC: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """Reduces a program's sums over `valid` pixels, about the shift of each place, to its partials."""
    reference = tl.sum(tl.where((tl.arange(0, TILE_P) == 0)[:, None], shift, 0), 0)
    # `count` is the number of pixels that each place has seen.
    count = tl.maximum(valid - tl.arange(0, TILE_P) + (TILE_P - 1), 0) // TILE_P
    share = total / tl.maximum(count, 1).to(ACC)[:, None]
    weight = count.to(ACC)[:, None]
    squares = tl.maximum(tl.fma(-total, share, squares), 0)
    distance = (shift - reference[None, :]) + share
    mean = tl.sum(distance * weight, 0) / valid.to(ACC)
    apart = distance - mean[None, :]
    squares = tl.sum(tl.fma(weight * apart, apart, squares), 0)
    out = partials + ((n * chunks + chunk) * all_channels + channel)
    plane = batch * chunks * all_channels
    tl.store(out, reference, mask=has_channel)
    tl.store(out + plane, mean, mask=has_channel)
    tl.store(out + 2 * plane, squares, mask=has_channel)


@kernel("partials")
def group_norm_silu_stats_kernel(
    x, partials,
    x_n: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w: tl.int64,
    batch: tl.int64, channels: tl.int64, pixels: tl.int64, width: tl.int64, first: tl.int64,
    all_channels: tl.int64, chunks: tl.int64, steps: tl.int64,
    X_INNER: tl.constexpr, X_PIXELS: tl.constexpr, X_VEC: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr,
    ACC: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Writes partials (3, batch, chunks, all_channels): a reference, the mean minus it, squares about the mean.

    `channels` and `pixels` are in units of C_VEC and P_VEC. Each place of the tile subtracts the first value that it
    meets, so that a large mean costs no digits. The loop reads that value again, so that it takes whole batches.
    """
    channels *= C_VEC
    pixels *= P_VEC
    n, chunk, channel, has_channel = _place(program_index(), channels, chunks, TILE_C)
    if n >= batch:
        return
    start = chunk * (steps * TILE_P)
    pixel = start + tl.arange(0, TILE_P)
    mask = (pixel < pixels)[:, None] & has_channel[None, :]
    at = _offsets(n, channel, pixel, (x_n, x_c, x_h, x_w), width, X_INNER, X_PIXELS, X_VEC)
    met = tl.load(x + at, mask=mask, other=0)
    shift = met.to(ACC)
    total = tl.zeros((TILE_P, TILE_C), ACC)
    squares = tl.zeros((TILE_P, TILE_C), ACC)
    for step in tl.range(0, steps, loop_unroll_factor=4):
        now = pixel + step * TILE_P
        mask = (now < pixels)[:, None] & has_channel[None, :]
        at = _offsets(n, channel, now, (x_n, x_c, x_h, x_w), width, X_INNER, X_PIXELS, X_VEC)
        change = tl.load(x + at, mask=mask, other=met).to(ACC) - shift  # 0 where there is nothing
        total += change
        squares = tl.fma(change, change, squares)
    _store_partials(
        partials, shift, total, squares, tl.minimum(pixels - start, steps * TILE_P).to(tl.int32),
        n, chunk, first + channel, has_channel, batch, chunks, all_channels, ACC, TILE_P,
    )  # fmt: skip


@triton.jit
def _store_group(
    program, mean, rstd, weight, bias, offset, stats, coefficients, weight_c, bias_c, offset_c,
    n, first, batch, all_channels, group_channels, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a group's stats, and the coefficients of its channels.

    The coefficients (3, batch, all_channels) are those of z = (x - mean) a + b. The mean is split in two, and the
    second half goes into b, so that the difference keeps its digits.
    """
    tl.store(stats + 2 * program, mean)
    tl.store(stats + 2 * program + 1, rstd)
    plane = batch * all_channels
    for i in range(0, group_channels, BLOCK):
        inside = i + tl.arange(0, BLOCK)
        mask = inside < group_channels
        at = first + inside
        exact = tl.full((BLOCK,), 0, tl.float64) + mean
        if offset is not None:  # what is added to the input is subtracted from its mean
            exact -= tl.load(offset + at * offset_c, mask=mask, other=0).to(tl.float64)
        high = exact.to(coefficients.dtype.element_ty)
        slope = tl.full((BLOCK,), 0, tl.float64) + rstd
        if weight is not None:
            slope *= tl.load(weight + at * weight_c, mask=mask, other=0).to(tl.float64)
        constant = (high.to(tl.float64) - exact) * slope
        if bias is not None:
            constant += tl.load(bias + at * bias_c, mask=mask, other=0).to(tl.float64)
        out = coefficients + (n * all_channels + at)
        tl.store(out, high, mask=mask)
        tl.store(out + plane, slope, mask=mask)
        tl.store(out + 2 * plane, constant, mask=mask)


@kernel("partials", "weight", "bias", "offset", "stats", "coefficients")
def group_norm_silu_stats_join_kernel(
    partials, weight, bias, offset, stats, coefficients,
    weight_c: tl.int64, bias_c: tl.int64, offset_c: tl.int64,
    batch: tl.int64, all_channels: tl.int64, pixels: tl.int64, groups: tl.int64, group_channels: tl.int64,
    chunks: tl.int64, chunk_pixels: tl.int64, eps: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes stats (batch, groups, 2) and coefficients, one group per program, from partials."""
    program = program_index()
    n = program // groups
    if n >= batch:
        return
    first = program % groups * group_channels
    base = partials + (n * chunks * all_channels + first)
    plane = batch * chunks * all_channels
    shift = tl.load(base).to(tl.float64) + tl.load(base + plane).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, chunks * group_channels, BLOCK):
        index = i + tl.arange(0, BLOCK)
        mask = index < chunks * group_channels
        chunk = index // group_channels
        channel = index - chunk * group_channels
        at = base + (chunk * all_channels + channel)
        mean = tl.load(at, mask=mask, other=0).to(tl.float64)
        if offset is not None:
            mean += tl.load(offset + (first + channel) * offset_c, mask=mask, other=0).to(tl.float64)
        mean += tl.load(at + plane, mask=mask, other=0).to(tl.float64)
        count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float64)
        change = tl.where(mask, mean - shift, 0)
        total = tl.fma(count, change, total)
        squares += tl.fma(count * change, change, tl.load(at + 2 * plane, mask=mask, other=0).to(tl.float64))
    size = (pixels * group_channels).to(tl.float64)
    distance = tl.sum(total, 0) / size
    variance = tl.maximum(tl.sum(squares, 0) / size - distance * distance, 0)
    rstd = 1 / tl.sqrt(variance + eps)
    _store_group(
        program, shift + distance, rstd, weight, bias, offset, stats, coefficients, weight_c, bias_c, offset_c,
        n, first, batch, all_channels, group_channels, BLOCK,
    )  # fmt: skip


@triton.jit
def _load_statistic(of_x, of_skip, which: tl.constexpr, n, channel, mask, x_channels, all_channels):
    """Returns the mean (0) or the variance (1) of channels of x and skip, whose statistics are (batch, channels, 2)."""
    at = 2 * (n * x_channels + channel) + which
    number = tl.load(of_x + at, mask=mask & (channel < x_channels), other=0)
    if of_skip is not None:
        at = 2 * (n * (all_channels - x_channels) + channel - x_channels) + which
        number += tl.load(of_skip + at, mask=mask & (channel >= x_channels), other=0)
    return number


@kernel("of_x", "of_skip", "weight", "bias", "offset", "stats", "coefficients")
def group_norm_silu_combine_kernel(
    of_x, of_skip, weight, bias, offset, stats, coefficients,
    weight_c: tl.int64, bias_c: tl.int64, offset_c: tl.int64,
    batch: tl.int64, x_channels: tl.int64, all_channels: tl.int64, groups: tl.int64, group_channels: tl.int64,
    eps: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes stats and coefficients as the join kernel does, from the mean and the variance of each channel."""
    program = program_index()
    n = program // groups
    if n >= batch:
        return
    first = program % groups * group_channels
    shift = _load_statistic(of_x, of_skip, 0, n, first, first >= 0, x_channels, all_channels)
    total = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, group_channels, BLOCK):
        inside = i + tl.arange(0, BLOCK)
        mask = inside < group_channels
        channel = first + inside
        mean = _load_statistic(of_x, of_skip, 0, n, channel, mask, x_channels, all_channels)
        variance = _load_statistic(of_x, of_skip, 1, n, channel, mask, x_channels, all_channels)
        if offset is not None:
            mean += tl.load(offset + channel * offset_c, mask=mask, other=0).to(tl.float64)
        change = tl.where(mask, mean - shift, 0)
        total += change
        squares += tl.fma(change, change, variance)
    size = group_channels.to(tl.float64)
    distance = tl.sum(total, 0) / size
    variance = tl.maximum(tl.sum(squares, 0) / size - distance * distance, 0)
    _store_group(
        program, shift + distance, 1 / tl.sqrt(variance + eps), weight, bias, offset, stats, coefficients,
        weight_c, bias_c, offset_c, n, first, batch, all_channels, group_channels, BLOCK,
    )  # fmt: skip


@kernel("coefficients")
def group_norm_silu_apply_kernel(
    x, coefficients, y,
    x_n: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w: tl.int64,
    y_n: tl.int64, y_c: tl.int64, y_h: tl.int64, y_w: tl.int64,
    batch: tl.int64, channels: tl.int64, pixels: tl.int64, width: tl.int64, first: tl.int64,
    all_channels: tl.int64, chunks: tl.int64, steps: tl.int64,
    X_INNER: tl.constexpr, X_PIXELS: tl.constexpr, X_VEC: tl.constexpr, Y_INNER: tl.constexpr,
    Y_PIXELS: tl.constexpr, Y_VEC: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr, ACC: tl.constexpr,
    TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Writes y (batch, channels, pixels) = silu((x - mean) a + b) with coefficients (3, batch, all_channels)."""
    channels *= C_VEC
    pixels *= P_VEC
    # backwards, because the end of x may still be in the cache
    program = batch * chunks * tl.cdiv(channels, TILE_C) - 1 - program_index()
    if program < 0:
        return
    n, chunk, channel, has_channel = _place(program, channels, chunks, TILE_C)
    own = coefficients + (n * all_channels + first + channel)
    plane = batch * all_channels
    mean = tl.load(own, mask=has_channel, other=0)[None, :]
    a = tl.load(own + plane, mask=has_channel, other=0)[None, :]
    b = tl.load(own + 2 * plane, mask=has_channel, other=0)[None, :]
    pixel = chunk * (steps * TILE_P) + tl.arange(0, TILE_P)
    for step in tl.range(0, steps, loop_unroll_factor=2):
        now = pixel + step * TILE_P
        mask = (now < pixels)[:, None] & has_channel[None, :]
        at = _offsets(n, channel, now, (x_n, x_c, x_h, x_w), width, X_INNER, X_PIXELS, X_VEC)
        z = tl.fma(tl.load(x + at, mask=mask, other=0).to(ACC) - mean, a, b)
        at = _offsets(n, channel, now, (y_n, y_c, y_h, y_w), width, Y_INNER, Y_PIXELS, Y_VEC)
        tl.store(y + at, z / (1 + tl.exp(-z)), mask=mask)


@kernel("weight", "bias", "stats", "partials")
def group_norm_silu_sums_kernel(
    x, grad, weight, bias, stats, partials,
    x_n: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w: tl.int64,
    grad_n: tl.int64, grad_c: tl.int64, grad_h: tl.int64, grad_w: tl.int64,
    weight_c: tl.int64,
    bias_c: tl.int64, batch: tl.int64, channels: tl.int64, pixels: tl.int64, width: tl.int64, first: tl.int64,
    all_channels: tl.int64, groups: tl.int64, group_channels: tl.int64, chunks: tl.int64, steps: tl.int64,
    X_INNER: tl.constexpr, X_PIXELS: tl.constexpr, X_VEC: tl.constexpr, GRAD_INNER: tl.constexpr,
    GRAD_PIXELS: tl.constexpr, GRAD_VEC: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr,
    ACC: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Writes partials (2, batch, chunks, all_channels): sums of z's gradient, and of its product with normalised x."""
    channels *= C_VEC
    pixels *= P_VEC
    n, chunk, channel, has_channel = _place(program_index(), channels, chunks, TILE_C)
    if n >= batch:
        return
    high, low, rstd, w, b = _parameters(
        n, channel, has_channel, first, groups, group_channels, weight, bias, weight_c, bias_c, stats, ACC
    )
    pixel = chunk * (steps * TILE_P) + tl.arange(0, TILE_P)
    total = tl.zeros((TILE_P, TILE_C), ACC)
    product = tl.zeros((TILE_P, TILE_C), ACC)
    for step in tl.range(0, steps, loop_unroll_factor=2):
        now = pixel + step * TILE_P
        mask = (now < pixels)[:, None] & has_channel[None, :]
        at = _offsets(n, channel, now, (x_n, x_c, x_h, x_w), width, X_INNER, X_PIXELS, X_VEC)
        value = tl.load(x + at, mask=mask, other=0).to(ACC)
        at = _offsets(
            n, channel, now, (grad_n, grad_c, grad_h, grad_w), width, GRAD_INNER, GRAD_PIXELS, GRAD_VEC
        )
        incoming = tl.load(grad + at, mask=mask, other=0).to(ACC)
        normal, dz = _slope(value, incoming, high, low, rstd, w, b)
        total += dz
        product += tl.where(mask, dz * normal, 0)
    out = partials + ((n * chunks + chunk) * all_channels + first + channel)
    tl.store(out, tl.sum(total, 0), mask=has_channel)
    tl.store(out + batch * chunks * all_channels, tl.sum(product, 0), mask=has_channel)


@kernel("partials", "weight", "stats", "totals", "coefficients")
def group_norm_silu_sums_join_kernel(
    partials, weight, stats, totals, coefficients,
    weight_c: tl.int64,
    batch: tl.int64, all_channels: tl.int64, pixels: tl.int64, groups: tl.int64, group_channels: tl.int64,
    chunks: tl.int64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes totals (2, batch, all_channels) of partials (2, batch, chunks, all_channels), and coefficients.

    The coefficients (batch, groups, 2) are subtracted from x's gradient: a constant and a multiple of the normalised x.
    """
    program = program_index()
    n = program // groups
    if n >= batch:
        return
    group = program % groups
    plane = batch * chunks * all_channels
    constant = tl.zeros((BLOCK,), tl.float64)
    multiple = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, group_channels, BLOCK):
        inside = i + tl.arange(0, BLOCK)
        has_channel = inside < group_channels
        channel = group * group_channels + inside
        total = tl.zeros((ROWS, BLOCK), tl.float64)
        product = tl.zeros((ROWS, BLOCK), tl.float64)
        for j in range(0, chunks, ROWS):
            chunk = j + tl.arange(0, ROWS)
            mask = (chunk < chunks)[:, None] & has_channel[None, :]
            at = partials + ((n * chunks + chunk)[:, None] * all_channels + channel[None, :])
            total += tl.load(at, mask=mask, other=0).to(tl.float64)
            product += tl.load(at + plane, mask=mask, other=0).to(tl.float64)
        total = tl.sum(total, 0)
        product = tl.sum(product, 0)
        out = totals + (n * all_channels + channel)
        tl.store(out, total, mask=has_channel)
        tl.store(out + batch * all_channels, product, mask=has_channel)
        if weight is not None:
            w = tl.load(weight + channel * weight_c, mask=has_channel, other=0).to(tl.float64)
            total *= w
            product *= w
        constant += total
        multiple += product
    factor = tl.load(stats + 2 * program + 1) / (pixels * group_channels).to(tl.float64)
    tl.store(coefficients + 2 * program, tl.sum(constant, 0) * factor)
    tl.store(coefficients + 2 * program + 1, tl.sum(multiple, 0) * factor)


@kernel("totals", "grad_weight", "grad_bias")
def group_norm_silu_parameters_kernel(
    totals,
    grad_weight,
    grad_bias,
    batch: tl.int64,
    all_channels: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the gradients (all_channels) of weight and bias from totals (2, batch, all_channels)."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    has_channel = channel < all_channels
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    product = tl.zeros((ROWS, BLOCK), tl.float64)
    for i in range(0, batch, ROWS):
        n = i + tl.arange(0, ROWS)
        mask = (n < batch)[:, None] & has_channel[None, :]
        at = totals + (n[:, None] * all_channels + channel[None, :])
        if grad_bias is not None:
            total += tl.load(at, mask=mask, other=0)
        if grad_weight is not None:
            product += tl.load(at + batch * all_channels, mask=mask, other=0)
    # 16-bit types round through float32, as PyTorch's conversions do
    if grad_bias is not None:
        total = tl.sum(total, 0)
        if grad_bias.dtype.element_ty != tl.float64:
            total = total.to(tl.float32)
        tl.store(grad_bias + channel, total, mask=has_channel)
    if grad_weight is not None:
        product = tl.sum(product, 0)
        if grad_weight.dtype.element_ty != tl.float64:
            product = product.to(tl.float32)
        tl.store(grad_weight + channel, product, mask=has_channel)


@kernel("weight", "bias", "stats", "coefficients")
def group_norm_silu_grad_kernel(
    x, grad, weight, bias, stats, coefficients, out,
    x_n: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w: tl.int64,
    grad_n: tl.int64, grad_c: tl.int64, grad_h: tl.int64, grad_w: tl.int64,
    out_n: tl.int64, out_c: tl.int64, out_h: tl.int64, out_w: tl.int64,
    weight_c: tl.int64,
    bias_c: tl.int64, batch: tl.int64, channels: tl.int64, pixels: tl.int64, width: tl.int64, first: tl.int64,
    groups: tl.int64, group_channels: tl.int64, chunks: tl.int64, steps: tl.int64,
    X_INNER: tl.constexpr, X_PIXELS: tl.constexpr, X_VEC: tl.constexpr, GRAD_INNER: tl.constexpr,
    GRAD_PIXELS: tl.constexpr, GRAD_VEC: tl.constexpr, OUT_INNER: tl.constexpr, OUT_PIXELS: tl.constexpr,
    OUT_VEC: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr, ACC: tl.constexpr, TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    """Writes out (batch, channels, pixels), the gradient of x."""
    channels *= C_VEC
    pixels *= P_VEC
    program = batch * chunks * tl.cdiv(channels, TILE_C) - 1 - program_index()  # backwards, as in forward
    if program < 0:
        return
    n, chunk, channel, has_channel = _place(program, channels, chunks, TILE_C)
    high, low, rstd, w, b = _parameters(
        n, channel, has_channel, first, groups, group_channels, weight, bias, weight_c, bias_c, stats, ACC
    )
    pair = coefficients + 2 * (n * groups + (first + channel) // group_channels)
    constant = tl.load(pair, mask=has_channel, other=0)[None, :]
    multiple = tl.load(pair + 1, mask=has_channel, other=0)[None, :]
    slope = rstd * w
    pixel = chunk * (steps * TILE_P) + tl.arange(0, TILE_P)
    for step in tl.range(0, steps, loop_unroll_factor=2):
        now = pixel + step * TILE_P
        mask = (now < pixels)[:, None] & has_channel[None, :]
        at = _offsets(n, channel, now, (x_n, x_c, x_h, x_w), width, X_INNER, X_PIXELS, X_VEC)
        value = tl.load(x + at, mask=mask, other=0).to(ACC)
        at = _offsets(
            n, channel, now, (grad_n, grad_c, grad_h, grad_w), width, GRAD_INNER, GRAD_PIXELS, GRAD_VEC
        )
        incoming = tl.load(grad + at, mask=mask, other=0).to(ACC)
        normal, dz = _slope(value, incoming, high, low, rstd, w, b)
        at = _offsets(n, channel, now, (out_n, out_c, out_h, out_w), width, OUT_INNER, OUT_PIXELS, OUT_VEC)
        tl.store(out + at, tl.fma(dz, slope, -tl.fma(normal, multiple, constant)), mask=mask)


@triton.jit
def _add(
    y, first, second, b, n, channel, pixel, mask, y_strides, first_strides, second_strides, width,
    Y_INNER: tl.constexpr, Y_PIXELS: tl.constexpr, Y_VEC: tl.constexpr, FIRST_INNER: tl.constexpr,
    FIRST_PIXELS: tl.constexpr, FIRST_VEC: tl.constexpr, SECOND_INNER: tl.constexpr, SECOND_PIXELS: tl.constexpr,
    SECOND_VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds b and the residuals to a tile of y, and returns it as it was stored."""
    other = b
    if first is not None:
        at = _offsets(n, channel, pixel, first_strides, width, FIRST_INNER, FIRST_PIXELS, FIRST_VEC)
        other += tl.load(first + at, mask=mask, other=0).to(ACC)
    if second is not None:
        at = _offsets(n, channel, pixel, second_strides, width, SECOND_INNER, SECOND_PIXELS, SECOND_VEC)
        other += tl.load(second + at, mask=mask, other=0).to(ACC)
    at = _offsets(n, channel, pixel, y_strides, width, Y_INNER, Y_PIXELS, Y_VEC)
    value = (tl.load(y + at, mask=mask, other=0).to(ACC) + other).to(y.dtype.element_ty)
    tl.store(y + at, value, mask=mask)
    return value.to(ACC)


@kernel("bias", "second_bias", "partials")
def residual_add_kernel(
    y, first, second, bias, second_bias, partials,
    y_n: tl.int64, y_c: tl.int64, y_h: tl.int64, y_w: tl.int64,
    first_n: tl.int64, first_c: tl.int64, first_h: tl.int64, first_w: tl.int64,
    second_n: tl.int64, second_c: tl.int64, second_h: tl.int64, second_w: tl.int64,
    bias_c: tl.int64, second_bias_c: tl.int64,
    batch: tl.int64, channels: tl.int64, pixels: tl.int64, width: tl.int64, first_channel: tl.int64,
    chunks: tl.int64, steps: tl.int64,
    Y_INNER: tl.constexpr, Y_PIXELS: tl.constexpr, Y_VEC: tl.constexpr, FIRST_INNER: tl.constexpr,
    FIRST_PIXELS: tl.constexpr, FIRST_VEC: tl.constexpr, SECOND_INNER: tl.constexpr, SECOND_PIXELS: tl.constexpr,
    SECOND_VEC: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr, ACC: tl.constexpr, TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    """Adds residuals (batch, channels, pixels) and biases (channels) to y (batch, channels, pixels).

    Unless partials is None, it gets those of the sum, as from the statistics kernel: each place of the tile subtracts
    its first value.
    """
    channels *= C_VEC
    pixels *= P_VEC
    n, chunk, channel, has_channel = _place(program_index(), channels, chunks, TILE_C)
    if n >= batch:
        return
    b = tl.zeros((TILE_C,), ACC)
    if bias is not None:
        b += tl.load(bias + channel * bias_c, mask=has_channel, other=0).to(ACC)
    if second_bias is not None:
        b += tl.load(second_bias + channel * second_bias_c, mask=has_channel, other=0).to(ACC)
    b = b[None, :]
    start = chunk * (steps * TILE_P)
    pixel = start + tl.arange(0, TILE_P)
    y_strides = (y_n, y_c, y_h, y_w)
    first_strides = (first_n, first_c, first_h, first_w)
    second_strides = (second_n, second_c, second_h, second_w)
    mask = (pixel < pixels)[:, None] & has_channel[None, :]
    shift = _add(
        y, first, second, b, n, channel, pixel, mask, y_strides, first_strides, second_strides, width,
        Y_INNER, Y_PIXELS, Y_VEC, FIRST_INNER, FIRST_PIXELS, FIRST_VEC, SECOND_INNER, SECOND_PIXELS, SECOND_VEC, ACC,
    )  # fmt: skip
    total = tl.zeros((TILE_P, TILE_C), ACC)
    squares = tl.zeros((TILE_P, TILE_C), ACC)
    for step in tl.range(1, steps, loop_unroll_factor=2):
        now = pixel + step * TILE_P
        mask = (now < pixels)[:, None] & has_channel[None, :]
        value = _add(
            y, first, second, b, n, channel, now, mask, y_strides, first_strides, second_strides, width,
            Y_INNER, Y_PIXELS, Y_VEC, FIRST_INNER, FIRST_PIXELS, FIRST_VEC, SECOND_INNER, SECOND_PIXELS, SECOND_VEC,
            ACC,
        )  # fmt: skip
        if partials is not None:
            change = tl.where(mask, value - shift, 0)
            total += change
            squares = tl.fma(change, change, squares)
    if partials is not None:
        _store_partials(
            partials, shift, total, squares, tl.minimum(pixels - start, steps * TILE_P).to(tl.int32),
            n, chunk, channel, has_channel, batch, chunks, channels, ACC, TILE_P,
        )  # fmt: skip


@kernel("partials", "statistics")
def channel_statistics_kernel(
    partials, statistics,
    batch: tl.int64, channels: tl.int64, pixels: tl.int64, chunks: tl.int64, chunk_pixels: tl.int64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes statistics (batch, channels, 2), the mean and the variance of each channel, from partials."""
    program = program_index()
    blocks = tl.cdiv(channels, BLOCK)
    n = program // blocks
    if n >= batch:
        return
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    has_channel = channel < channels
    base = partials + (n * chunks * channels + channel)
    plane = batch * chunks * channels
    shift = tl.load(base, mask=has_channel, other=0).to(tl.float64)
    shift += tl.load(base + plane, mask=has_channel, other=0).to(tl.float64)
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    squares = tl.zeros((ROWS, BLOCK), tl.float64)
    for i in range(0, chunks, ROWS):
        chunk = i + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & has_channel[None, :]
        at = base[None, :] + (chunk * channels)[:, None]
        mean = tl.load(at, mask=mask, other=0).to(tl.float64) + tl.load(at + plane, mask=mask, other=0).to(
            tl.float64
        )
        count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float64)[:, None]
        change = tl.where(mask, mean - shift[None, :], 0)
        total = tl.fma(count, change, total)
        squares += tl.fma(count * change, change, tl.load(at + 2 * plane, mask=mask, other=0).to(tl.float64))
    size = pixels.to(tl.float64)
    distance = tl.sum(total, 0) / size
    variance = tl.maximum(tl.sum(squares, 0) / size - distance * distance, 0)
    at = statistics + 2 * (n * channels + channel)
    tl.store(at, shift + distance, mask=has_channel)
    tl.store(at + 1, variance, mask=has_channel)


def _power_of_two(*values: int) -> int:
    """Returns the largest power of two, at most 16, that divides all values."""
    bits = 16
    for value in values:
        bits |= value
    return bits & -bits


class _View(NamedTuple):
    """The strides and the layout of a tensor, as the kernels take them."""

    strides: tuple[int, int, int, int]  # in units of `vector` elements
    inner: str  # contiguous axis, "channels", "pixels" or "none"
    pixels: str  # "flat" if evenly spaced, otherwise "rows", or "wide rows" if there are too many pixels for int32
    vector: int  # elements per access

    def constants(self, name: str) -> dict[str, str | int]:
        """Returns the constexpr arguments for the tensor that a kernel calls `name`."""
        return {f"{name}_INNER": self.inner, f"{name}_PIXELS": self.pixels, f"{name}_VEC": self.vector}


def _view(x: Tensor) -> _View:
    _, c, height, width = x.shape
    # the stride of an axis of one element is arbitrary
    s_n, s_c, s_h, s_w = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    pixels = "rows" if height * width <= 2**30 else "wide rows"
    if height == 1 or width == 1 or s_h == width * s_w:
        pixels, s_h, s_w = "flat", 0, s_h if width == 1 else s_w
    inner, vector = "none", 1
    if s_c == 1:
        inner, vector = "channels", _power_of_two(c, s_n, s_h, s_w)
    elif pixels == "flat" and s_w == 1:
        inner, vector = "pixels", _power_of_two(height * width, s_n, s_c)
    vector = 1 if x.data_ptr() % 16 else min(vector, 16 // x.element_size())
    return _View((s_n // vector, s_c // vector, s_h // vector, s_w // vector), inner, pixels, vector)


def _tile(inner: str, channels: int, pixels: int) -> tuple[int, int]:
    """Returns the (pixels, channels) of a tile, both powers of two: few different ones, as each is a kernel."""
    if inner == "channels":
        even = channels & -channels
        tile_c = even if even >= 32 else max(triton.next_power_of_2(channels), 8)
        tile_c = min(tile_c, 64, TILE)
        return TILE // tile_c, tile_c
    tile_p = min(max(triton.next_power_of_2(pixels) // SUMMED_STEPS, 64), TILE)
    return tile_p, TILE // tile_p


def _steps(pixels: int, rest: int, least: int, most: int, programs: int) -> int:
    """Returns the number of tiles per program, a power of two: more than `least` only if `programs` remain.

    Args:
        pixels: number of tiles along the pixels.
        rest: number of tiles along the other axes.
        least: number that a program takes if there are as many.
        most: largest number.
        programs: number that must remain.
    """
    steps = 1
    while (
        steps < most
        and steps < pixels
        and (steps < least or rest * triton.cdiv(pixels, 2 * steps) >= programs)
    ):
        steps *= 2
    return steps


class _Part(NamedTuple):
    """The launch parameters of x or skip: the tensor, its view, its first channel, and (pixels, channels) of a tile."""

    x: Tensor
    view: _View
    first: int
    tile: tuple[int, int]

    def vectors(self, *others: _View) -> tuple[int, int]:
        """Returns the (channels, pixels) of the longest vectors in the part and in `others`; masks have that grain."""
        views = (self.view, *others)
        c_vec, p_vec = (
            max((v.vector for v in views if v.inner == inner), default=1) for inner in ("channels", "pixels")
        )
        return c_vec, p_vec

    def sizes(self, *others: _View) -> tuple[int, int, int, int, int]:
        n, c, height, width = self.x.shape
        c_vec, p_vec = self.vectors(*others)
        return n, c // c_vec, height * width // p_vec, width, self.first

    def tiling(self, chunk: int, *others: _View) -> tuple[tuple[int, int], tuple[int, int], dict[str, Any]]:
        """Returns the grid, (chunks, steps) and the options of a launch with `chunk` pixels per program."""
        n, c, height, width = self.x.shape
        tile_p = min(self.tile[0], chunk)
        chunks = triton.cdiv(height * width, chunk)
        c_vec, p_vec = self.vectors(*others)
        options = {
            "C_VEC": c_vec,
            "P_VEC": p_vec,
            "ACC": tl.float64 if self.x.dtype == torch.float64 else tl.float32,
            "TILE_P": tile_p,
            "TILE_C": self.tile[1],
            "num_warps": max(1, min(4, tile_p * self.tile[1] // 512)),
        }
        return grid_of(n * chunks * triton.cdiv(c, self.tile[1])), (chunks, chunk // tile_p), options

    def chunk(self, *, sums: bool) -> int:
        """Returns the number of pixels per program, for a kernel that sums or for one that writes a tensor."""
        n, c, height, width = self.x.shape
        tiles = triton.cdiv(height * width, self.tile[0]), n * triton.cdiv(c, self.tile[1])
        limits = (SUMMED_STEPS, MAX_STEPS, SUMMING_PROGRAMS) if sums else (1, 8, PROGRAMS)
        return self.tile[0] * _steps(*tiles, *limits)


def _parts(x: Tensor, skip: Tensor | None) -> list[_Part]:
    out = []
    first = 0
    for part in (x, skip):
        if part is not None and part.shape[1] > 0:
            view = _view(part)
            tile = _tile(view.inner, part.shape[1], part.shape[2] * part.shape[3])
            out.append(_Part(part, view, first, tile))
            first += part.shape[1]
    return out


def _step(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.stride(0)


def coefficients_of(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    num_groups: int,
    eps: float,
    offset: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
) -> Tensor:
    """Fills `stats` (N, num_groups, 2), and returns mean, a and b (3, N, C) of the normalised (x - mean) a + b.

    Args:
        statistics: those of x and of skip, as `channel_statistics` fills them; without them, a pass computes them.
    """
    n, _, height, width = x.shape
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    pixels = height * width
    groups = (num_groups, channels // num_groups)
    steps = (_step(weight), _step(bias), _step(offset))
    dtype = accumulate_dtype(x.dtype)
    coefficients = x.new_empty((3, n, channels), dtype=dtype)
    grid = grid_of(n * num_groups)
    with on_device(x):
        if statistics:
            of_x, of_skip = statistics if len(statistics) > 1 else (statistics[0], None)
            group_norm_silu_combine_kernel[grid](
                of_x, of_skip, weight, bias, offset, stats, coefficients, *steps, n, x.shape[1], channels, *groups,
                eps, BLOCK=min(512, triton.next_power_of_2(groups[1])), num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
            return coefficients
        parts = _parts(x, skip)
        chunk = min(part.chunk(sums=True) for part in parts)
        chunks = triton.cdiv(pixels, chunk)
        partials = x.new_empty((3, n, chunks, channels), dtype=dtype)
        for part in parts:
            own_grid, tiling, options = part.tiling(chunk)
            group_norm_silu_stats_kernel[own_grid](
                part.x, partials, *part.view.strides, *part.sizes(), channels, *tiling,
                **part.view.constants("X"), **options, enable_fp_fusion=False,
            )  # fmt: skip
        group_norm_silu_stats_join_kernel[grid](
            partials, weight, bias, offset, stats, coefficients, *steps,
            n, channels, pixels, *groups, chunks, chunk, eps,
            BLOCK=512, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return coefficients


def forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor,
    num_groups: int,
    eps: float,
    offset: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
) -> None:
    """Fills `y` (N, C, H, W) and `stats` (N, num_groups, 2); see `coefficients_of`."""
    coefficients = coefficients_of(x, skip, weight, bias, stats, num_groups, eps, offset, statistics)
    with on_device(x):
        for part in _parts(x, skip):
            out = y.narrow(1, part.first, part.x.shape[1])
            view = _view(out)
            grid, tiling, options = part.tiling(part.chunk(sums=False), view)
            group_norm_silu_apply_kernel[grid](
                part.x, coefficients, out, *part.view.strides, *view.strides, *part.sizes(view), y.shape[1], *tiling,
                **part.view.constants("X"), **view.constants("Y"), **options, enable_fp_fusion=True,
            )  # fmt: skip


def add(
    y: Tensor, residuals: Sequence[Tensor], biases: Sequence[Tensor], statistics: Tensor | None = None
) -> None:
    """Adds at most two `residuals` (N, C, H, W) and two `biases` (C) to `y` (N, C, H, W), and rounds once.

    They have any dtype. Fills `statistics` (N, C, 2) with those of the sum, unless it is None.
    """
    first, second = (*residuals, None, None)[:2]
    bias, second_bias = (*biases, None, None)[:2]
    views = [_view(residual) for residual in residuals]
    missing = _View((0, 0, 0, 0), "none", "flat", 1)
    to_first, to_second = (*views, missing, missing)[:2]
    (part,) = _parts(y, None)
    n, c, height, width = y.shape
    chunk = part.chunk(sums=statistics is not None)
    grid, tiling, options = part.tiling(chunk, *views)
    partials = None
    if statistics is not None:
        partials = y.new_empty((3, n, tiling[0], c), dtype=accumulate_dtype(y.dtype))
    with on_device(y):
        residual_add_kernel[grid](
            y, first, second, bias, second_bias, partials, *part.view.strides, *to_first.strides, *to_second.strides,
            _step(bias), _step(second_bias), *part.sizes(*views), *tiling, **part.view.constants("Y"),
            **to_first.constants("FIRST"), **to_second.constants("SECOND"), **options, enable_fp_fusion=False,
        )  # fmt: skip
    if partials is not None and statistics is not None:
        channel_statistics(partials, statistics, height * width, chunk)


def channel_statistics(partials: Tensor, statistics: Tensor, pixels: int, chunk: int) -> None:
    """Fills `statistics` (N, C, 2), the mean and variance of each channel, from `partials` (3, N, chunks, C).

    Args:
        pixels: number of pixels per image.
        chunk: number of pixels per chunk; the last one may have fewer.
    """
    _, n, chunks, channels = partials.shape
    with on_device(partials):
        channel_statistics_kernel[grid_of(n * triton.cdiv(channels, 16))](
            partials, statistics, n, channels, pixels, chunks, chunk,
            ROWS=32, BLOCK=16, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    grad_x: Tensor,
    grad_skip: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    num_groups: int,
) -> None:
    """Fills the gradients that are not None."""
    n, channels, height, width = grad.shape
    parts = _parts(x, skip)
    chunk = min(part.chunk(sums=True) for part in parts)
    chunks = triton.cdiv(height * width, chunk)
    groups = (num_groups, channels // num_groups)
    steps = (_step(weight), _step(bias))
    dtype = accumulate_dtype(x.dtype)
    partials = x.new_empty((2, n, chunks, channels), dtype=dtype)
    totals = x.new_empty((2, n, channels), dtype=torch.float64)
    coefficients = x.new_empty((n, num_groups, 2), dtype=dtype)
    block = 4 if groups[1] <= 4 else 16
    inputs = []
    for part in parts:
        incoming = grad.narrow(1, part.first, part.x.shape[1])
        view = _view(incoming)
        constants = part.view.constants("X") | view.constants("GRAD")
        inputs.append((part, incoming, view, constants))
    with on_device(x):
        for part, incoming, view, constants in inputs:
            grid, tiling, options = part.tiling(chunk, view)
            group_norm_silu_sums_kernel[grid](
                part.x, incoming, weight, bias, stats, partials, *part.view.strides, *view.strides, *steps,
                *part.sizes(view), channels, *groups, *tiling, **constants, **options, enable_fp_fusion=False,
            )  # fmt: skip
        group_norm_silu_sums_join_kernel[grid_of(n * num_groups)](
            partials, weight, stats, totals, coefficients, steps[0], n, channels, height * width, *groups, chunks,
            ROWS=512 // block, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        if grad_weight is not None or grad_bias is not None:
            group_norm_silu_parameters_kernel[(triton.cdiv(channels, 16),)](
                totals, grad_weight, grad_bias, n, channels,
                ROWS=32, BLOCK=16, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        for part, incoming, view, constants in inputs:
            out = grad_x if part.x is x else grad_skip
            if out is None:
                continue
            to = _view(out)
            grid, tiling, options = part.tiling(part.chunk(sums=False), view, to)
            group_norm_silu_grad_kernel[grid](
                part.x, incoming, weight, bias, stats, coefficients, out, *part.view.strides, *view.strides,
                *to.strides, *steps, *part.sizes(view, to), *groups, *tiling, **constants, **to.constants("OUT"),
                **options, enable_fp_fusion=True,
            )  # fmt: skip
