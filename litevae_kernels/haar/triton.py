"""The Haar transform in Triton: any CUDA device, and the CPU under Triton's interpreter.

Both functions fill tensors that the caller allocated, and take any strides. Sizes that divide by 2^levels go
through one pass of up to three levels; odd sizes, and flat coefficients whose strides differ within a level, go
level by level. Between passes LL is carried in float32 (float64), never rounded to the storage type.
"""

# Kernels are typed by Triton, which also gives a name another type where a branch is compiled away.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litevae_kernels.haar.shapes import level_sizes, stand_in
from litevae_kernels.triton_support import kernel, on_device

MAX_FUSED = 3
# Pixels times channels that one thread takes together where channels are innermost in memory: RGB at three levels.
# More would take Triton a minute to compile.
MAX_PACKED = 192
# Positions and threads of a program: few, so that small calls spread over the multiprocessors.
BLOCK = 64


@triton.jit
def _unjoin(x, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, VEC) to VEC tensors (BLOCK,); within one thread's registers."""
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
    """Elements FIRST, FIRST + STEP, ..., VEC tensors (BLOCK,), to (BLOCK, VEC)."""
    if VEC == 2:
        out = tl.join(elements[FIRST], elements[FIRST + STEP])
    else:
        even = _join(elements, FIRST, 2 * STEP, VEC // 2, BLOCK)
        odd = _join(elements, FIRST + STEP, 2 * STEP, VEC // 2, BLOCK)
        out = tl.reshape(tl.join(even, odd), (BLOCK, VEC))
    return out


@triton.jit
def _store(pointer, value, mask):
    """16-bit types round through float32, as PyTorch's conversions from float64 do."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(pointer, value, mask=mask)


@triton.jit
def _load_run(pointer, offsets, step, mask, COUNT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT tensors (BLOCK,): what lies at offsets, offsets + step, ...; VEC > 1 implies step 1."""
    out = ()
    for i in tl.static_range(COUNT // VEC):
        if VEC == 1:
            out = out + (tl.load(pointer + (offsets + i * step), mask=mask),)
        else:
            at = (offsets + i * VEC)[:, None] + tl.arange(0, VEC)[None, :]
            block = tl.load(pointer + at, mask=mask[:, None])
            out = out + _unjoin(block, VEC, BLOCK)
    return out


@triton.jit
def _store_run(
    pointer, offsets, step, mask, elements, COUNT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr
):
    for i in tl.static_range(COUNT // VEC):
        if VEC == 1:
            _store(pointer + (offsets + i * step), elements[i], mask)
        else:
            at = (offsets + i * VEC)[:, None] + tl.arange(0, VEC)[None, :]
            _store(pointer + at, _join(elements, i * VEC, 1, VEC, BLOCK), mask[:, None])


@triton.jit
def _load_row(
    pointer,
    offsets,
    step,
    channel_step,
    mask,
    ACC: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of every tile: tensors (BLOCK,), channels innermost. PACKED: memory has that order too."""
    if PACKED:
        stored = _load_run(pointer, offsets, 1, mask, COLS * CHANNELS, VEC, BLOCK)
    else:
        stored = ()
        for channel in tl.static_range(CHANNELS):
            stored = stored + _load_run(
                pointer, offsets + channel * channel_step, step, mask, COLS, VEC, BLOCK
            )
    out = ()
    for col in tl.static_range(COLS):
        for channel in tl.static_range(CHANNELS):
            if PACKED:
                out = out + (stored[col * CHANNELS + channel].to(ACC),)
            else:
                out = out + (stored[channel * COLS + col].to(ACC),)
    return out


@triton.jit
def _store_row(
    pointer,
    offsets,
    step,
    channel_step,
    mask,
    elements,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if PACKED:
        _store_run(pointer, offsets, 1, mask, elements, COLS * CHANNELS, VEC, BLOCK)
    else:
        for channel in tl.static_range(CHANNELS):
            plane = ()
            for col in tl.static_range(COLS):
                plane = plane + (elements[col * CHANNELS + channel],)
            _store_run(pointer, offsets + channel * channel_step, step, mask, plane, COLS, VEC, BLOCK)


@triton.jit
def _butterfly(a, b, c, d, FACTOR: tl.constexpr):
    """Pixels a b / c d to LL, H, V, D; its own adjoint."""
    left = a + c  # rows before columns, as the core's
    right = b + d
    left_change = a - c
    right_change = b - d
    return (
        (left + right) * FACTOR,
        (left_change + right_change) * FACTOR,
        (left - right) * FACTOR,
        (left_change - right_change) * FACTOR,
    )


@triton.jit
def _butterfly_rows(upper, lower, COLS: tl.constexpr, CHANNELS: tl.constexpr, FACTOR: tl.constexpr):
    """Two rows of 2 * COLS pixels to one row of COLS pixels of LL, H, V and D."""
    ll = ()
    h = ()
    v = ()
    d = ()
    for col in tl.static_range(COLS):
        for channel in tl.static_range(CHANNELS):
            q = _butterfly(
                upper[2 * col * CHANNELS + channel],
                upper[(2 * col + 1) * CHANNELS + channel],
                lower[2 * col * CHANNELS + channel],
                lower[(2 * col + 1) * CHANNELS + channel],
                FACTOR,
            )
            ll = ll + (q[0],)
            h = h + (q[1],)
            v = v + (q[2],)
            d = d + (q[3],)
    return (ll, h, v, d)


@triton.jit
def _store_bands(
    bands,
    offsets,
    step,
    channel_step,
    band_step,
    mask,
    quads,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    STACKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a level's four sub-bands."""
    if PACKED and STACKED:
        row = ()
        for col in tl.static_range(COLS):
            for band in tl.static_range(4):
                for channel in tl.static_range(CHANNELS):
                    row = row + (quads[band][col * CHANNELS + channel],)
        _store_row(bands[0], offsets, 1, 1, mask, row, COLS, 4 * CHANNELS, True, VEC, BLOCK)
    else:
        for band in tl.static_range(4):
            if bands[band] is not None:
                _store_row(
                    bands[band],
                    offsets + band * band_step,
                    step,
                    channel_step,
                    mask,
                    quads[band],
                    COLS,
                    CHANNELS,
                    PACKED,
                    VEC,
                    BLOCK,
                )


@triton.jit
def _add_rows(x, y, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (x[i] + y[i],)
    return out


@triton.jit
def _adjoint_rows(
    bands,
    offsets,
    step,
    channel_step,
    band_step,
    mask,
    coarser,
    HAS_COARSER: tl.constexpr,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    STACKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a level's sub-bands, and what the coarser levels add to its LL, to two rows of 2 * COLS pixels."""
    if PACKED and STACKED:
        row = _load_row(bands[0], offsets, 1, 1, mask, ACC, COLS, 4 * CHANNELS, True, VEC, BLOCK)
        quads = ()
        for band in tl.static_range(4):
            plane = ()
            for col in tl.static_range(COLS):
                for channel in tl.static_range(CHANNELS):
                    plane = plane + (row[(col * 4 + band) * CHANNELS + channel],)
            quads = quads + (plane,)
    else:
        quads = ()
        for band in tl.static_range(4):
            if bands[band] is not None:
                plane = _load_row(
                    bands[band],
                    offsets + band * band_step,
                    step,
                    channel_step,
                    mask,
                    ACC,
                    COLS,
                    CHANNELS,
                    PACKED,
                    VEC,
                    BLOCK,
                )
                quads = quads + (plane,)
            else:
                quads = quads + (coarser,)
    ll = quads[0]
    if HAS_COARSER and bands[0] is not None:
        ll = _add_rows(ll, coarser, COLS * CHANNELS)
    upper = ()
    lower = ()
    for col in tl.static_range(COLS):
        left_upper = ()
        right_upper = ()
        left_lower = ()
        right_lower = ()
        for channel in tl.static_range(CHANNELS):
            q = _butterfly(
                ll[col * CHANNELS + channel],
                quads[1][col * CHANNELS + channel],
                quads[2][col * CHANNELS + channel],
                quads[3][col * CHANNELS + channel],
                FACTOR,
            )
            left_upper = left_upper + (q[0],)
            right_upper = right_upper + (q[1],)
            left_lower = left_lower + (q[2],)
            right_lower = right_lower + (q[3],)
        upper = upper + left_upper + right_upper
        lower = lower + left_lower + right_lower
    return (upper, lower)


@triton.jit
def _position(
    pid, count, channels, rows, cols, CHANNELS_INNER: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """(n, channel, row, col) of BLOCK consecutive positions, int64, and which exist; int32 division where it does."""
    if WIDE:
        index = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        channels = tl.cast(channels, tl.int64)
        rows = tl.cast(rows, tl.int64)
        cols = tl.cast(cols, tl.int64)
    else:
        index = pid * BLOCK + tl.arange(0, BLOCK)
        channels = tl.cast(channels, tl.int32)
        rows = tl.cast(rows, tl.int32)
        cols = tl.cast(cols, tl.int32)
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
    return n.to(tl.int64), channel.to(tl.int64), row.to(tl.int64), col.to(tl.int64), mask


@triton.jit
def _tile_offsets(
    n,
    channel,
    row,
    col,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    PACKED: tl.constexpr,
    VEC: tl.constexpr,
):
    """Where the tiles of ROWS x COLS pixels begin; visibly a multiple of VEC, so that accesses become vectors."""
    if PACKED:
        across = col * (COLS * LANES)
    elif VEC > 1:
        across = col * COLS
    else:
        across = col * (COLS * stride_w)
    return n * stride_n + channel * stride_c + row * (ROWS * stride_h) + across


@kernel
def haar_analysis_fused_kernel(
    image,
    bands1,
    bands2,
    bands3,
    carry,
    image_n: tl.int64,
    image_c: tl.int64,
    image_h: tl.int64,
    image_w: tl.int64,
    carry_n: tl.int64,
    carry_c: tl.int64,
    carry_h: tl.int64,
    carry_w: tl.int64,
    n1: tl.int64,
    c1: tl.int64,
    h1: tl.int64,
    w1: tl.int64,
    band1: tl.int64,
    n2: tl.int64,
    c2: tl.int64,
    h2: tl.int64,
    w2: tl.int64,
    band2: tl.int64,
    n3: tl.int64,
    c3: tl.int64,
    h3: tl.int64,
    w3: tl.int64,
    band3: tl.int64,
    tiles: tl.int64,
    channels: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    FACTOR: tl.constexpr,
    LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    IMAGE_PACKED: tl.constexpr,
    BANDS_PACKED: tl.constexpr,
    STACKED: tl.constexpr,
    IMAGE_VEC: tl.constexpr,
    VEC1: tl.constexpr,
    VEC2: tl.constexpr,
    VEC3: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each thread makes all coefficients of a tile of 2^LEVELS rows, TILE columns and CHANNELS channels.

    image: (N, C, H, W). bands: LL, H, V, D of levels 1 to LEVELS, each (N, C, H / 2^l, W / 2^l), a null where not
    wanted; a band's address and its multiple of `band` add up. carry: the last LL again, or null. Rows of tiles
    `rows`, columns `cols`, groups of CHANNELS channels `channels`; two image rows are in registers at a time.
    """
    n, channel, row, col, mask = _position(
        tl.program_id(0), tiles, channels, rows, cols, CHANNELS_INNER, WIDE, BLOCK
    )
    HEIGHT: tl.constexpr = 1 << LEVELS
    LANES: tl.constexpr = 4 * CHANNELS if STACKED else CHANNELS
    # Strides come in units of the vector width.
    image_n, image_c, image_h = image_n * IMAGE_VEC, image_c * IMAGE_VEC, image_h * IMAGE_VEC
    n1, c1, h1, band1 = n1 * VEC1, c1 * VEC1, h1 * VEC1, band1 * VEC1
    n2, c2, h2, band2 = n2 * VEC2, c2 * VEC2, h2 * VEC2, band2 * VEC2
    n3, c3, h3, band3 = n3 * VEC3, c3 * VEC3, h3 * VEC3, band3 * VEC3
    from_image = _tile_offsets(
        n,
        channel,
        row,
        col,
        image_n,
        image_c,
        image_h,
        image_w,
        HEIGHT,
        TILE,
        CHANNELS,
        IMAGE_PACKED,
        IMAGE_VEC,
    )
    to1 = _tile_offsets(
        n, channel, row, col, n1, c1, h1, w1, HEIGHT // 2, TILE // 2, LANES, BANDS_PACKED, VEC1
    )
    if LEVELS >= 2:
        to2 = _tile_offsets(
            n, channel, row, col, n2, c2, h2, w2, HEIGHT // 4, TILE // 4, LANES, BANDS_PACKED, VEC2
        )
    if LEVELS >= 3:
        to3 = _tile_offsets(n, channel, row, col, n3, c3, h3, w3, 1, TILE // 8, LANES, BANDS_PACKED, VEC3)

    ll2 = ()
    for row2 in tl.static_range(HEIGHT // 4 if LEVELS >= 2 else 1):
        ll1 = ()
        for half in tl.static_range(2 if LEVELS >= 2 else 1):
            row1 = 2 * row2 + half
            upper = _load_row(
                image, from_image + 2 * row1 * image_h, image_w, image_c, mask, ACC, TILE, CHANNELS,
                IMAGE_PACKED, IMAGE_VEC, BLOCK,
            )  # fmt: skip
            lower = _load_row(
                image, from_image + (2 * row1 + 1) * image_h, image_w, image_c, mask, ACC, TILE, CHANNELS,
                IMAGE_PACKED, IMAGE_VEC, BLOCK,
            )  # fmt: skip
            quads = _butterfly_rows(upper, lower, TILE // 2, CHANNELS, FACTOR)
            _store_bands(
                bands1, to1 + row1 * h1, w1, c1, band1, mask, quads, TILE // 2, CHANNELS, BANDS_PACKED,
                STACKED, VEC1, BLOCK,
            )  # fmt: skip
            ll1 = ll1 + (quads[0],)
        if LEVELS >= 2:
            quads = _butterfly_rows(ll1[0], ll1[1], TILE // 4, CHANNELS, FACTOR)
            _store_bands(
                bands2, to2 + row2 * h2, w2, c2, band2, mask, quads, TILE // 4, CHANNELS, BANDS_PACKED,
                STACKED, VEC2, BLOCK,
            )  # fmt: skip
            ll2 = ll2 + (quads[0],)
    if LEVELS >= 3:
        quads = _butterfly_rows(ll2[0], ll2[1], TILE // 8, CHANNELS, FACTOR)
        _store_bands(
            bands3, to3, w3, c3, band3, mask, quads, TILE // 8, CHANNELS, BANDS_PACKED, STACKED, VEC3, BLOCK
        )
    if carry is not None:
        to_carry = n * carry_n + channel * carry_c + row * carry_h + col * (TILE // HEIGHT * carry_w)
        _store_row(
            carry, to_carry, carry_w, carry_c, mask, quads[0], TILE // HEIGHT, CHANNELS, False, 1, BLOCK
        )


@kernel
def haar_synthesis_fused_kernel(
    image,
    bands1,
    bands2,
    bands3,
    carry,
    image_n: tl.int64,
    image_c: tl.int64,
    image_h: tl.int64,
    image_w: tl.int64,
    carry_n: tl.int64,
    carry_c: tl.int64,
    carry_h: tl.int64,
    carry_w: tl.int64,
    n1: tl.int64,
    c1: tl.int64,
    h1: tl.int64,
    w1: tl.int64,
    band1: tl.int64,
    n2: tl.int64,
    c2: tl.int64,
    h2: tl.int64,
    w2: tl.int64,
    band2: tl.int64,
    n3: tl.int64,
    c3: tl.int64,
    h3: tl.int64,
    w3: tl.int64,
    band3: tl.int64,
    tiles: tl.int64,
    channels: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    FACTOR: tl.constexpr,
    LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    IMAGE_PACKED: tl.constexpr,
    BANDS_PACKED: tl.constexpr,
    STACKED: tl.constexpr,
    IMAGE_VEC: tl.constexpr,
    VEC1: tl.constexpr,
    VEC2: tl.constexpr,
    VEC3: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoint of `haar_analysis_fused_kernel`, with the same arguments.

    A null band is zero. carry: (N, C, H / 2^LEVELS, W / 2^LEVELS), what coarser levels add to the last LL, or null.
    """
    n, channel, row, col, mask = _position(
        tl.program_id(0), tiles, channels, rows, cols, CHANNELS_INNER, WIDE, BLOCK
    )
    HEIGHT: tl.constexpr = 1 << LEVELS
    LANES: tl.constexpr = 4 * CHANNELS if STACKED else CHANNELS
    # Strides come in units of the vector width.
    image_n, image_c, image_h = image_n * IMAGE_VEC, image_c * IMAGE_VEC, image_h * IMAGE_VEC
    n1, c1, h1, band1 = n1 * VEC1, c1 * VEC1, h1 * VEC1, band1 * VEC1
    n2, c2, h2, band2 = n2 * VEC2, c2 * VEC2, h2 * VEC2, band2 * VEC2
    n3, c3, h3, band3 = n3 * VEC3, c3 * VEC3, h3 * VEC3, band3 * VEC3
    to_image = _tile_offsets(
        n,
        channel,
        row,
        col,
        image_n,
        image_c,
        image_h,
        image_w,
        HEIGHT,
        TILE,
        CHANNELS,
        IMAGE_PACKED,
        IMAGE_VEC,
    )
    from1 = _tile_offsets(
        n, channel, row, col, n1, c1, h1, w1, HEIGHT // 2, TILE // 2, LANES, BANDS_PACKED, VEC1
    )
    if carry is not None:
        from_carry = n * carry_n + channel * carry_c + row * carry_h + col * (TILE // HEIGHT * carry_w)
        coarser = _load_row(
            carry, from_carry, carry_w, carry_c, mask, ACC, TILE // HEIGHT, CHANNELS, False, 1, BLOCK
        )
    else:
        coarser = ()
    if LEVELS >= 2:
        from2 = _tile_offsets(
            n, channel, row, col, n2, c2, h2, w2, HEIGHT // 4, TILE // 4, LANES, BANDS_PACKED, VEC2
        )
    if LEVELS >= 3:
        from3 = _tile_offsets(n, channel, row, col, n3, c3, h3, w3, 1, TILE // 8, LANES, BANDS_PACKED, VEC3)
        rows2 = _adjoint_rows(
            bands3, from3, w3, c3, band3, mask, coarser, carry is not None, FACTOR, ACC, TILE // 8, CHANNELS,
            BANDS_PACKED, STACKED, VEC3, BLOCK,
        )  # fmt: skip
    else:
        rows2 = (coarser,)
    for row2 in tl.static_range(HEIGHT // 4 if LEVELS >= 2 else 1):
        if LEVELS >= 2:
            rows1 = _adjoint_rows(
                bands2, from2 + row2 * h2, w2, c2, band2, mask, rows2[row2],
                LEVELS >= 3 or carry is not None, FACTOR, ACC, TILE // 4, CHANNELS, BANDS_PACKED, STACKED, VEC2, BLOCK,
            )  # fmt: skip
        else:
            rows1 = (coarser,)
        for half in tl.static_range(2 if LEVELS >= 2 else 1):
            row1 = 2 * row2 + half
            pair = _adjoint_rows(
                bands1, from1 + row1 * h1, w1, c1, band1, mask, rows1[half],
                LEVELS >= 2 or carry is not None, FACTOR, ACC, TILE // 2, CHANNELS, BANDS_PACKED, STACKED, VEC1, BLOCK,
            )  # fmt: skip
            for side in tl.static_range(2):
                _store_row(
                    image, to_image + (2 * row1 + side) * image_h, image_w, image_c, mask, pair[side], TILE,
                    CHANNELS, IMAGE_PACKED, IMAGE_VEC, BLOCK,
                )  # fmt: skip


@kernel
def haar_analysis_level_kernel(
    image,
    ll,
    h,
    v,
    d,
    carry,
    image_n: tl.int64,
    image_c: tl.int64,
    image_h: tl.int64,
    image_w: tl.int64,
    carry_n: tl.int64,
    carry_c: tl.int64,
    carry_h: tl.int64,
    carry_w: tl.int64,
    ll_n: tl.int64,
    ll_c: tl.int64,
    ll_h: tl.int64,
    ll_w: tl.int64,
    h_n: tl.int64,
    h_c: tl.int64,
    h_h: tl.int64,
    h_w: tl.int64,
    v_n: tl.int64,
    v_c: tl.int64,
    v_h: tl.int64,
    v_w: tl.int64,
    d_n: tl.int64,
    d_c: tl.int64,
    d_h: tl.int64,
    d_w: tl.int64,
    quads: tl.int64,
    channels: tl.int64,
    height: tl.int64,
    width: tl.int64,
    extra_row: tl.int64,
    extra_col: tl.int64,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One level of any size: each thread makes the four coefficients of one 2x2 block.

    image: (N, C, height, width). ll, h, v, d: (N, C, ceil(height / 2), ceil(width / 2)); ll may be null. carry: ll
    again, or null. extra_row, extra_col: what stands for the sample behind an odd axis; -1: a zero.
    """
    n, channel, row, col, mask = _position(
        tl.program_id(0), quads, channels, (height + 1) // 2, (width + 1) // 2, CHANNELS_INNER, WIDE, BLOCK
    )
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
    q = _butterfly(pixel_a, pixel_b, pixel_c, pixel_d, FACTOR)
    if ll is not None:
        _store(ll + (n * ll_n + channel * ll_c + row * ll_h + col * ll_w), q[0], mask)
    _store(h + (n * h_n + channel * h_c + row * h_h + col * h_w), q[1], mask)
    _store(v + (n * v_n + channel * v_c + row * v_h + col * v_w), q[2], mask)
    _store(d + (n * d_n + channel * d_c + row * d_h + col * d_w), q[3], mask)
    if carry is not None:
        _store(carry + (n * carry_n + channel * carry_c + row * carry_h + col * carry_w), q[0], mask)


@triton.jit
def _load_band(pointer, n, channel, row, col, s_n, s_c, s_h, s_w, mask, ACC: tl.constexpr):
    return tl.load(pointer + (n * s_n + channel * s_c + row * s_h + col * s_w), mask=mask, other=0).to(ACC)


@kernel
def haar_synthesis_level_kernel(
    image,
    ll,
    h,
    v,
    d,
    carry,
    image_n: tl.int64,
    image_c: tl.int64,
    image_h: tl.int64,
    image_w: tl.int64,
    carry_n: tl.int64,
    carry_c: tl.int64,
    carry_h: tl.int64,
    carry_w: tl.int64,
    ll_n: tl.int64,
    ll_c: tl.int64,
    ll_h: tl.int64,
    ll_w: tl.int64,
    h_n: tl.int64,
    h_c: tl.int64,
    h_h: tl.int64,
    h_w: tl.int64,
    v_n: tl.int64,
    v_c: tl.int64,
    v_h: tl.int64,
    v_w: tl.int64,
    d_n: tl.int64,
    d_c: tl.int64,
    d_h: tl.int64,
    d_w: tl.int64,
    quads: tl.int64,
    channels: tl.int64,
    height: tl.int64,
    width: tl.int64,
    extra_row: tl.int64,
    extra_col: tl.int64,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoint of `haar_analysis_level_kernel`, with the same arguments; each thread makes one 2x2 block.

    In pull form, without atomics: the block that holds row extra_row also takes the missing row's share from the
    last row of coefficients, likewise columns, and the corner.
    """
    half_height = (height + 1) // 2
    half_width = (width + 1) // 2
    n, channel, row, col, mask = _position(
        tl.program_id(0), quads, channels, half_height, half_width, CHANNELS_INNER, WIDE, BLOCK
    )
    folds_row = row == (extra_row >> 1)  # never, if extra_row is -1
    folds_col = col == (extra_col >> 1)
    own = ()
    # The block's own coefficients, the missing row's, the missing column's, the corner's.
    for source in tl.static_range(4):
        if source == 0:
            i = row
            j = col
            wanted = mask
        elif source == 1:
            i = row * 0 + (half_height - 1)
            j = col
            wanted = mask & folds_row
        elif source == 2:
            i = row
            j = col * 0 + (half_width - 1)
            wanted = mask & folds_col
        else:
            i = row * 0 + (half_height - 1)
            j = col * 0 + (half_width - 1)
            wanted = mask & folds_row & folds_col
        band_h = _load_band(h, n, channel, i, j, h_n, h_c, h_h, h_w, wanted, ACC)
        band_v = _load_band(v, n, channel, i, j, v_n, v_c, v_h, v_w, wanted, ACC)
        band_d = _load_band(d, n, channel, i, j, d_n, d_c, d_h, d_w, wanted, ACC)
        band_ll = tl.zeros((BLOCK,), ACC)
        if ll is not None:
            band_ll = _load_band(ll, n, channel, i, j, ll_n, ll_c, ll_h, ll_w, wanted, ACC)
        if carry is not None:
            band_ll += _load_band(carry, n, channel, i, j, carry_n, carry_c, carry_h, carry_w, wanted, ACC)
        own = own + (_butterfly(band_ll, band_h, band_v, band_d, FACTOR),)
    top = (extra_row & 1) == 0
    left = (extra_col & 1) == 0
    zero = tl.zeros((BLOCK,), ACC)
    # of the missing row: c and d; of the missing column: b and d; of the corner: d
    pixel_a = own[0][0] + tl.where(top, own[1][2], zero) + tl.where(left, own[2][1], zero)
    pixel_b = own[0][1] + tl.where(top, own[1][3], zero) + tl.where(left, zero, own[2][1])
    pixel_c = own[0][2] + tl.where(top, zero, own[1][2]) + tl.where(left, own[2][3], zero)
    pixel_d = own[0][3] + tl.where(top, zero, own[1][3]) + tl.where(left, zero, own[2][3])
    corner = own[3][3]
    pixel_a += tl.where(top & left, corner, zero)
    pixel_b += tl.where(top & ~left, corner, zero)
    pixel_c += tl.where(~top & left, corner, zero)
    pixel_d += tl.where(~top & ~left, corner, zero)
    upper = image + (n * image_n + channel * image_c + 2 * row * image_h + 2 * col * image_w)
    lower = upper + image_h
    has_bottom = mask & (2 * row + 1 < height)
    has_right = 2 * col + 1 < width
    _store(upper, pixel_a, mask)
    _store(upper + image_w, pixel_b, mask & has_right)
    _store(lower, pixel_c, has_bottom)
    _store(lower + image_w, pixel_d, has_bottom & has_right)


def _power_of_two(*values: int) -> int:
    """The largest power of two that divides all of them, 16 at most."""
    bits = 16
    for value in values:
        bits |= value
    return bits & -bits


def fused_levels(height: int, width: int, levels: int) -> int:
    """How many levels one pass can do: 2^count divides both sizes. 0: none."""
    count = 0
    while count < min(levels, MAX_FUSED) and (height | width) % (2 << count) == 0:
        count += 1
    return count


def tile_columns(width: int, levels: int, element_size: int, packed: bool) -> int:
    """Columns of one thread's tile: whole 16-byte accesses where the registers allow and the width divides."""
    columns = 8 if packed else min(64 >> levels, 32 // element_size)
    columns = max(columns, 1 << levels)
    while width % columns != 0:
        columns //= 2
    return columns


def beyond_int32(count: int) -> bool:
    return count > 2**31 - 1


def _vector(x: Tensor, strides: tuple[int, ...], count: int, packed: bool) -> int:
    """Elements of one access to a row of `count`: contiguous, and aligned in every row of every tile."""
    if (not packed and strides[3] != 1) or x.data_ptr() % 16 != 0:
        return 1
    others = [strides[0], strides[2]] if packed else [*strides[:3], *strides[4:]]
    return min(_power_of_two(count, *others), 16 // x.element_size())


def _in_units(strides: Sequence[int], vector: int) -> list[int]:
    """All but the column's, which vectors imply."""
    return [stride if i == 3 else stride // vector for i, stride in enumerate(strides)]


class _Level(NamedTuple):
    """One level's sub-bands as the fused kernels take them: LL, H, V, D are `bands` plus multiples of strides[4]."""

    bands: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    strides: tuple[int, int, int, int, int]

    def distinct(self) -> list[Tensor]:
        if self.bands[0] is self.bands[1]:
            return [x for x in self.bands[:1] if x is not None]
        return [x for x in self.bands if x is not None]


def _packable(x: Tensor, strides: tuple[int, ...], lanes: int, count: int) -> bool:
    """Whether a row's `count` elements are contiguous, a pixel's `lanes` innermost, and aligned for vectors."""
    adjacent = strides[1] == 1 and strides[3] == lanes
    return adjacent and (count % 2 == 1 or _vector(x, strides, count, True) > 1)


def _bands(coeffs: Sequence[Tensor], level: int, levels: int, stacked: bool) -> list[Tensor | None]:
    """LL, H, V, D of `level`, (N, C, h, w) each; LL is None where flat coefficients have none."""
    if stacked:
        return list(coeffs[level - 1].chunk(4, 1))
    first = 1 + 3 * (levels - level)
    return [coeffs[0] if level == levels else None, *coeffs[first : first + 3]]


def _fused_level(coeffs: Sequence[Tensor], level: int, levels: int, stacked: bool) -> _Level | None:
    """None if the level's sub-bands differ in their strides."""
    if stacked:
        x = coeffs[level - 1]
        n, c, h, w = x.stride()
        return _Level((x, x, x, x), (n, c, h, w, x.shape[1] // 4 * c))
    ll, *details = _bands(coeffs, level, levels, False)
    strides = {x.stride() for x in (ll, *details) if x is not None}
    if len(strides) > 1:
        return None
    n, c, h, w = strides.pop()
    return _Level((ll, details[0], details[1], details[2]), (n, c, h, w, 0))


class _Pass(NamedTuple):
    """Levels first + 1 to first + count, fused or (count 1) by the kernel for any size."""

    first: int
    fused: list[_Level]

    @property
    def last(self) -> int:
        return self.first + max(len(self.fused), 1)


def _passes(
    coeffs: Sequence[Tensor], sizes: Sequence[tuple[int, int]], levels: int, stacked: bool
) -> list[_Pass]:
    out: list[_Pass] = []
    level = 0
    while level < levels:
        fused: list[_Level] = []
        for i in range(fused_levels(*sizes[level], levels - level)):
            one = _fused_level(coeffs, level + 1 + i, levels, stacked)
            if one is None:
                break
            fused.append(one)
        out.append(_Pass(level, fused))
        level = out[-1].last
    return out


def _accumulate(image: Tensor, coeffs: Sequence[Tensor]) -> tuple[torch.dtype, Any]:
    if torch.float64 in (image.dtype, coeffs[0].dtype):
        return torch.float64, tl.float64
    return torch.float32, tl.float32


def _carry(like: Tensor, n: int, c: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Scratch for LL between passes, laid out as the coefficients."""
    layout = torch.channels_last if like.stride(1) == 1 else torch.contiguous_format
    return torch.empty((n, c, *size), dtype=dtype, device=like.device, memory_format=layout)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def _launch_fused(
    kernel: Any,
    image: Tensor,
    levels: list[_Level],
    carry: Tensor | None,
    scale: float,
    stacked: bool,
    acc: Any,
) -> None:
    n, c, height, width = image.shape
    count = len(levels)
    # Where a pixel's channels are adjacent, few and aligned, one thread takes them all, and rows are contiguous.
    lanes = 4 * c if stacked else c
    tile = tile_columns(width, count, image.element_size(), True)
    few = c <= 4 and c * (tile << count) <= MAX_PACKED
    image_packed = few and c > 1 and _packable(image, image.stride(), c, tile * c)
    bands_packed = few and lanes > 1
    for i, level in enumerate(levels, 1):
        for x in level.distinct():
            bands_packed = bands_packed and _packable(x, level.strides, lanes, (tile >> i) * lanes)
    packed = image_packed or bands_packed
    channels = c if packed else 1
    tile = tile_columns(width, count, image.element_size(), packed)

    image_vector = _vector(image, image.stride(), tile * (c if image_packed else 1), image_packed)
    vectors = [1, 1, 1]
    for i, level in enumerate(levels):
        row = (tile >> (i + 1)) * (lanes if bands_packed else 1)
        vectors[i] = min(_vector(x, level.strides, row, bands_packed) for x in level.distinct())
    padded = levels + [_Level((None, None, None, None), (0, 0, 0, 0, 0))] * (MAX_FUSED - count)

    rows, cols = height >> count, width // tile
    tiles = n * (c // channels) * rows * cols
    kernel[(triton.cdiv(tiles, BLOCK),)](
        image,
        *(level.bands for level in padded),
        carry,
        *_in_units(image.stride(), image_vector),
        *_strides(carry),
        *(x for i, level in enumerate(padded) for x in _in_units(level.strides, vectors[i])),
        tiles,
        c // channels,
        rows,
        cols,
        FACTOR=0.5 * scale,
        LEVELS=count,
        ACC=acc,
        TILE=tile,
        CHANNELS=channels,
        IMAGE_PACKED=image_packed,
        BANDS_PACKED=bands_packed,
        STACKED=stacked,
        IMAGE_VEC=image_vector,
        VEC1=vectors[0],
        VEC2=vectors[1],
        VEC3=vectors[2],
        CHANNELS_INNER=not packed and c > 1 and levels[0].strides[1] == 1,
        WIDE=beyond_int32(tiles + BLOCK),
        BLOCK=BLOCK,
        num_warps=BLOCK // 32,
        enable_fp_fusion=False,
    )


def _launch_level(
    kernel: Any,
    image: Tensor,
    bands: Sequence[Tensor | None],
    carry: Tensor | None,
    mode: str,
    scale: float,
    acc: Any,
) -> None:
    n, c, height, width = image.shape
    extra = [stand_in(size, mode) if size % 2 == 1 and mode != "zero" else -1 for size in (height, width)]
    quads = n * c * ((height + 1) // 2) * ((width + 1) // 2)
    kernel[(triton.cdiv(quads, BLOCK),)](
        image,
        *bands,
        carry,
        *image.stride(),
        *_strides(carry),
        *(stride for band in bands for stride in _strides(band)),
        quads,
        c,
        height,
        width,
        *extra,
        FACTOR=0.5 * scale,
        ACC=acc,
        CHANNELS_INNER=c > 1 and _strides(bands[1])[1] == 1,
        WIDE=beyond_int32(quads + BLOCK),
        BLOCK=BLOCK,
        num_warps=BLOCK // 32,
        enable_fp_fusion=False,
    )


def analysis(
    image: Tensor, coeffs: Sequence[Tensor], levels: int, mode: str, scale: float, stacked: bool
) -> None:
    """Fills `coeffs` from `image`."""
    if image.numel() == 0:
        return
    n, c, height, width = image.shape
    sizes = level_sizes(height, width, levels)
    dtype, acc = _accumulate(image, coeffs)
    with on_device(image):
        for step in _passes(coeffs, sizes, levels, stacked):
            carry = None if step.last == levels else _carry(coeffs[0], n, c, sizes[step.last], dtype)
            if step.fused:
                _launch_fused(haar_analysis_fused_kernel, image, step.fused, carry, scale, stacked, acc)
            else:
                bands = _bands(coeffs, step.last, levels, stacked)
                _launch_level(haar_analysis_level_kernel, image, bands, carry, mode, scale, acc)
            if carry is not None:
                image = carry


def synthesis(
    image: Tensor, coeffs: Sequence[Tensor], levels: int, mode: str, scale: float, stacked: bool
) -> None:
    """Fills `image` from `coeffs`."""
    if image.numel() == 0:
        return
    n, c, height, width = image.shape
    sizes = level_sizes(height, width, levels)
    dtype, acc = _accumulate(image, coeffs)
    carry: Tensor | None = None
    with on_device(image):
        for step in reversed(_passes(coeffs, sizes, levels, stacked)):
            to = image if step.first == 0 else _carry(coeffs[0], n, c, sizes[step.first], dtype)
            if step.fused:
                _launch_fused(haar_synthesis_fused_kernel, to, step.fused, carry, scale, stacked, acc)
            else:
                bands = _bands(coeffs, step.last, levels, stacked)
                _launch_level(haar_synthesis_level_kernel, to, bands, carry, mode, scale, acc)
            carry = to
