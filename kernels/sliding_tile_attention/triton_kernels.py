"""The Triton kernels: a block of rows of one tile goes through the box that it sees, then the text.

All rows of a block meet the same tokens, padding last: nothing is masked but the end of the last
block. Scores are kept in units of log 2. Offsets are int64: a row may start past element 2^31.
"""

import triton
import triton.language as tl

from hunyuan_fast.kernels.sliding_tile_attention.triton_geometry import place, row_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Sizes change from clip to clip, and a kernel is compiled once for all of them.
_SIZES = ["num_heads", "length", "T", "H", "W", "tile_t", "tile_h", "tile_w"]


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
    valid_length = length
    if HAS_LENGTHS:
        valid_length = tl.load(kv_len_ptr + b).to(tl.int32)
    own, met, first, after, valid_after, count = place(
        windows_ptr, n, length, T, H, W, tile_t, tile_h, tile_w, valid_length, QUERIES, False
    )
    if first >= after:
        return
    numbers = first + tl.arange(0, QUERIES)
    l = row_of(numbers, own, T, H, W)
    exists, valid = numbers < after, numbers < valid_after
    q = _tile(q_ptr + b * stride_qb + n * stride_qn, l, stride_ql, valid, D, BLOCK_D)
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn

    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, count, KEYS):
        number = start + tl.arange(0, KEYS)
        j = row_of(number, met, T, H, W)
        seen = number < count
        k = _tile(k_head, j, stride_kl, seen, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
        scores = tl.where(seen[None, :], scores, -float("inf"))
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
    valid_length = length
    if HAS_LENGTHS:
        valid_length = tl.load(kv_len_ptr + b).to(tl.int32)
    own, met, first, after, valid_after, count = place(
        windows_ptr, n, length, T, H, W, tile_t, tile_h, tile_w, valid_length, QUERIES, False
    )
    if first >= after:
        return
    numbers = first + tl.arange(0, QUERIES)
    l = row_of(numbers, own, T, H, W)
    exists, valid = numbers < after, numbers < valid_after
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
        j = row_of(number, met, T, H, W)
        seen = number < count
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
    valid_length = length
    if HAS_LENGTHS:
        valid_length = tl.load(kv_len_ptr + b).to(tl.int32)
    own, met, first, after, valid_after, count = place(
        windows_ptr, n, length, T, H, W, tile_t, tile_h, tile_w, valid_length, KEYS, True
    )
    if first >= after:
        return
    numbers = first + tl.arange(0, KEYS)
    j = row_of(numbers, own, T, H, W)
    exists, valid = numbers < after, numbers < valid_after
    k = _tile(k_ptr + b * stride_kb + n * stride_kn, j, stride_kl, valid, D, BLOCK_D)
    v = _tile(v_ptr + b * stride_vb + n * stride_vn, j, stride_vl, valid, D, BLOCK_D)
    q_head = q_ptr + b * stride_qb + n * stride_qn
    dout_head = dout_ptr + b * stride_db + n * stride_dn
    sample = (b * num_heads + n) * length

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for start in range(0, count, QUERIES):
        number = start + tl.arange(0, QUERIES)
        l = row_of(number, met, T, H, W)
        seeing = number < count
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
