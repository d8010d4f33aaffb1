"""The 3x3 convolution in Triton: an implicit matrix product on tensor cores, for CUDA devices and the interpreter.

A program computes a tile of (pixels, output channels) of one image. Its loop takes one of the nine taps and a block of
input channels at a time: the rows of the left factor are the pixels that the tap sees, so that no matrix of patches is
ever in memory. Normalisation and SiLU are applied to the left factor after it was loaded, which repeats them for each
tap and each tile of output channels but saves a pass over memory. Zeros replace what lies outside of the image after
that, because the padding belongs to the normalised image. A second input, the skip of a U-Net, has a loop of its own
after that of the first, so that their concatenation is never in memory either. Bias and residual are added in float32,
and the result is rounded once. The tile is still in registers then, and its partial statistics cost no pass over
memory.
"""

# Triton types the kernels, and a name may have different types where a branch is compiled away.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from litevae_kernels.triton_support import grid_of, kernel, on_device, program_index

TILE_P = 128  # pixels, twice the 64 rows of a warp group's instruction


@triton.jit
def add_channels(
    total, x, x_n, x_h, x_w, first, channels, weight, affine, n, row, column, inside, output, has_output,
    batch, height, columns, inputs, SILU: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Returns total (pixels, outputs) and what the channels of x add, the `first` of which is one of `inputs`.

    The pixels at (row, column) are those of image n. All sizes and strides are in elements.
    """
    place = x + (n * x_n + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w)
    filters = weight + output * (9 * inputs) + first
    if affine is not None:
        affine += n * inputs + first
    for step in range(0, 9 * tl.cdiv(channels, TILE_C).to(tl.int32)):
        tap = step % 9
        up = tap // 3 - 1
        left = tap % 3 - 1
        channel = step // 9 * TILE_C + tl.arange(0, TILE_C)
        has_channel = channel < channels
        r = row + up
        c = column + left
        seen = inside & (r >= 0) & (r < height) & (c >= 0) & (c < columns)
        mask = seen[:, None] & has_channel[None, :]
        a = tl.load(place[:, None] + (up * x_h + left * x_w) + channel[None, :], mask=mask, other=0)
        b = tl.load(
            filters[None, :] + tap * inputs + channel[:, None],
            mask=has_channel[:, None] & has_output[None, :], other=0,
        )  # fmt: skip
        if affine is not None or SILU:
            z = a.to(tl.float32)
            if affine is not None:
                at = affine + channel
                high = tl.load(at, mask=has_channel, other=0)[None, :]
                slope = tl.load(at + batch * inputs, mask=has_channel, other=0)[None, :]
                offset = tl.load(at + 2 * batch * inputs, mask=has_channel, other=0)[None, :]
                z = tl.fma(z - high, slope, offset)
            if SILU:
                z = z / (1 + tl.exp(-z))
            a = tl.where(mask, z, 0).to(weight.dtype.element_ty)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _store_tile_partials(partials, value, mask, valid, tile, output, has_output, tiles, outputs):
    """Writes the partials (3, batch, chunks, outputs) of a tile (pixels, outputs), as GroupNorm's kernels read them.

    They are the first pixel's value, the mean minus it, and the sum of squares about the mean. All values are at hand,
    so that the squares need no other shift than the mean.
    """
    first = (tl.arange(0, value.shape[0]) == 0)[:, None]
    reference = tl.sum(tl.where(first, value, 0), 0)
    change = tl.where(mask, value - reference[None, :], 0)
    mean = tl.sum(change, 0) / valid.to(tl.float32)
    apart = tl.where(mask, change - mean[None, :], 0)
    squares = tl.sum(apart * apart, 0)
    out = partials + (tile * outputs + output)
    plane = tiles * outputs
    tl.store(out, reference, mask=has_output)
    tl.store(out + plane, mean, mask=has_output)
    tl.store(out + 2 * plane, squares, mask=has_output)


@kernel("affine", "bias", "partials")
def conv3x3_kernel(
    x, skip, weight, affine, bias, residual, y, partials,
    x_n: tl.int64, x_h: tl.int64, x_w: tl.int64, skip_n: tl.int64, skip_h: tl.int64, skip_w: tl.int64,
    residual_n: tl.int64, residual_h: tl.int64, residual_w: tl.int64,
    bias_c: tl.int64, batch: tl.int64, height: tl.int64, width: tl.int64,
    channels: tl.int64, skip_channels: tl.int64, outputs: tl.int64,
    IN_VEC: tl.constexpr, OUT_VEC: tl.constexpr, SILU: tl.constexpr,
    TILE_P: tl.constexpr, TILE_O: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Writes y (batch, height, width, outputs), the convolution of x and skip with weight.

    The weight is (outputs, 3, 3, inputs), and the channels of the skip follow those of x. The numbers of channels and
    the strides of x and skip are in units of IN_VEC, and `outputs` and the strides of the residual in units of OUT_VEC.
    `affine` (3, batch, inputs) normalises x and skip. Unless partials is None, it gets those of y.
    """
    channels *= IN_VEC
    inputs = channels + skip_channels * IN_VEC
    outputs *= OUT_VEC
    pixels = (height * width).to(tl.int32)
    height = height.to(tl.int32)
    columns = width.to(tl.int32)
    program = program_index()
    across = tl.cdiv(outputs, TILE_O)
    down = tl.cdiv(pixels, TILE_P)
    n = program // across // down
    if n >= batch:
        return
    # neighbours share pixels, which are then in the cache
    output = program % across * TILE_O + tl.arange(0, TILE_O)
    pixel = (program // across % down * TILE_P).to(tl.int32) + tl.arange(0, TILE_P)
    row = pixel // columns
    column = pixel - row * columns
    inside = pixel < pixels
    has_output = output < outputs
    total = tl.zeros((TILE_P, TILE_O), tl.float32)
    total = add_channels(
        total, x, x_n * IN_VEC, x_h * IN_VEC, x_w * IN_VEC, 0, channels, weight, affine,
        n, row, column, inside, output, has_output, batch, height, columns, inputs, SILU, TILE_C,
    )  # fmt: skip
    if skip is not None:
        total = add_channels(
            total, skip, skip_n * IN_VEC, skip_h * IN_VEC, skip_w * IN_VEC, channels, skip_channels * IN_VEC,
            weight, affine, n, row, column, inside, output, has_output, batch, height, columns, inputs, SILU, TILE_C,
        )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + output * bias_c, mask=has_output, other=0).to(tl.float32)[None, :]
    mask = inside[:, None] & has_output[None, :]
    if residual is not None:
        residual += n * (residual_n * OUT_VEC)
        at = row.to(tl.int64) * (residual_h * OUT_VEC) + column.to(tl.int64) * (residual_w * OUT_VEC)
        total += tl.load(residual + at[:, None] + output[None, :], mask=mask, other=0).to(tl.float32)
    to = (n * pixels + pixel) * outputs
    rounded = total.to(y.dtype.element_ty)
    tl.store(y + to[:, None] + output[None, :], rounded, mask=mask)
    if partials is not None:
        tile = program // across  # of all images
        valid = tl.minimum(pixels - (tile % down).to(tl.int32) * TILE_P, TILE_P)
        values = rounded.to(tl.float32)
        _store_tile_partials(
            partials, values, inside[:, None], valid, tile, output, has_output, batch * down, outputs
        )


def _vector(channels: int, *tensors: Tensor) -> int:
    """Returns the number of elements per access: a power of two that divides the channels and all other strides."""
    bits = 16 // tensors[0].element_size() | channels
    for x in tensors:
        if x.data_ptr() % 16:
            return 1
        for i in (0, 2, 3):
            bits |= x.stride(i) if x.shape[i] > 1 else 0
    return bits & -bits


def _steps(x: Tensor | None, vector: int) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    # The stride of an axis of one element is arbitrary.
    n, h, w = (0 if x.shape[i] == 1 else x.stride(i) // vector for i in (0, 2, 3))
    return n, h, w


def empty_partials(y: Tensor) -> Tensor:
    """Returns memory for the partial statistics (3, N, chunks, C_out) of `y` (N, C_out, H, W)."""
    n, outputs, height, width = y.shape
    return y.new_empty((3, n, triton.cdiv(height * width, TILE_P), outputs), dtype=torch.float32)


def forward(
    x: Tensor,
    skip: Tensor | None,
    affine: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_input: bool,
    y: Tensor,
    partials: Tensor | None = None,
) -> None:
    """Fills `y` (N, C_out, H, W), whose memory format is channels_last, and unless it is None `partials`.

    Args:
        x: (N, C, H, W) with adjacent channels, of at most 2^30 pixels per image.
        skip: (N, C_skip, H, W) in x's dtype with adjacent channels, which follow those of x.
        affine: float32 (3, N, C + C_skip) from the norm's `coefficients_of`: the convolution sees
            (x - first) second + third.
        weight: (C_out, 3, 3, C + C_skip), contiguous, in x's dtype.
        bias: (C_out) in any dtype.
        residual: (N, C_out, H, W) in x's dtype with adjacent channels.
        silu_input: whether the convolution sees the SiLU of that.
        partials: result of `empty_partials`, for the norm's `channel_statistics`; its chunks have TILE_P pixels.
    """
    n, channels, height, width = x.shape
    skip_channels, outputs = 0 if skip is None else skip.shape[1], y.shape[1]
    # A wide tile of outputs normalises each pixel less often, even where it computes outputs that do not exist.
    tile_o, tile_c = (
        min(most, max(16, triton.next_power_of_2(size)))
        for size, most in ((outputs, 128), (max(channels, skip_channels), 32))
    )
    inputs = [x] if skip is None else [x, skip]
    in_vec = _vector(channels | skip_channels, *inputs, weight.permute(0, 3, 1, 2))
    out_vec = _vector(outputs, y, *([] if residual is None else [residual]))
    programs = n * triton.cdiv(height * width, TILE_P) * triton.cdiv(outputs, tile_o)
    with on_device(x):
        conv3x3_kernel[grid_of(programs)](
            x, skip, weight, affine, bias, residual, y, partials,
            *_steps(x, in_vec), *_steps(skip, in_vec), *_steps(residual, out_vec),
            0 if bias is None else bias.stride(0), n, height, width,
            channels // in_vec, skip_channels // in_vec, outputs // out_vec,
            IN_VEC=in_vec, OUT_VEC=out_vec, SILU=silu_input, TILE_P=TILE_P, TILE_O=tile_o, TILE_C=tile_c,
            num_warps=8, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
