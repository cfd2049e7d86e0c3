"""The Triton kernels: a program takes a block of rows of one stream through its heads.

The tables of the rows are read once and stay in registers, as halves: even and odd features apart,
the two of a pair in one thread. Offsets are int64: a row may start past element 2^31.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(x, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The even and the odd features of a tile, in fp32."""
    return tl.split(tl.reshape(x.to(tl.float32), (ROWS, BLOCK_D // 2, 2)))


@triton.jit
def _whole(even, odd, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.reshape(tl.join(even, odd), (ROWS, BLOCK_D))


@triton.jit
def _weight_halves(weight_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    return _halves(weight[None, :], 1, BLOCK_D)


@triton.jit
def _angles(table_ptr, l, stride, mask, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The even features of a table's rows."""
    d = tl.arange(0, BLOCK_D)
    table = tl.load(table_ptr + l[:, None] * stride + d[None, :], mask=mask, other=0.0)
    even, _ = _halves(table, ROWS, BLOCK_D)
    return even


@triton.jit
def _reciprocal_rms(even, odd, eps, D: tl.constexpr):
    squares = tl.sum(even * even + odd * odd, axis=1)
    return tl.rsqrt(tl.div_rn(squares, D * 1.0) + eps)[:, None]


@triton.jit
def _turned(
    x,
    w_even,
    w_odd,
    cos,
    sin,
    is_video,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The output for a tile of q or k."""
    even, odd = _halves(x, ROWS, BLOCK_D)
    rstd = _reciprocal_rms(even, odd, eps, D)
    even = even * rstd * w_even
    odd = odd * rstd * w_odd
    # Chosen, not multiplied by zero angles: an infinity would become NaN in its neighbour.
    first = tl.where(is_video, even * cos - odd * sin, even)
    second = tl.where(is_video, odd * cos + even * sin, odd)
    return _whole(first, second, ROWS, BLOCK_D)


@triton.jit
def forward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rows,  # of the stream, in one sample
    video_rows,  # how many of them are turned
    first_row,  # where they begin in the joint sequence
    joint_rows,
    num_heads,
    heads_per_program,
    stride_b,
    stride_l,
    stride_cos,
    stride_sin,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_Q: tl.constexpr = True,
):
    """Writes q (or not), k and v of some rows and heads of one stream into the joint tensors."""
    groups = tl.cdiv(num_heads, heads_per_program)
    first_head = (tl.program_id(0) % groups) * heads_per_program
    b = tl.program_id(1).to(tl.int64)
    l = ((tl.program_id(0) // groups) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    valid = (l < rows)[:, None] & inside
    is_video = (l < video_rows)[:, None]

    cos = _angles(cos_ptr, l, stride_cos, is_video & inside, ROWS, BLOCK_D)
    sin = _angles(sin_ptr, l, stride_sin, is_video & inside, ROWS, BLOCK_D)
    q_even, q_odd = _weight_halves(q_weight_ptr, D, BLOCK_D)
    k_even, k_odd = _weight_halves(k_weight_ptr, D, BLOCK_D)

    width = num_heads * D
    packed = (b * stride_b + l * stride_l)[:, None]
    joint = ((b * joint_rows + first_row + l) * width)[:, None]
    dtype = q_ptr.dtype.element_ty
    for head in range(first_head, tl.minimum(first_head + heads_per_program, num_heads)):
        feature = (head * D + d)[None, :]
        q_tile = qkv_ptr + packed + feature
        if WITH_Q:
            q = tl.load(q_tile, mask=valid, other=0.0, eviction_policy="evict_first")
        k = tl.load(q_tile + width, mask=valid, other=0.0, eviction_policy="evict_first")
        v = tl.load(q_tile + 2 * width, mask=valid, other=0.0, eviction_policy="evict_first")
        at = joint + feature
        tl.store(v_ptr + at, v, mask=valid)
        if WITH_Q:
            q = _turned(q, q_even, q_odd, cos, sin, is_video, eps, D, ROWS, BLOCK_D)
            tl.store(q_ptr + at, q.to(dtype), mask=valid)
        k = _turned(k, k_even, k_odd, cos, sin, is_video, eps, D, ROWS, BLOCK_D)
        tl.store(k_ptr + at, k.to(dtype), mask=valid)


@triton.jit
def _turned_back(
    x,
    g,
    w_even,
    w_odd,
    cos,
    sin,
    is_video,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of x for that of the output, g, and both halves of its share of dweight."""
    even, odd = _halves(x, ROWS, BLOCK_D)
    g_even, g_odd = _halves(g, ROWS, BLOCK_D)
    u_even = tl.where(is_video, g_even * cos + g_odd * sin, g_even)
    u_odd = tl.where(is_video, g_odd * cos - g_even * sin, g_odd)
    rstd = _reciprocal_rms(even, odd, eps, D)
    even *= rstd
    odd *= rstd
    g_even = u_even * w_even
    g_odd = u_odd * w_odd
    along = (tl.sum(g_even * even + g_odd * odd, axis=1) * (1.0 / D))[:, None]
    dx_even = (g_even - even * along) * rstd
    dx_odd = (g_odd - odd * along) * rstd
    return _whole(dx_even, dx_odd, ROWS, BLOCK_D), u_even * even, u_odd * odd


@triton.jit
def _store_sums(sums_ptr, even, odd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    sums = tl.reshape(tl.join(tl.sum(even, axis=0), tl.sum(odd, axis=0)), (BLOCK_D,))
    tl.store(sums_ptr + d, sums, mask=d < D)


@triton.jit
def backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dqkv_ptr,
    partials_ptr,
    rows,
    video_rows,
    first_row,
    num_heads,
    heads_per_program,
    chunk_rows,
    stride_qb,
    stride_ql,
    stride_qn,
    stride_kb,
    stride_kl,
    stride_kn,
    stride_vb,
    stride_vl,
    stride_vn,
    stride_b,
    stride_l,
    stride_cos,
    stride_sin,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes dqkv of a chunk of rows and some heads, and what they add to both weights."""
    groups = tl.cdiv(num_heads, heads_per_program)
    first_head = (tl.program_id(0) % groups) * heads_per_program
    start = (tl.program_id(0) // groups) * chunk_rows
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    width = num_heads * D
    dtype = dqkv_ptr.dtype.element_ty
    q_even, q_odd = _weight_halves(q_weight_ptr, D, BLOCK_D)
    k_even, k_odd = _weight_halves(k_weight_ptr, D, BLOCK_D)
    dq_even = tl.zeros([ROWS, BLOCK_D // 2], dtype=tl.float32)
    dq_odd = tl.zeros([ROWS, BLOCK_D // 2], dtype=tl.float32)
    dk_even = tl.zeros([ROWS, BLOCK_D // 2], dtype=tl.float32)
    dk_odd = tl.zeros([ROWS, BLOCK_D // 2], dtype=tl.float32)

    for tile in range(start, tl.minimum(start + chunk_rows, rows), ROWS):
        l = (tile + tl.arange(0, ROWS)).to(tl.int64)
        valid = (l < rows)[:, None] & inside
        is_video = (l < video_rows)[:, None]
        cos = _angles(cos_ptr, l, stride_cos, is_video & inside, ROWS, BLOCK_D)
        sin = _angles(sin_ptr, l, stride_sin, is_video & inside, ROWS, BLOCK_D)
        packed = (b * stride_b + l * stride_l)[:, None]
        fresh = ((b * rows + l) * (3 * width))[:, None]
        joint = first_row + l
        dq_row = dq_ptr + (b * stride_qb + joint * stride_ql)[:, None] + d[None, :]
        dk_row = dk_ptr + (b * stride_kb + joint * stride_kl)[:, None] + d[None, :]
        dv_row = dv_ptr + (b * stride_vb + joint * stride_vl)[:, None] + d[None, :]
        for head in range(first_head, tl.minimum(first_head + heads_per_program, num_heads)):
            feature = (head * D + d)[None, :]
            n = tl.cast(head, tl.int64)
            q_tile = qkv_ptr + packed + feature
            q = tl.load(q_tile, mask=valid, other=0.0, eviction_policy="evict_first")
            k = tl.load(q_tile + width, mask=valid, other=0.0, eviction_policy="evict_first")
            dq = tl.load(dq_row + n * stride_qn, mask=valid, other=0.0)
            dk = tl.load(dk_row + n * stride_kn, mask=valid, other=0.0)
            dv = tl.load(dv_row + n * stride_vn, mask=valid, other=0.0)
            out = dqkv_ptr + fresh + feature
            tl.store(out + 2 * width, dv, mask=valid)
            dx, even, odd = _turned_back(
                q, dq, q_even, q_odd, cos, sin, is_video, eps, D, ROWS, BLOCK_D
            )
            tl.store(out, dx.to(dtype), mask=valid)
            dq_even += even
            dq_odd += odd
            dx, even, odd = _turned_back(
                k, dk, k_even, k_odd, cos, sin, is_video, eps, D, ROWS, BLOCK_D
            )
            tl.store(out + width, dx.to(dtype), mask=valid)
            dk_even += even
            dk_odd += odd

    program = b * tl.num_programs(0) + tl.program_id(0)
    sums_ptr = partials_ptr + program * 2 * D
    _store_sums(sums_ptr, dq_even, dq_odd, D, BLOCK_D)
    _store_sums(sums_ptr + D, dk_even, dk_odd, D, BLOCK_D)


@triton.jit
def reduce_kernel(
    partials_ptr,
    sums_ptr,
    num_parts,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partials (num_parts, WIDTH) -> sums (WIDTH,), part after part."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    sums = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < num_parts)[:, None] & inside[None, :]
        at = partials_ptr + part.to(tl.int64)[:, None] * WIDTH + column[None, :]
        sums += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
    tl.store(sums_ptr + column, sums, mask=inside)
