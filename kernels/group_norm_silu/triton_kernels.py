"""The Triton kernels: a program takes some places of a sample, with all their channels.

x and its like are (B, S, C) with contiguous samples. Sums over places are kept in registers, one
for each place of a tile and channel, over a chunk of tiles. Offsets are int64: a sample may have
more than 2^31 values.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
# Beyond it exp(-z) is infinite or zero in fp32.
_BOUND = tl.constexpr(120.0)


@triton.jit
def _silu(z):
    low = tl.where(z < -_BOUND, -_BOUND, z)
    return low / (1.0 + tl.exp2(low * -_LOG2E))


@triton.jit
def _silu_slope(z):
    # of s = sigmoid(|z|) and c = 1 - s, neither of which cancels
    magnitude = tl.abs(z)
    w = tl.where(magnitude > _BOUND, _BOUND, magnitude)
    e = tl.exp2(w * -_LOG2E)
    s = 1.0 / (1.0 + e)
    c = e * s
    q = w * c * s
    return tl.where(z < 0.0, c - q, s + q)


@triton.jit
def _place(blocks, rows_each, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, first row and channels of this program; ``blocks`` of channels lie side by side."""
    b = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // blocks).to(tl.int64) * rows_each
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return b, row, c


@triton.jit
def _line(lines_ptr, b, which, c, LINES: tl.constexpr, C: tl.constexpr):
    at = lines_ptr + (b * LINES + which) * C + c
    return tl.load(at, mask=c < C, other=0.0)[None, :]


