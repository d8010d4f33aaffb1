"""Self-modulated weights in Triton: any CUDA device, and the CPU under Triton's interpreter.

Both functions fill tensors that the caller allocated, and take any strides. A program normalises one filter, whose
elements it visits in the order of the output. The gradient of the scales is a sum over filters: first within blocks
of filters, then over the blocks, so that the same inputs give the same bits.

Sizes and strides are single arguments and not tuples, because Triton specialises every integer in a tuple, whatever
`do_not_specialize` says, and would compile new kernels for each new size.
"""

# Triton gives kernels their types, and may give a name another type if a branch is compiled away.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from litevae_kernels.triton_support import grid_of, kernel, on_device, program_index

BLOCK = 8192  # elements of a filter that fit in registers
TILE = 1024  # filters times channels per program that sums the scales' gradient


@triton.jit
def _element(j, inputs, KERNEL: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """Returns the input channel and the tap of a filter's element j, in the type of j."""
    if CHANNELS_INNER:
        tap = j // inputs.to(j.dtype)
        channel = j - tap * inputs.to(j.dtype)
    else:
        channel = j // KERNEL
        tap = j - channel * KERNEL
    return channel, tap


@triton.jit
def _at(o, channel, tap, j, s_o, s_i, s_h, s_w, KERNEL_W: tl.constexpr, VEC: tl.constexpr):
    """Returns the offset of an element, in int64.

    If VEC > 0, the elements of a filter are in order, and filters begin at multiples of VEC.
    """
    if VEC > 0:
        at = o * (s_o * VEC) + j
    else:
        row = tap // KERNEL_W
        col = tap - row * KERNEL_W
        at = o * s_o + channel.to(tl.int64) * s_i + row.to(tl.int64) * s_h + col.to(tl.int64) * s_w
    return at


@triton.jit
def _scaled(
    weight, scale, o, j, mask, inputs, group_filters, weight_o, weight_i, weight_h, weight_w, scale_i,
    KERNEL: tl.constexpr, KERNEL_W: tl.constexpr, CHANNELS_INNER: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Returns scale[i] w[o,i,k] of elements j, and scale[i]."""
    channel, tap = _element(j, inputs, KERNEL, CHANNELS_INNER)
    at = _at(o, channel, tap, j, weight_o, weight_i, weight_h, weight_w, KERNEL_W, VEC)
    w = tl.load(weight + at, mask=mask, other=0).to(ACC)
    s = tl.load(scale + (o // group_filters * inputs + channel) * scale_i, mask=mask, other=0).to(ACC)
    return w * s, s


@triton.jit
def _store(pointer, value, mask):
    """Stores values. 16-bit types are rounded through float32, as PyTorch's conversions from float64 are."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(pointer, value, mask=mask)


@kernel("scale", "gain", "norm")
def modulate_weight_kernel(
    weight, scale, gain, modulated, norm,
    weight_o: tl.int64, weight_i: tl.int64, weight_h: tl.int64, weight_w: tl.int64,
    scale_i: tl.int64,
    out_o: tl.int64, out_i: tl.int64, out_h: tl.int64, out_w: tl.int64,
    norm_o: tl.int64, filters: tl.int64, inputs: tl.int64, group_filters: tl.int64, count: tl.int64,
    EPS: tl.constexpr, KERNEL: tl.constexpr, KERNEL_W: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    WEIGHT_VEC: tl.constexpr, OUT_VEC: tl.constexpr, COUNT_VEC: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes modulated (filters, inputs, taps) and norm (filters); a filter has `count` times COUNT_VEC elements."""
    o = program_index()
    if o >= filters:
        return
    count = (count * COUNT_VEC).to(INDEX)
    lane = tl.arange(0, BLOCK).to(INDEX)
    squares = tl.zeros((BLOCK,), ACC)
    if WHOLE:
        value, _ = _scaled(
            weight, scale, o, lane, lane < count, inputs, group_filters, weight_o, weight_i, weight_h, weight_w,
            scale_i, KERNEL, KERNEL_W, CHANNELS_INNER, WEIGHT_VEC, ACC,
        )  # fmt: skip
        squares = value * value
    else:
        for start in range(0, count, BLOCK):
            j = start + lane
            v, _ = _scaled(
                weight, scale, o, j, j < count, inputs, group_filters, weight_o, weight_i, weight_h, weight_w,
                scale_i, KERNEL, KERNEL_W, CHANNELS_INNER, WEIGHT_VEC, ACC,
            )  # fmt: skip
            squares = tl.fma(v, v, squares)
    length = tl.sqrt(tl.sum(squares, 0))
    tl.store(norm + o * norm_o, length)
    factor = 1 / (length + EPS)
    if gain is not None:
        factor *= tl.load(gain).to(ACC)
    if WHOLE:
        channel, tap = _element(lane, inputs, KERNEL, CHANNELS_INNER)
        at = _at(o, channel, tap, lane, out_o, out_i, out_h, out_w, KERNEL_W, OUT_VEC)
        _store(modulated + at, value * factor, lane < count)
    else:
        for start in range(0, count, BLOCK):  # The filter is read again, from the cache.
            j = start + lane
            v, _ = _scaled(
                weight, scale, o, j, j < count, inputs, group_filters, weight_o, weight_i, weight_h, weight_w,
                scale_i, KERNEL, KERNEL_W, CHANNELS_INNER, WEIGHT_VEC, ACC,
            )  # fmt: skip
            channel, tap = _element(j, inputs, KERNEL, CHANNELS_INNER)
            at = _at(o, channel, tap, j, out_o, out_i, out_h, out_w, KERNEL_W, OUT_VEC)
            _store(modulated + at, v * factor, j < count)


@kernel("scale", "gain", "norm", "factors")
def modulate_weight_grad_kernel(
    grad, weight, scale, gain, norm, grad_weight, factors,
    grad_o: tl.int64, grad_i: tl.int64, grad_h: tl.int64, grad_w: tl.int64,
    weight_o: tl.int64, weight_i: tl.int64, weight_h: tl.int64, weight_w: tl.int64,
    scale_i: tl.int64,
    out_o: tl.int64, out_i: tl.int64, out_h: tl.int64, out_w: tl.int64,
    norm_o: tl.int64, filters: tl.int64, inputs: tl.int64, group_filters: tl.int64, count: tl.int64,
    EPS: tl.constexpr, KERNEL: tl.constexpr, KERNEL_W: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    GRAD_VEC: tl.constexpr, WEIGHT_VEC: tl.constexpr, OUT_VEC: tl.constexpr, COUNT_VEC: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes grad_weight and factors (3, filters).

    The gradient of v = scale w is factors[0] grad - factors[1] v; factors[2] is a filter's part of the gain's gradient.
    """
    o = program_index()
    if o >= filters:
        return
    count = (count * COUNT_VEC).to(INDEX)
    lane = tl.arange(0, BLOCK).to(INDEX)
    products = tl.zeros((BLOCK,), ACC)
    for start in range(0, count, BLOCK):
        j = start + lane
        v, s = _scaled(
            weight, scale, o, j, j < count, inputs, group_filters, weight_o, weight_i, weight_h, weight_w,
            scale_i, KERNEL, KERNEL_W, CHANNELS_INNER, WEIGHT_VEC, ACC,
        )  # fmt: skip
        channel, tap = _element(j, inputs, KERNEL, CHANNELS_INNER)
        at = _at(o, channel, tap, j, grad_o, grad_i, grad_h, grad_w, KERNEL_W, GRAD_VEC)
        products = tl.fma(v, tl.load(grad + at, mask=j < count, other=0).to(ACC), products)
    dot = tl.sum(products, 0)
    length = tl.load(norm + o * norm_o)
    slope = 1 / (length + EPS)
    share = dot * slope
    factor = slope
    if gain is not None:
        factor *= tl.load(gain).to(ACC)
    # dot / length is at most |grad|, so this order avoids overflow.
    along = tl.where(length > 0, dot / tl.where(length > 0, length, 1), 0) * slope * factor
    tl.store(factors + o, factor)
    tl.store(factors + filters + o, along)
    tl.store(factors + 2 * filters + o, share)
    for start in range(0, count, BLOCK):
        j = start + lane
        v, s = _scaled(
            weight, scale, o, j, j < count, inputs, group_filters, weight_o, weight_i, weight_h, weight_w,
            scale_i, KERNEL, KERNEL_W, CHANNELS_INNER, WEIGHT_VEC, ACC,
        )  # fmt: skip
        channel, tap = _element(j, inputs, KERNEL, CHANNELS_INNER)
        at = _at(o, channel, tap, j, grad_o, grad_i, grad_h, grad_w, KERNEL_W, GRAD_VEC)
        g = tl.load(grad + at, mask=j < count, other=0).to(ACC)
        at = _at(o, channel, tap, j, out_o, out_i, out_h, out_w, KERNEL_W, OUT_VEC)
        _store(grad_weight + at, s * tl.fma(factor, g, -along * v), j < count)


@kernel("grad", "weight", "scale", "factors", "partials")
def modulate_weight_scales_kernel(
    grad, weight, scale, factors, partials,
    grad_o: tl.int64, grad_i: tl.int64, grad_h: tl.int64, grad_w: tl.int64,
    weight_o: tl.int64, weight_i: tl.int64, weight_h: tl.int64, weight_w: tl.int64,
    scale_i: tl.int64, filters: tl.int64, inputs: tl.int64, group_filters: tl.int64, blocks: tl.int64,
    KERNEL: tl.constexpr, KERNEL_W: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Writes partials (blocks, groups * inputs): sums of w d/dv over ROWS filters of a group and their taps."""
    program = program_index()
    across = tl.cdiv(inputs, COLS)
    i = program % across * COLS + tl.arange(0, COLS)
    block = program // across % blocks
    group = program // across // blocks
    if group * group_filters >= filters:
        return
    inside = block * ROWS + tl.arange(0, ROWS)
    o = (group * group_filters + inside)[:, None]
    has_filter = inside[:, None] < group_filters
    mask = has_filter & (i < inputs)[None, :]
    factor = tl.load(factors + o, mask=has_filter, other=0)
    along = tl.load(factors + filters + o, mask=has_filter, other=0)
    at = group * inputs + i
    s = tl.load(scale + at * scale_i, mask=i < inputs, other=0).to(ACC)[None, :]
    total = tl.zeros((ROWS, COLS), ACC)
    for tap in range(KERNEL):
        row = tap // KERNEL_W
        col = tap % KERNEL_W
        here = weight + (o * weight_o + i[None, :] * weight_i + (row * weight_h + col * weight_w))
        w = tl.load(here, mask=mask, other=0).to(ACC)
        there = grad + (o * grad_o + i[None, :] * grad_i + (row * grad_h + col * grad_w))
        g = tl.load(there, mask=mask, other=0).to(ACC)
        total = tl.fma(w, tl.fma(factor, g, -along * (s * w)), total)
    out = partials + block * (filters // group_filters * inputs)
    tl.store(out + at, tl.sum(total, 0), mask=i < inputs)


@kernel("partials", "out")
def modulate_weight_sum_kernel(
    partials, out, rows: tl.int64, cols: tl.int64, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):
    """Writes out (cols), the sums of partials (rows, cols)."""
    col = program_index() * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        total += tl.load(partials + (row[:, None] * cols + col[None, :]), mask=mask, other=0)
    _store(out + col, tl.sum(total, 0), col < cols)


def _vector(x: Tensor, channels_inner: bool) -> int:
    """Returns the number of elements per access if filters are dense and in the kernel's order, else 0."""
    _, c, height, width = x.shape
    strides = (1, width * c, c) if channels_inner else (height * width, width, 1)
    for size, stride, dense in zip(x.shape[1:], x.stride()[1:], strides, strict=True):
        if size > 1 and stride != dense:
            return 0
    if x.data_ptr() % 16:
        return 1
    bits = 16 // x.element_size() | c * height * width | (x.stride(0) if x.shape[0] > 1 else 0)
    return bits & -bits


def _strides(x: Tensor, vector: int) -> tuple[int, int, int, int]:
    s_o, s_i, s_h, s_w = x.stride()
    return s_o // max(vector, 1), s_i, s_h, s_w


def _order(
    weight: Tensor, scale: Tensor, out: Tensor, norm: Tensor, eps: float
) -> tuple[tuple[int, ...], Any]:
    """Returns sizes and options that the kernels of whole filters share; they visit a filter in the order of `out`."""
    filters, inputs, height, width = weight.shape
    count = inputs * height * width
    vector = 16 | count
    vector &= -vector
    options = {
        "EPS": eps,
        "KERNEL": height * width,
        "KERNEL_W": width,
        "CHANNELS_INNER": inputs > 1 and out.stride(1) == 1 and height * width > 1,
        "COUNT_VEC": vector,
        "INDEX": tl.int32 if count < 2**30 else tl.int64,
        "ACC": tl.float64 if norm.dtype == torch.float64 else tl.float32,
        "num_warps": 8 if count > 1024 else 4,
        "enable_fp_fusion": False,
    }
    return (filters, inputs, filters * inputs // scale.numel(), count // vector), options


def forward(
    weight: Tensor, scale: Tensor, gain: Tensor | None, modulated: Tensor, norm: Tensor, eps: float
) -> None:
    """Fills `modulated` (C_out, C_in / groups, K_h, K_w) and `norm` (C_out)."""
    sizes, options = _order(weight, scale, modulated, norm, eps)
    vectors = [_vector(x, options["CHANNELS_INNER"]) for x in (weight, modulated)]
    count = weight[0].numel()
    block = min(triton.next_power_of_2(count), BLOCK)
    with on_device(weight):
        modulate_weight_kernel[grid_of(weight.shape[0])](
            weight, scale, gain, modulated, norm, *_strides(weight, vectors[0]), scale.stride(0),
            *_strides(modulated, vectors[1]), norm.stride(0), *sizes,
            WEIGHT_VEC=vectors[0], OUT_VEC=vectors[1], BLOCK=block, WHOLE=count <= block, **options,
        )  # fmt: skip


def backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    norm: Tensor,
    grad_weight: Tensor,
    grad_scale: Tensor,
    grad_gain: Tensor | None,
    eps: float,
) -> None:
    """Fills the gradients; `grad_gain` is None if `gain` is."""
    sizes, options = _order(weight, scale, grad_weight, norm, eps)
    filters, inputs, group_filters, _ = sizes
    vectors = [_vector(x, options["CHANNELS_INNER"]) for x in (grad, weight, grad_weight)]
    block = min(triton.next_power_of_2(weight[0].numel()), BLOCK // 4)
    cols = min(triton.next_power_of_2(inputs), 64)
    rows = min(triton.next_power_of_2(group_filters), max(TILE // cols, 1))
    blocks = triton.cdiv(group_filters, rows)
    factors = torch.empty((3, filters), dtype=norm.dtype, device=norm.device)
    partials = torch.empty((blocks, scale.numel()), dtype=norm.dtype, device=norm.device)
    acc = options["ACC"]
    with on_device(weight):
        modulate_weight_grad_kernel[grid_of(filters)](
            grad, weight, scale, gain, norm, grad_weight, factors, *_strides(grad, vectors[0]),
            *_strides(weight, vectors[1]), scale.stride(0), *_strides(grad_weight, vectors[2]), norm.stride(0), *sizes,
            GRAD_VEC=vectors[0], WEIGHT_VEC=vectors[1], OUT_VEC=vectors[2], BLOCK=block, **options,
        )  # fmt: skip
        groups = filters // group_filters
        modulate_weight_scales_kernel[grid_of(triton.cdiv(inputs, cols) * blocks * groups)](
            grad, weight, scale, factors, partials, *grad.stride(), *weight.stride(), scale.stride(0),
            filters, inputs, group_filters, blocks,
            KERNEL=options["KERNEL"], KERNEL_W=options["KERNEL_W"], ACC=acc, ROWS=rows, COLS=cols,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        modulate_weight_sum_kernel[grid_of(triton.cdiv(scale.numel(), 32))](
            partials, grad_scale, blocks, scale.numel(), ROWS=32, COLS=32, ACC=acc, enable_fp_fusion=False
        )
        if grad_gain is not None:
            modulate_weight_sum_kernel[(1, 1)](
                factors[2], grad_gain, filters, 1, ROWS=1024, COLS=1, ACC=acc, enable_fp_fusion=False
            )
