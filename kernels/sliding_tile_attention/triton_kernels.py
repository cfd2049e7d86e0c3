"""The Triton kernels: a block of rows of one tile goes through the boxes that it sees.

A program numbers the tokens that it meets, those of a box of the grid first and then the text's,
and turns numbers into rows of the sequence. All rows of a block meet the same, and blocks of it are
full save for the last: nothing is masked but that one, and what lies past ``kv_len``. Scores are
kept in units of log 2. Offsets are int64: a row may start past element 2^31.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Sizes change from clip to clip, and a kernel is compiled once for all of them.
_SIZES = ["num_heads", "length", "T", "H", "W", "tile_t", "tile_h", "tile_w"]


@triton.jit
def _seen_tiles(i, window, count, INVERSE: tl.constexpr):
    """First tile along an axis that tile i sees (INVERSE: that sees it), and one past the last."""
    window = tl.minimum(tl.maximum(window, 1), count)
    if INVERSE:
        first = tl.where(i < window, 0, i - window + window // 2 + 1)
        beyond = tl.where(i >= count - window, count, i + window // 2 + 1)
    else:
        first = tl.minimum(tl.maximum(i - window // 2, 0), count - window)
        beyond = first + window
    return first, beyond


@triton.jit
def _axis(i, window, tile, size, everything, INVERSE: tl.constexpr):
    """Along an axis: first token and tokens of tile i, and of what it meets."""
    count = tl.cdiv(size, tile)
    first, beyond = _seen_tiles(i, window, count, INVERSE)
    first, beyond = tl.where(everything, 0, first), tl.where(everything, count, beyond)
    i, after = tl.where(everything, 0, i), tl.where(everything, count, i + 1)
    own, met = i * tile, first * tile
    return own, tl.minimum(after * tile, size) - own, met, tl.minimum(beyond * tile, size) - met


@triton.jit
def _place(
    windows_ptr,
    n,
    length,
    T,
    H,
    W,
    tile_t,
    tile_h,
    tile_w,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """The box of this program's tile and the box that it meets: first row, sides w and h, tokens.

    And the number of the program's first token, and one past that of its tile's last.
    """
    text = length - T * H * W
    text_blocks = tl.cdiv(text, BLOCK)  # of the most work: they go first
    is_text = tl.program_id(0) < text_blocks
    count_t, count_h, count_w = tl.cdiv(T, tile_t), tl.cdiv(H, tile_h), tl.cdiv(W, tile_w)
    window_t = tl.load(windows_ptr + 3 * n)
    window_h = tl.load(windows_ptr + 3 * n + 1)
    window_w = tl.load(windows_ptr + 3 * n + 2)
    # Where everybody sees everything the grid is one tile, and its blocks are full.
    whole = (window_t >= count_t) & (window_h >= count_h) & (window_w >= count_w)

    block = tl.maximum(tl.program_id(0) - text_blocks, 0)
    per_tile = tl.cdiv(tile_t * tile_h * tile_w, BLOCK)
    i = block // per_tile
    i_t, i_h, i_w = i // count_w // count_h, i // count_w % count_h, i % count_w
    one = whole | is_text
    t, size_t, met_t, met_size_t = _axis(i_t, window_t, tile_t, T, one, INVERSE)
    h, size_h, met_h, met_size_h = _axis(i_h, window_h, tile_h, H, one, INVERSE)
    w, size_w, met_w, met_size_w = _axis(i_w, window_w, tile_w, W, one, INVERSE)
    # Text has no tokens in a box: its numbers begin behind the video's.
    own = tl.where(is_text, 0, size_t * size_h * size_w)
    first = tl.where(is_text, tl.program_id(0), tl.where(whole, block, block % per_tile)) * BLOCK
    after = tl.where(is_text, text, own)
    own_row, met_row = (t * H + h) * W + w, (met_t * H + met_h) * W + met_w
    met = met_size_t * met_size_h * met_size_w
    return own_row, size_w, size_h, own, met_row, met_size_w, met_size_h, met, first, after


@triton.jit
def _row(number, first, side_w, side_h, box, T, H, W):
    """The row of a token: of the box that begins at row ``first``, or of the text behind it."""
    line = number // side_w
    plane = line // side_h
    row = first + (plane * H + line - plane * side_h) * W + number - line * side_w
    return tl.where(number < box, row, T * H * W + number - box)


@triton.jit
def _tile(ptr, rows, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head, zeros where masked."""
    d = tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (d < D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(ptr, x, rows, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (d < D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    windows_ptr,
    kv_len_ptr,
    num_heads,
    length,
    T,
    H,
    W,
    tile_t,
    tile_h,
    tile_w,
    scale,
    stride_qb,
    stride_ql,
    stride_qn,
    stride_kb,
    stride_kl,
    stride_kn,
    stride_vb,
    stride_vl,
    stride_vn,
    stride_ob,
    stride_ol,
    stride_on,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    """Outputs and log-sum-exp of a block of queries."""
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    n = (tl.program_id(1) % num_heads).to(tl.int64)
    own_row, own_w, own_h, own, met_row, met_w, met_h, met, first, after = _place(
        windows_ptr, n, length, T, H, W, tile_t, tile_h, tile_w, QUERIES, False
    )
    if first >= after:
        return
    valid_length = length
    if HAS_LENGTHS:
        valid_length = tl.load(kv_len_ptr + b).to(tl.int32)
    numbers = first + tl.arange(0, QUERIES)
    l = _row(numbers, own_row, own_w, own_h, own, T, H, W)
    exists = numbers < after
    valid = exists & (l < valid_length)
    count = met + tl.maximum(valid_length - T * H * W, 0)
    # Rows rise within a block: where the first is padding, all are, and there is nothing to do.
    count = tl.where(_row(first, own_row, own_w, own_h, own, T, H, W) < valid_length, count, 0)
    q = _tile(q_ptr + b * stride_qb + n * stride_qn, l, stride_ql, valid, D, BLOCK_D)
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn

    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, count, KEYS):
        number = start + tl.arange(0, KEYS)
        j = _row(number, met_row, met_w, met_h, met, T, H, W)
        seen = (number < count) & (j < valid_length)
        k = _tile(k_head, j, stride_kl, seen, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        # Finite from the first block on: it begins with a key before the first query, or with it.
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        correction = tl.exp2(highest - higher)
        total = total * correction + tl.sum(p, axis=1)
        v = _tile(v_head, j, stride_vl, seen, D, BLOCK_D)
        sums = tl.dot(p.to(v.dtype), v, sums * correction[:, None])
        highest = higher

    total = tl.where(valid, total, 1.0)
    out = tl.where(valid[:, None], sums / total[:, None], 0.0)
    _store(out_ptr + b * stride_ob + n * stride_on, out, l, stride_ol, exists, D, BLOCK_D)
    lse = tl.where(valid, (highest + tl.log2(total)) * LN_2, -float("inf"))
    tl.store(lse_ptr + (b * num_heads + n) * length + l, lse, mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def query_gradient_kernel(
    dout_ptr,
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    delta_ptr,
    windows_ptr,
    kv_len_ptr,
    num_heads,
    length,
    T,
    H,
    W,
    tile_t,
    tile_h,
    tile_w,
    scale,
    stride_db,
    stride_dl,
    stride_dn,
    stride_ob,
    stride_ol,
    stride_on,
    stride_qb,
    stride_ql,
    stride_qn,
    stride_kb,
    stride_kl,
    stride_kn,
    stride_vb,
    stride_vl,
    stride_vn,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    """dq of a block of queries; and delta, which the other kernel reads."""
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    n = (tl.program_id(1) % num_heads).to(tl.int64)
    own_row, own_w, own_h, own, met_row, met_w, met_h, met, first, after = _place(
        windows_ptr, n, length, T, H, W, tile_t, tile_h, tile_w, QUERIES, False
    )
    if first >= after:
        return
    valid_length = length
    if HAS_LENGTHS:
        valid_length = tl.load(kv_len_ptr + b).to(tl.int32)
    numbers = first + tl.arange(0, QUERIES)
    l = _row(numbers, own_row, own_w, own_h, own, T, H, W)
    exists = numbers < after
    valid = exists & (l < valid_length)
    count = met + tl.maximum(valid_length - T * H * W, 0)
    # Rows rise within a block: where the first is padding, all are, and there is nothing to do.
    count = tl.where(_row(first, own_row, own_w, own_h, own, T, H, W) < valid_length, count, 0)
    dout = _tile(dout_ptr + b * stride_db + n * stride_dn, l, stride_dl, valid, D, BLOCK_D)
    out = _tile(out_ptr + b * stride_ob + n * stride_on, l, stride_ol, valid, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    sample = (b * num_heads + n) * length
    tl.store(delta_ptr + sample + l, delta, mask=valid)
    lse = tl.load(lse_ptr + sample + l, mask=valid, other=0.0) * LOG2_E
    q = _tile(q_ptr + b * stride_qb + n * stride_qn, l, stride_ql, valid, D, BLOCK_D)
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn

    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, count, KEYS):
        number = start + tl.arange(0, KEYS)
        j = _row(number, met_row, met_w, met_h, met, T, H, W)
        seen = (number < count) & (j < valid_length)
        k = _tile(k_head, j, stride_kl, seen, D, BLOCK_D)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse[:, None])
        v = _tile(v_head, j, stride_vl, seen, D, BLOCK_D)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        ds = tl.where(seen[None, :], ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    head = (b * length * num_heads + n) * D
    dq = tl.where(valid[:, None], dq * scale, 0.0)
    _store(dq_ptr + head, dq, l, num_heads * D, exists, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def key_gradient_kernel(
    dout_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dk_ptr,
    dv_ptr,
    windows_ptr,
    kv_len_ptr,
    num_heads,
    length,
    T,
    H,
    W,
    tile_t,
    tile_h,
    tile_w,
    scale,
    stride_db,
    stride_dl,
    stride_dn,
    stride_qb,
    stride_ql,
    stride_qn,
    stride_kb,
    stride_kl,
    stride_kn,
    stride_vb,
    stride_vl,
    stride_vn,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    """dk and dv of a block of keys, from all queries that see it."""
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    n = (tl.program_id(1) % num_heads).to(tl.int64)
    own_row, own_w, own_h, own, met_row, met_w, met_h, met, first, after = _place(
        windows_ptr, n, length, T, H, W, tile_t, tile_h, tile_w, KEYS, True
    )
    if first >= after:
        return
    valid_length = length
    if HAS_LENGTHS:
        valid_length = tl.load(kv_len_ptr + b).to(tl.int32)
    numbers = first + tl.arange(0, KEYS)
    j = _row(numbers, own_row, own_w, own_h, own, T, H, W)
    exists = numbers < after
    valid = exists & (j < valid_length)
    count = met + tl.maximum(valid_length - T * H * W, 0)
    # Rows rise within a block: where the first is padding, all are, and there is nothing to do.
    count = tl.where(_row(first, own_row, own_w, own_h, own, T, H, W) < valid_length, count, 0)
    k = _tile(k_ptr + b * stride_kb + n * stride_kn, j, stride_kl, valid, D, BLOCK_D)
    v = _tile(v_ptr + b * stride_vb + n * stride_vn, j, stride_vl, valid, D, BLOCK_D)
    q_head = q_ptr + b * stride_qb + n * stride_qn
    dout_head = dout_ptr + b * stride_db + n * stride_dn
    sample = (b * num_heads + n) * length

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for start in range(0, count, QUERIES):
        number = start + tl.arange(0, QUERIES)
        l = _row(number, met_row, met_w, met_h, met, T, H, W)
        seeing = (number < count) & (l < valid_length)
        q = _tile(q_head, l, stride_ql, seeing, D, BLOCK_D)
        lse = tl.load(lse_ptr + sample + l, mask=seeing, other=0.0) * LOG2_E
        p = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2_E) - lse[None, :])
        p = tl.where(seeing[None, :], p, 0.0)
        dout = _tile(dout_head, l, stride_dl, seeing, D, BLOCK_D)
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + sample + l, mask=seeing, other=0.0)
        ds = p * (tl.dot(v, tl.trans(dout)) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    head = (b * length * num_heads + n) * D
    dk = tl.where(valid[:, None], dk * scale, 0.0)
    dv = tl.where(valid[:, None], dv, 0.0)
    _store(dk_ptr + head, dk, j, num_heads * D, exists, D, BLOCK_D)
    _store(dv_ptr + head, dv, j, num_heads * D, exists, D, BLOCK_D)