@triton.jit
def statistics_kernel(
    x_ptr,
    partials_ptr,
    num_rows,
    chunk_rows,
    stride_b,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of a chunk: a centre for each channel, and about it the sums of values and of squares."""
    blocks = tl.cdiv(C, BLOCK_C)
    b, row, c = _place(blocks, chunk_rows, C, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    chunks = tl.num_programs(0) // blocks
    inside = (c < C)[None, :]
    r = row + tl.arange(0, ROWS)
    valid = (r < num_rows)[:, None] & inside
    at = x_ptr + b * stride_b + r[:, None] * C + c[None, :]
    x = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    first = tl.minimum(num_rows - row, ROWS).to(tl.float32)
    centre = tl.sum(x, axis=0) / first
    total = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    squares = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for start in range(0, chunk_rows, ROWS):
        valid = (r + start < num_rows)[:, None] & inside
        tile = at + start * C
        x = tl.load(tile, mask=valid, other=0.0).to(tl.float32)
        centred = tl.where(valid, x - centre[None, :], 0.0)
        total += centred
        squares += centred * centred
    out = partials_ptr + (b * chunks + chunk) * 3 * C + c
    tl.store(out, centre, mask=c < C)
    tl.store(out + C, tl.sum(total, axis=0), mask=c < C)
    tl.store(out + 2 * C, tl.sum(squares, axis=0), mask=c < C)


@triton.jit
def _moments(part_ptr, chunk, c, valid, num_rows, chunk_rows, reference, C: tl.constexpr):
    """Of some chunks and channels: how many values, their mean from ``reference``, squares."""
    at = part_ptr + chunk.to(tl.int64)[:, None] * 3 * C + c[None, :]
    count = tl.minimum(num_rows - chunk * chunk_rows, chunk_rows).to(tl.float32)[:, None]
    centre = tl.load(at, mask=valid, other=0.0)
    mean = tl.load(at + C, mask=valid, other=0.0) / count
    squares = tl.load(at + 2 * C, mask=valid, other=0.0) - mean * mean * count
    # below zero by rounding alone; NaN stays NaN
    squares = tl.where(squares < 0.0, 0.0, squares)
    return count, tl.where(valid, (centre - reference) + mean, 0.0), squares


@triton.jit
def merge_kernel(
    partials_ptr,
    moments_ptr,
    num_rows,
    chunk_rows,
    chunks,
    num_groups,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Of one group: a mean in two parts, coarse and fine, and the sum of squares about it."""
    b = (tl.program_id(0) // num_groups).to(tl.int64)
    first = (tl.program_id(0) % num_groups) * CHANNELS
    part_ptr = partials_ptr + b * chunks * 3 * C + first
    reference = tl.load(part_ptr)
    lane = tl.arange(0, BLOCK)
    c = lane
    total = tl.zeros([PARTS, BLOCK], dtype=tl.float32)
    for start in range(0, chunks, PARTS):
        chunk = start + tl.arange(0, PARTS)
        valid = (chunk < chunks)[:, None] & (c < CHANNELS)[None, :]
        count, mean, _ = _moments(part_ptr, chunk, c, valid, num_rows, chunk_rows, reference, C)
        total += tl.where(valid, count * mean, 0.0)
    values = num_rows.to(tl.float32) * CHANNELS
    whole = tl.sum(tl.sum(total, axis=1), axis=0) / values
    spread = tl.zeros([PARTS, BLOCK], dtype=tl.float32)
    for start in range(0, chunks, PARTS):
        chunk = start + tl.arange(0, PARTS)
        valid = (chunk < chunks)[:, None] & (c < CHANNELS)[None, :]
        count, mean, squares = _moments(
            part_ptr, chunk, c, valid, num_rows, chunk_rows, reference, C
        )
        distance = mean - whole
        spread += tl.where(valid, squares + count * distance * distance, 0.0)
    out = moments_ptr + tl.program_id(0) * 3
    tl.store(out, reference)
    tl.store(out + 1, whole)
    tl.store(out + 2, tl.sum(tl.sum(spread, axis=1), axis=0))


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    lines_ptr,
    num_rows,
    stride_b,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """y of one tile."""
    b, row, c = _place(tl.cdiv(C, BLOCK_C), ROWS, C, BLOCK_C)
    r = row + tl.arange(0, ROWS)
    valid = (r < num_rows)[:, None] & (c < C)[None, :]
    offset = r[:, None] * C + c[None, :]
    x = tl.load(x_ptr + b * stride_b + offset, mask=valid, other=0.0).to(tl.float32)
    centred = x - _line(lines_ptr, b, 0, c, 3, C)
    z = centred * _line(lines_ptr, b, 1, c, 3, C) + _line(lines_ptr, b, 2, c, 3, C)
    if SILU:
        z = _silu(z)
    out = y_ptr + b * num_rows.to(tl.int64) * C + offset
    tl.store(out, z.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def gradient_sums_kernel(
    dy_ptr,
    x_ptr,
    lines_ptr,
    partials_ptr,
    num_rows,
    chunk_rows,
    stride_dyb,
    stride_b,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Of a chunk, for each channel: the sums of dz and of dz (x - centre)."""
    blocks = tl.cdiv(C, BLOCK_C)
    b, row, c = _place(blocks, chunk_rows, C, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    chunks = tl.num_programs(0) // blocks
    inside = (c < C)[None, :]
    centre = _line(lines_ptr, b, 0, c, 3, C)
    scale = _line(lines_ptr, b, 1, c, 3, C)
    shift = _line(lines_ptr, b, 2, c, 3, C)
    total = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    product = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for start in range(0, chunk_rows, ROWS):
        r = row + start + tl.arange(0, ROWS)
        valid = (r < num_rows)[:, None] & inside
        offset = r[:, None] * C + c[None, :]
        x = tl.load(x_ptr + b * stride_b + offset, mask=valid, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + b * stride_dyb + offset, mask=valid, other=0.0).to(tl.float32)
        centred = x - centre
        if SILU:
            dz *= _silu_slope(centred * scale + shift)
        # dz is zero where nothing was loaded, or NaN like all of its group
        total += dz
        product += dz * centred
    out = partials_ptr + (b * chunks + chunk) * 2 * C + c
    tl.store(out, tl.sum(total, axis=0), mask=c < C)
    tl.store(out + C, tl.sum(product, axis=0), mask=c < C)


@triton.jit
def reduce_kernel(
    partials_ptr,
    sums_ptr,
    chunks,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partials (B, chunks, WIDTH) -> sums (B, WIDTH), chunk after chunk."""
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    sums = tl.zeros([PARTS, COLUMNS], dtype=tl.float32)
    for start in range(0, chunks, PARTS):
        chunk = start + tl.arange(0, PARTS)
        mask = (chunk < chunks)[:, None] & inside[None, :]
        at = partials_ptr + (b * chunks + chunk)[:, None] * WIDTH + column[None, :]
        sums += tl.load(at, mask=mask, other=0.0)
    tl.store(sums_ptr + b * WIDTH + column, tl.sum(sums, axis=0), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    lines_ptr,
    num_rows,
    stride_dyb,
    stride_b,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """dx of one tile; the lines are those of forward, then slope and level."""
    b, row, c = _place(tl.cdiv(C, BLOCK_C), ROWS, C, BLOCK_C)
    r = row + tl.arange(0, ROWS)
    valid = (r < num_rows)[:, None] & (c < C)[None, :]
    offset = r[:, None] * C + c[None, :]
    x = tl.load(x_ptr + b * stride_b + offset, mask=valid, other=0.0).to(tl.float32)
    dz = tl.load(dy_ptr + b * stride_dyb + offset, mask=valid, other=0.0).to(tl.float32)
    centred = x - _line(lines_ptr, b, 0, c, 5, C)
    scale = _line(lines_ptr, b, 1, c, 5, C)
    if SILU:
        dz *= _silu_slope(centred * scale + _line(lines_ptr, b, 2, c, 5, C))
    dx = dz * scale
    dx += centred * _line(lines_ptr, b, 3, c, 5, C) + _line(lines_ptr, b, 4, c, 5, C)
    out = dx_ptr + b * num_rows.to(tl.int64) * C + offset
    tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=valid)
