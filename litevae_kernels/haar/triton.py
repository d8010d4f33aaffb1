"""The Haar transform in Triton, for any CUDA device, and for the CPU under Triton's interpreter.

Both functions fill tensors that the caller allocated, and take any strides. Sizes that 2^levels divides are
transformed in fused passes of up to three levels. Odd sizes, and flat coefficients whose strides differ within a
level, are transformed level by level. Between passes LL stays in float32 (float64) and is never rounded to the
storage type.
"""

# Triton types the kernels, and a name may change its type where a branch is compiled away.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litevae_kernels.haar.shapes import extension_index, level_sizes
from litevae_kernels.triton_support import kernel, on_device

MAX_FUSED = 3
# Pixels times channels per thread where channels are innermost in memory: RGB at three levels. Triton would need a
# minute to compile more.
MAX_PACKED = 192
# Positions and threads per program: few, so that small calls use all multiprocessors. Threads that exchange vectors are
# one warp, which needs no shared memory for that.
BLOCK = 64
WARP = 32
# Elements of a row that a warp accesses as a whole. Longer rows would take too many registers.
MAX_WHOLE = tl.constexpr(16)


@triton.jit
def _unjoin(x, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Splits (BLOCK, VEC) into VEC tensors (BLOCK,), within each thread's registers."""
    if VEC == 2:
        x0, x1 = tl.split(x)
        out = (x0, x1)
    else:
        even, odd = tl.split(tl.reshape(x, (BLOCK, VEC // 2, 2)))
        evens = _unjoin(even, VEC // 2, BLOCK)
        odds = _unjoin(odd, VEC // 2, BLOCK)
        out = ()
        for i in tl.static_range(VEC // 2):
            out = out + (evens[i], odds[i])
    return out


@triton.jit
def _join(elements, FIRST: tl.constexpr, STEP: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Joins VEC elements (BLOCK,), which are FIRST, FIRST + STEP, ..., to (BLOCK, VEC)."""
    if VEC == 2:
        out = tl.join(elements[FIRST], elements[FIRST + STEP])
    else:
        even = _join(elements, FIRST, 2 * STEP, VEC // 2, BLOCK)
        odd = _join(elements, FIRST + STEP, 2 * STEP, VEC // 2, BLOCK)
        out = tl.reshape(tl.join(even, odd), (BLOCK, VEC))
    return out


@triton.jit
def _store(pointer, value, mask):
    """Stores a value; 16-bit types are rounded through float32, as in PyTorch's conversions from float64."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(pointer, value, mask=mask)


@triton.jit
def _piece(COUNT: tl.constexpr, VEC: tl.constexpr, TOGETHER: tl.constexpr):
    """Returns the elements per access to a row of COUNT elements, which is VEC unless threads work together.

    They do in accesses to a whole row, with the next power of two as its length, or to two vectors. Triton then makes
    neighbouring threads access adjacent vectors, or elements if no vectors are aligned, and exchange them. Alone, each
    thread of a warp would touch a part of other sectors of memory.
    """
    WHOLE: tl.constexpr = triton.next_power_of_2(COUNT)
    PAIR: tl.constexpr = 2 * VEC if VEC > 1 and COUNT % (2 * VEC) == 0 else VEC
    PIECE: tl.constexpr = (WHOLE if WHOLE <= MAX_WHOLE else PAIR) if TOGETHER else VEC
    return PIECE


@triton.jit
def _load_row(
    pointer, offsets, steps, mask, ACC: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns one row of every tile as tensors (BLOCK,), by column and then by lane.

    A lane is a channel, or a channel of a sub-band where one tensor holds all four.

    offsets: offset of the row's first element. steps: strides of rows (not used here), columns and lanes. PACKED:
    memory has the order of the result. VEC: elements per vector; more than 1 implies that they are adjacent.
    """
    RUNS: tl.constexpr = 1 if PACKED else LANES
    COUNT: tl.constexpr = COLS * LANES // RUNS
    PIECE: tl.constexpr = _piece(COUNT, VEC, PACKED)
    stored = ()
    for run in tl.static_range(RUNS):
        for i in tl.static_range(tl.cdiv(COUNT, PIECE)):
            if PIECE == 1:
                at = offsets + run * steps[2] + i * (1 if PACKED else steps[1])
                stored = stored + (tl.load(pointer + at, mask=mask),)
            else:
                within = tl.arange(0, PIECE)
                at = (offsets + run * steps[2] + i * PIECE)[:, None] + within[None, :]
                wanted = mask[:, None] & (within < COUNT)[None, :]
                values = _unjoin(tl.load(pointer + at, mask=wanted), PIECE, BLOCK)
                for j in tl.static_range(min(PIECE, COUNT)):
                    stored = stored + (values[j],)
    out = ()
    for col in tl.static_range(COLS):
        for lane in tl.static_range(LANES):
            out = out + (stored[col * LANES + lane if PACKED else lane * COLS + col].to(ACC),)
    return out


@triton.jit
def _store_row(
    pointer, offsets, steps, mask, row, COLS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr,
    TOGETHER: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores what `_load_row` loads. TOGETHER: threads store vectors together, as they do where rows are packed."""
    RUNS: tl.constexpr = 1 if PACKED else LANES
    COUNT: tl.constexpr = COLS * LANES // RUNS
    PIECE: tl.constexpr = _piece(COUNT, VEC, PACKED or (TOGETHER and VEC > 1))
    for _ in tl.static_range(PIECE - COUNT):
        row = row + (row[0],)  # never stored
    for run in tl.static_range(RUNS):
        for i in tl.static_range(tl.cdiv(COUNT, PIECE)):
            if PIECE == 1:
                at = offsets + run * steps[2] + i * (1 if PACKED else steps[1])
                _store(pointer + at, row[i * RUNS + run], mask)
            else:
                within = tl.arange(0, PIECE)
                at = (offsets + run * steps[2] + i * PIECE)[:, None] + within[None, :]
                wanted = mask[:, None] & (within < COUNT)[None, :]
                _store(pointer + at, _join(row, i * PIECE * RUNS + run, RUNS, PIECE, BLOCK), wanted)


@triton.jit
def _butterfly(a, b, c, d, factor):
    """Transforms the pixels a b / c d to LL, H, V, D. It is its own adjoint."""
    left = a + c  # rows before columns, as in the core
    right = b + d
    left_change = a - c
    right_change = b - d
    return (
        (left + right) * factor,
        (left_change + right_change) * factor,
        (left - right) * factor,
        (left_change - right_change) * factor,
    )


@triton.jit
def _zeros(COUNT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Returns COUNT tensors (BLOCK,) of zeros."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((BLOCK,), ACC),)
    return out


@triton.jit
def _analyse(
    image, bands, places, mask, row, LEVEL: tl.constexpr, factor, ACC: tl.constexpr,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, IMAGE_PACKED: tl.constexpr, BANDS_PACKED: tl.constexpr,
    STACKED: tl.constexpr, VECS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns a row of the tile in LEVEL's LL (level 0: the image), and stores all sub-bands on the way."""
    COLS: tl.constexpr = TILE >> LEVEL
    offsets = places[LEVEL][0] + row * places[LEVEL][1][0]
    steps = places[LEVEL][1]
    if LEVEL == 0:
        ll = _load_row(image, offsets, steps, mask, ACC, COLS, CHANNELS, IMAGE_PACKED, VECS[0], BLOCK)
    else:
        if CHANNELS > 1 and LEVEL > 1:
            upper = _zeros(2 * COLS * CHANNELS, ACC, BLOCK)
            # Zeros of its own: Triton takes two names of one tuple for one variable of the loop.
            lower = _zeros(2 * COLS * CHANNELS, ACC, BLOCK)
            # This is a loop because Triton's compile time grows with the square of the number of accesses.
            for half in range(2):
                upper = lower
                lower = _analyse(image, bands, places, mask, 2 * row + half, LEVEL - 1, factor, ACC, TILE, CHANNELS,
                                 IMAGE_PACKED, BANDS_PACKED, STACKED, VECS, BLOCK)  # fmt: skip
        else:
            upper = _analyse(image, bands, places, mask, 2 * row, LEVEL - 1, factor, ACC, TILE, CHANNELS, IMAGE_PACKED,
                             BANDS_PACKED, STACKED, VECS, BLOCK)  # fmt: skip
            lower = _analyse(image, bands, places, mask, 2 * row + 1, LEVEL - 1, factor, ACC, TILE, CHANNELS,
                             IMAGE_PACKED, BANDS_PACKED, STACKED, VECS, BLOCK)  # fmt: skip
        ll = ()
        quads = ()
        for col in tl.static_range(COLS):
            for channel in tl.static_range(CHANNELS):
                quad = _butterfly(
                    upper[2 * col * CHANNELS + channel],
                    upper[(2 * col + 1) * CHANNELS + channel],
                    lower[2 * col * CHANNELS + channel],
                    lower[(2 * col + 1) * CHANNELS + channel],
                    factor,
                )
                ll = ll + (quad[0],)
                quads = quads + (quad,)
        PER_TENSOR: tl.constexpr = 4 if STACKED else 1
        for first in tl.static_range(0, 4, PER_TENSOR):
            pointer = bands[((LEVEL - 1) * 4 + first) // PER_TENSOR]
            if pointer is not None:
                stored = ()
                for col in tl.static_range(COLS):
                    for band in tl.static_range(first, first + PER_TENSOR):
                        for channel in tl.static_range(CHANNELS):
                            stored = stored + (quads[col * CHANNELS + channel][band],)
                _store_row(pointer, offsets, steps, mask, stored, COLS, PER_TENSOR * CHANNELS, BANDS_PACKED,
                           False, VECS[LEVEL], BLOCK)  # fmt: skip
    return ll


@triton.jit
def _synthesise(
    image, bands, places, mask, coarser, row, LEVEL: tl.constexpr, factor,
    ACC: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, IMAGE_PACKED: tl.constexpr,
    BANDS_PACKED: tl.constexpr, STACKED: tl.constexpr, VECS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores all pixels under a row of the tile in LEVEL's LL (level 0: the image).

    coarser: the row that the coarser levels add to LEVEL's LL; empty if there is none.
    """
    COLS: tl.constexpr = TILE >> LEVEL
    offsets = places[LEVEL][0] + row * places[LEVEL][1][0]
    steps = places[LEVEL][1]
    if LEVEL == 0:
        _store_row(image, offsets, steps, mask, coarser, COLS, CHANNELS, IMAGE_PACKED, True, VECS[0], BLOCK)
    else:
        PER_TENSOR: tl.constexpr = 4 if STACKED else 1
        LANES: tl.constexpr = PER_TENSOR * CHANNELS
        rows = ()
        for first in tl.static_range(0, 4, PER_TENSOR):
            pointer = bands[((LEVEL - 1) * 4 + first) // PER_TENSOR]
            if pointer is not None:
                loaded = _load_row(
                    pointer, offsets, steps, mask, ACC, COLS, LANES, BANDS_PACKED, VECS[LEVEL], BLOCK
                )
            else:  # the LL of flat coefficients
                loaded = coarser
            rows = rows + (loaded,)
        quads = ()
        for col in tl.static_range(COLS):
            for channel in tl.static_range(CHANNELS):
                ll = rows[0][col * LANES + channel]
                if len(coarser) > 0 and bands[(LEVEL - 1) * 4 // PER_TENSOR] is not None:
                    ll = ll + coarser[col * CHANNELS + channel]
                quad = (ll,)
                for band in tl.static_range(1, 4):
                    quad = quad + (
                        rows[band // PER_TENSOR][col * LANES + band % PER_TENSOR * CHANNELS + channel],
                    )
                quads = quads + (_butterfly(quad[0], quad[1], quad[2], quad[3], factor),)
        halves = ()
        for half in tl.static_range(2):
            pixels = ()
            for col in tl.static_range(COLS):
                for side in tl.static_range(2):
                    for channel in tl.static_range(CHANNELS):
                        pixels = pixels + (quads[col * CHANNELS + channel][2 * half + side],)
            halves = halves + (pixels,)
        if CHANNELS > 1 and LEVEL > 1:
            finer = halves[0]
            for half in range(2):  # This is a loop for the same reason as in `_analyse`.
                _synthesise(image, bands, places, mask, finer, 2 * row + half, LEVEL - 1, factor, ACC, TILE, CHANNELS,
                            IMAGE_PACKED, BANDS_PACKED, STACKED, VECS, BLOCK)  # fmt: skip
                finer = halves[1]
        else:
            for half in tl.static_range(2):
                _synthesise(image, bands, places, mask, halves[half], 2 * row + half, LEVEL - 1, factor, ACC, TILE,
                            CHANNELS, IMAGE_PACKED, BANDS_PACKED, STACKED, VECS, BLOCK)  # fmt: skip


@triton.jit
def _position(
    count, channels, rows, cols, CHANNELS_INNER: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns BLOCK consecutive positions (n, channel, row, col) in int64, and a mask of those that exist.

    Divisions use int32 unless WIDE, because int64 divisions are slow.
    """
    dtype: tl.constexpr = tl.int64 if WIDE else tl.int32
    index = tl.program_id(0).to(dtype) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.cast(channels, dtype)
    rows = tl.cast(rows, dtype)
    cols = tl.cast(cols, dtype)
    mask = index < count
    if CHANNELS_INNER:
        rest = index // channels
        channel = index - rest * channels
        above = rest // cols
        col = rest - above * cols
        n = above // rows
        row = above - n * rows
    else:
        above = index // cols
        col = index - above * cols
        plane = above // rows
        row = above - plane * rows
        n = plane // channels
        channel = plane - n * channels
    return (n.to(tl.int64), channel.to(tl.int64), row.to(tl.int64), col.to(tl.int64)), mask


@triton.jit
def _offset(position, strides, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns the offset of the first element of each block of ROWS x COLS elements."""
    n, channel, row, col = position
    return n * strides[0] + channel * strides[1] + row * (ROWS * strides[2]) + col * (COLS * strides[3])


@triton.jit
def _places(
    position, strides, channels, LEVELS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
    IMAGE_PACKED: tl.constexpr, BANDS_PACKED: tl.constexpr, STACKED: tl.constexpr, VECS: tl.constexpr,
):  # fmt: skip
    """Returns the tile's offset and its strides of rows, columns and lanes, in the image and in each level."""
    out = ()
    for level in tl.static_range(LEVELS + 1):
        n, c, h, w = strides[level]
        # All strides except the column's are in units of the vector width.
        n, c, h = n * VECS[level], c * VECS[level], h * VECS[level]
        if IMAGE_PACKED if level == 0 else BANDS_PACKED:
            w = 4 * CHANNELS if STACKED and level > 0 else CHANNELS
        elif VECS[level] > 1:
            w = 1  # a constant, so that Triton sees that accesses are vectors
        offset = _offset(position, (n, c, h, w), 1 << (LEVELS - level), TILE >> level)
        # Lanes are channels in one group of all channels, or the sub-bands of one channel.
        out = out + ((offset, (h, w, c * channels)),)
    return out


# Strides are single parameters. In a tuple Triton would compile the kernel again for integers that are 1, divisible
# by 16, or beyond 32 bits: `do_not_specialize` has no effect there.
@kernel("carry")
def haar_fused_kernel(
    image, bands, carry,
    image_n: tl.int64, image_c: tl.int64, image_h: tl.int64, image_w: tl.int64,
    n1: tl.int64, c1: tl.int64, h1: tl.int64, w1: tl.int64,
    n2: tl.int64, c2: tl.int64, h2: tl.int64, w2: tl.int64,
    n3: tl.int64, c3: tl.int64, h3: tl.int64, w3: tl.int64,
    carry_n: tl.int64, carry_c: tl.int64, carry_h: tl.int64, carry_w: tl.int64,
    tiles: tl.int64, channels: tl.int64, rows: tl.int64, cols: tl.int64, factor: tl.float64,
    ANALYSIS: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
    CHANNELS: tl.constexpr, IMAGE_PACKED: tl.constexpr, BANDS_PACKED: tl.constexpr,
    CARRY_PACKED: tl.constexpr, STACKED: tl.constexpr, VECS: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Transforms one tile per thread: 2^LEVELS rows, TILE columns and CHANNELS channels, two image rows at a time.

    ANALYSIS computes `bands` from `image`; otherwise the adjoint computes `image` from `bands`.

    image: (N, C, H, W). bands: sub-bands of levels 1 to LEVELS, each (N, C, H / 2^l, W / 2^l): LL, H, V and D, or
    if STACKED one tensor per level that holds all four. LL may be None: it is not stored, or is zero. carry: the last
    level's LL once more, or the share that coarser levels add to it; may be None. VECS: elements per access to the
    image and to each level. rows, cols, channels: numbers of rows and columns of tiles, and of groups of channels.
    """
    factor = tl.cast(factor, ACC)
    position, mask = _position(tiles, channels, rows, cols, CHANNELS_INNER, WIDE, BLOCK)
    strides = ((image_n, image_c, image_h, image_w), (n1, c1, h1, w1), (n2, c2, h2, w2), (n3, c3, h3, w3))
    places = _places(
        position, strides, channels, LEVELS, TILE, CHANNELS, IMAGE_PACKED, BANDS_PACKED, STACKED, VECS
    )
    COLS: tl.constexpr = TILE >> LEVELS
    at_carry = _offset(position, (carry_n, carry_c, carry_h, carry_w), 1, COLS)
    carry_steps = (carry_h, carry_w, carry_c)
    if ANALYSIS:
        ll = _analyse(image, bands, places, mask, 0, LEVELS, factor, ACC, TILE, CHANNELS, IMAGE_PACKED, BANDS_PACKED,
                      STACKED, VECS, BLOCK)  # fmt: skip
        if carry is not None:
            _store_row(carry, at_carry, carry_steps, mask, ll, COLS, CHANNELS, CARRY_PACKED, False, 1, BLOCK)
    else:
        coarser = ()
        if carry is not None:
            coarser = _load_row(
                carry, at_carry, carry_steps, mask, ACC, COLS, CHANNELS, CARRY_PACKED, 1, BLOCK
            )
        _synthesise(image, bands, places, mask, coarser, 0, LEVELS, factor, ACC, TILE, CHANNELS, IMAGE_PACKED,
                    BANDS_PACKED, STACKED, VECS, BLOCK)  # fmt: skip


@triton.jit
def _analyse_block(
    image, bands, strides, position, mask, height, width, extra_row, extra_col, factor,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stores the four coefficients of one 2x2 block."""
    n, channel, row, col = position
    image_n, image_c, image_h, image_w = strides[0]
    bottom = tl.where(2 * row + 1 < height, 2 * row + 1, extra_row)
    right = tl.where(2 * col + 1 < width, 2 * col + 1, extra_col)
    upper = image + (n * image_n + channel * image_c + 2 * row * image_h)
    lower = image + (n * image_n + channel * image_c + bottom * image_h)
    has_bottom = mask & (bottom >= 0)
    has_right = right >= 0
    pixel_a = tl.load(upper + 2 * col * image_w, mask=mask, other=0).to(ACC)
    pixel_b = tl.load(upper + right * image_w, mask=mask & has_right, other=0).to(ACC)
    pixel_c = tl.load(lower + 2 * col * image_w, mask=has_bottom, other=0).to(ACC)
    pixel_d = tl.load(lower + right * image_w, mask=has_bottom & has_right, other=0).to(ACC)
    quad = _butterfly(pixel_a, pixel_b, pixel_c, pixel_d, factor)
    for band in tl.static_range(5):
        if bands[band] is not None:
            _store(bands[band] + _offset(position, strides[1 + band], 1, 1), quad[band % 4], mask)


@triton.jit
def _synthesise_block(
    image, bands, strides, position, mask, height, width, extra_row, extra_col, factor,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the pixels of one 2x2 block.

    Pixels are pulled, so no atomics are needed: the block that holds row extra_row also adds the missing row's share,
    from the last row of coefficients; likewise for columns and for the corner.
    """
    n, channel, row, col = position
    last_row = (height + 1) // 2 - 1
    last_col = (width + 1) // 2 - 1
    zero = tl.zeros((BLOCK,), ACC)
    # Pixels from the block's own coefficients, and from those of the missing row, the missing column and the corner.
    shares = ()
    for source in tl.static_range(4):
        i = row
        j = col
        wanted = mask
        if source % 2 == 1:
            i = row * 0 + last_row
            wanted = wanted & (row == (extra_row >> 1))  # never, if extra_row is -1
        if source >= 2:
            j = col * 0 + last_col
            wanted = wanted & (col == (extra_col >> 1))
        loaded = ()
        for band in tl.static_range(5):
            if bands[band] is not None:
                at = _offset((n, channel, i, j), strides[1 + band], 1, 1)
                loaded = loaded + (tl.load(bands[band] + at, mask=wanted, other=0).to(ACC),)
            else:
                loaded = loaded + (zero,)
        ll = loaded[0]
        if bands[4] is not None:
            ll += loaded[4]
        shares = shares + (_butterfly(ll, loaded[1], loaded[2], loaded[3], factor),)
    first = image + _offset(position, strides[0], 2, 2)
    for y in tl.static_range(2):
        for x in tl.static_range(2):
            # The missing row is the lower one of its block, and the missing column the right one.
            in_row = (extra_row & 1) == y
            in_col = (extra_col & 1) == x
            pixel = shares[0][2 * y + x] + tl.where(in_row, shares[1][2 + x], zero)
            pixel += tl.where(in_col, shares[2][2 * y + 1], zero)
            pixel += tl.where(in_row & in_col, shares[3][3], zero)
            exists = mask & (2 * row + y < height) & (2 * col + x < width)
            _store(first + (y * strides[0][2] + x * strides[0][3]), pixel, exists)


@kernel("image", "bands")
def haar_level_kernel(
    image, bands,
    image_n: tl.int64, image_c: tl.int64, image_h: tl.int64, image_w: tl.int64,
    ll_n: tl.int64, ll_c: tl.int64, ll_h: tl.int64, ll_w: tl.int64,
    h_n: tl.int64, h_c: tl.int64, h_h: tl.int64, h_w: tl.int64,
    v_n: tl.int64, v_c: tl.int64, v_h: tl.int64, v_w: tl.int64,
    d_n: tl.int64, d_c: tl.int64, d_h: tl.int64, d_w: tl.int64,
    carry_n: tl.int64, carry_c: tl.int64, carry_h: tl.int64, carry_w: tl.int64,
    quads: tl.int64, channels: tl.int64, height: tl.int64, width: tl.int64,
    extra_row: tl.int64, extra_col: tl.int64, factor: tl.float64,
    ANALYSIS: tl.constexpr, ACC: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Transforms one level of any size; each thread does one 2x2 block.

    ANALYSIS computes `bands` from `image`; otherwise the adjoint computes `image` from `bands`.

    image: (N, C, height, width). bands: LL, H, V, D and the carry, each (N, C, ceil(height / 2), ceil(width / 2));
    LL and the carry may be None. The carry is LL once more, or the share that coarser levels add to it.
    extra_row, extra_col: index of the sample that replaces the missing one of an odd axis; -1: a zero does.
    """
    factor = tl.cast(factor, ACC)
    position, mask = _position(
        quads, channels, (height + 1) // 2, (width + 1) // 2, CHANNELS_INNER, WIDE, BLOCK
    )
    strides = (
        (image_n, image_c, image_h, image_w),
        (ll_n, ll_c, ll_h, ll_w),
        (h_n, h_c, h_h, h_w),
        (v_n, v_c, v_h, v_w),
        (d_n, d_c, d_h, d_w),
        (carry_n, carry_c, carry_h, carry_w),
    )
    if ANALYSIS:
        _analyse_block(
            image, bands, strides, position, mask, height, width, extra_row, extra_col, factor, ACC
        )
    else:
        _synthesise_block(image, bands, strides, position, mask, height, width, extra_row, extra_col, factor, ACC,
                          BLOCK)  # fmt: skip


def _power_of_two(*values: int) -> int:
    """Returns the largest power of two up to 16 that divides all values."""
    bits = 16
    for value in values:
        bits |= value
    return bits & -bits


def fused_levels(height: int, width: int, levels: int) -> int:
    """Returns the number of levels that one pass can do: 2^levels must divide both sizes."""
    count = 0
    while count < min(levels, MAX_FUSED) and (height | width) % (2 << count) == 0:
        count += 1
    return count


def tile_columns(width: int, levels: int, element_size: int, packed: bool) -> int:
    """Returns the columns per tile: whole 16-byte accesses where the registers suffice and the width allows it."""
    columns = 8 if packed else min(64 >> levels, 32 // element_size)
    columns = max(columns, 1 << levels)
    while width % columns != 0:
        columns //= 2
    return columns


def beyond_int32(count: int) -> bool:
    return count > 2**31 - 1


def _vector(x: Tensor, count: int, packed: bool) -> int:
    """Returns the elements per access to a row of `count`: contiguous, and aligned in every row of every tile."""
    n, c, h, w = x.stride()
    if (not packed and w != 1) or x.data_ptr() % 16 != 0:
        return 1
    others = (n, h) if packed else (n, c, h)
    return min(_power_of_two(count, *others), 16 // x.element_size())


def _packable(x: Tensor, lanes: int, count: int) -> bool:
    """Returns whether a row's `count` elements are adjacent, with `lanes` innermost, and few or aligned for vectors."""
    adjacent = x.stride(1) == 1 and x.stride(3) == lanes
    return adjacent and (count <= MAX_WHOLE.value or count % 2 == 1 or _vector(x, count, True) > 1)


def _in_units(strides: Sequence[int], vector: int) -> list[int]:
    """Divides all strides by the vector width, except the column's, which vectors imply."""
    return [stride if i == 3 else stride // vector for i, stride in enumerate(strides)]


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


Bands = tuple[Tensor | None, ...]


def _bands(coeffs: Sequence[Tensor], level: int, levels: int) -> Bands:
    """Returns LL, H, V, D of `level` in flat coefficients, which have an LL only for the last level."""
    first = 1 + 3 * (levels - level)
    return (coeffs[0] if level == levels else None, *coeffs[first : first + 3])


def _fused_level(coeffs: Sequence[Tensor], level: int, levels: int, stacked: bool) -> Bands | None:
    """Returns the level's sub-bands as the fused kernel takes them, or None if their strides differ."""
    if stacked:
        return (coeffs[level - 1],)
    bands = _bands(coeffs, level, levels)
    return bands if len({x.stride() for x in bands if x is not None}) == 1 else None


class _Pass(NamedTuple):
    """Levels first + 1 to last: the bands of each for the fused kernel, or none for one level of any size."""

    first: int
    fused: list[Bands]

    @property
    def last(self) -> int:
        return self.first + max(len(self.fused), 1)


def _passes(
    coeffs: Sequence[Tensor], sizes: Sequence[tuple[int, int]], levels: int, stacked: bool
) -> list[_Pass]:
    out: list[_Pass] = []
    level = 0
    while level < levels:
        fused: list[Bands] = []
        for i in range(fused_levels(*sizes[level], levels - level)):
            bands = _fused_level(coeffs, level + 1 + i, levels, stacked)
            if bands is None:
                break
            fused.append(bands)
        out.append(_Pass(level, fused))
        level = out[-1].last
    return out


def _launch(kernel: Any, block: int, positions: int, *args: Any, **constants: Any) -> None:
    kernel[(triton.cdiv(positions, block),)](
        *args,
        **constants,
        WIDE=beyond_int32(positions + block),
        BLOCK=block,
        num_warps=block // WARP,
        enable_fp_fusion=False,
    )


def _launch_fused(
    analysis: bool,
    image: Tensor,
    levels: list[Bands],
    carry: Tensor | None,
    scale: float,
    stacked: bool,
    acc: Any,
) -> None:
    n, c, height, width = image.shape
    count = len(levels)
    present = [[x for x in bands if x is not None] for bands in levels]
    # One thread takes all channels of a pixel where they are adjacent and few, and rows are contiguous.
    lanes = 4 * c if stacked else c
    tile = tile_columns(width, count, image.element_size(), True)
    few = c <= 4 and c * (tile << count) <= MAX_PACKED
    image_packed = few and c > 1 and _packable(image, c, tile * c)
    bands_packed = few and lanes > 1 and all(
        _packable(x, lanes, (tile >> i) * lanes) for i, bands in enumerate(present, 1) for x in bands
    )  # fmt: skip
    packed = image_packed or bands_packed
    channels = c if packed else 1
    tile = tile_columns(width, count, image.element_size(), packed)

    vectors = [_vector(image, tile * (c if image_packed else 1), image_packed)]
    strides = _in_units(image.stride(), vectors[0])
    for i, bands in enumerate(present, 1):
        row = (tile >> i) * (lanes if bands_packed else 1)
        vectors.append(min(_vector(x, row, bands_packed) for x in bands))
        strides += _in_units(bands[0].stride(), vectors[-1])
    strides += [0] * (4 * (MAX_FUSED - count))

    rows, cols = height >> count, width // tile
    tiles = n * (c // channels) * rows * cols
    _launch(
        haar_fused_kernel,
        WARP if packed or not analysis else BLOCK,
        tiles,
        image,
        tuple(x for bands in levels for x in bands),
        carry,
        *strides,
        *_strides(carry),
        tiles,
        c // channels,
        rows,
        cols,
        0.5 * scale,
        ANALYSIS=analysis,
        LEVELS=count,
        ACC=acc,
        TILE=tile,
        CHANNELS=channels,
        IMAGE_PACKED=image_packed,
        BANDS_PACKED=bands_packed,
        CARRY_PACKED=packed and carry is not None and _packable(carry, c, (tile >> count) * c),
        STACKED=stacked,
        VECS=tuple(vectors),
        CHANNELS_INNER=not packed and c > 1 and present[0][0].stride(1) == 1,
    )


def _launch_level(
    analysis: bool,
    image: Tensor,
    bands: Bands,
    carry: Tensor | None,
    mode: str,
    scale: float,
    acc: Any,
) -> None:
    n, c, height, width = image.shape
    extra = [
        extension_index(size, mode) if size % 2 == 1 and mode != "zero" else -1 for size in (height, width)
    ]
    quads = n * c * ((height + 1) // 2) * ((width + 1) // 2)
    bands = (*bands, carry)
    _launch(
        haar_level_kernel,
        BLOCK,
        quads,
        image,
        bands,
        *(stride for x in (image, *bands) for stride in _strides(x)),
        quads,
        c,
        height,
        width,
        *extra,
        0.5 * scale,
        ANALYSIS=analysis,
        ACC=acc,
        CHANNELS_INNER=c > 1 and _strides(bands[1])[1] == 1,
    )


def _transform(
    analysis: bool,
    image: Tensor,
    coeffs: Sequence[Tensor],
    levels: int,
    mode: str,
    scale: float,
    stacked: bool,
) -> None:
    if image.numel() == 0:
        return
    n, c, height, width = image.shape
    sizes = level_sizes(height, width, levels)
    wide = torch.float64 in (image.dtype, coeffs[0].dtype)
    dtype, acc = (torch.float64, tl.float64) if wide else (torch.float32, tl.float32)
    layout = torch.channels_last if coeffs[0].stride(1) == 1 else torch.contiguous_format
    passes = _passes(coeffs, sizes, levels, stacked)
    # The LL between passes has the layout of the coefficients.
    carries = [
        torch.empty((n, c, *sizes[step.last]), dtype=dtype, device=image.device, memory_format=layout)
        for step in passes[:-1]
    ]
    steps = list(zip(passes, [image, *carries], [*carries, None], strict=True))
    with on_device(image):
        for step, finer, coarser in steps if analysis else reversed(steps):
            if step.fused:
                _launch_fused(analysis, finer, step.fused, coarser, scale, stacked, acc)
            else:
                bands = coeffs[step.first].chunk(4, 1) if stacked else _bands(coeffs, step.last, levels)
                _launch_level(analysis, finer, bands, coarser, mode, scale, acc)


def analysis(
    image: Tensor, coeffs: Sequence[Tensor], levels: int, mode: str, scale: float, stacked: bool
) -> None:
    """Fills `coeffs` from `image`."""
    _transform(True, image, coeffs, levels, mode, scale, stacked)


def synthesis(
    image: Tensor, coeffs: Sequence[Tensor], levels: int, mode: str, scale: float, stacked: bool
) -> None:
    """Fills `image` from `coeffs`."""
    _transform(False, image, coeffs, levels, mode, scale, stacked)
