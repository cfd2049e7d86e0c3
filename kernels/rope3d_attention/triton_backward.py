"""The gradients, by two kernels that add up in registers and write once: no atomics.

One takes a block of queries through all keys, for dq (three products a tile), the other a block of
keys through all queries, for dk and dv (four). A single kernel would make five products instead of
seven, the scores and the gradients of the probabilities once, but then either dq or dk and dv are
sums over programs: atomics in fp32, L^2 / KEYS x 4 D bytes of them a head, in an order that differs
from run to run. Here every sum is made by one program in a fixed order: the same bits at every run.
"""

import triton
import triton.language as tl

from hunyuan_fast.kernels.rope3d_attention.triton_kernels import (
    LOG2_E,
    place,
    rows_of,
    source,
    store,
    taking_part,
    tile,
)


@triton.jit(do_not_specialize=["num_heads", "length", "key_length"])
def query_gradient_kernel(
    dout_ptr,
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    kv_len_ptr,
    q_len_ptr,
    dq_ptr,
    delta_ptr,
    num_heads,
    length,
    key_length,
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
    TMA: tl.constexpr,
):
    """dq of a block of queries; and delta, which the other kernel reads."""
    b, n, first = place(num_heads, length, QUERIES)
    end, keys = taking_part(kv_len_ptr, q_len_ptr, b, length, key_length)
    out_head = out_ptr + b * stride_ob + n * stride_on
    dout_head = dout_ptr + b * stride_db + n * stride_dn
    q_head = q_ptr + b * stride_qb + n * stride_qn
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn
    row = (b * num_heads + n) * length
    rows = first + tl.arange(0, QUERIES)
    valid = rows < end

    dout = rows_of(dout_head, first, end, stride_dl, D, BLOCK_D, QUERIES, TMA)
    out = rows_of(out_head, first, end, stride_ol, D, BLOCK_D, QUERIES, TMA)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row + rows, delta, mask=valid)
    lse = tl.load(lse_ptr + row + rows, mask=valid, other=0.0) * LOG2_E
    q = rows_of(q_head, first, end, stride_ql, D, BLOCK_D, QUERIES, TMA)
    k_rows = source(k_head, keys, stride_kl, D, BLOCK_D, KEYS, TMA)
    v_rows = source(v_head, keys, stride_vl, D, BLOCK_D, KEYS, TMA)
    seen = tl.where(first < end, keys, 0)
    # Of wide heads every tile is masked: the sums of two loops are more than the registers hold.
    whole = seen // KEYS * KEYS if BLOCK_D <= 128 else 0
    score_scale = scale * LOG2_E

    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, whole, KEYS):
        k = tile(k_rows, start, keys, stride_kl, D, BLOCK_D, KEYS, TMA, TAIL=False)
        v = tile(v_rows, start, keys, stride_vl, D, BLOCK_D, KEYS, TMA, TAIL=False)
        dq = _add_to_dq(dq, q, k, v, dout, lse, delta, score_scale, start, keys, KEYS, TAIL=False)
    for start in tl.range(whole, seen, KEYS, num_stages=1):
        k = tile(k_rows, start, keys, stride_kl, D, BLOCK_D, KEYS, TMA, TAIL=True)
        v = tile(v_rows, start, keys, stride_vl, D, BLOCK_D, KEYS, TMA, TAIL=True)
        dq = _add_to_dq(dq, q, k, v, dout, lse, delta, score_scale, start, keys, KEYS, TAIL=True)
    head = (b * length * num_heads + n) * D
    store(dq_ptr + head, dq * scale, first, end, length, num_heads * D, D, BLOCK_D)


@triton.jit
def _add_to_dq(
    dq, q, k, v, dout, lse, delta, score_scale, start, end, KEYS: tl.constexpr, TAIL: tl.constexpr
):
    """The share of one tile of keys."""
    p = tl.exp2(tl.dot(q, tl.trans(k)) * score_scale - lse[:, None])
    if TAIL:
        # A key past the last one is zeros, and exp2(-lse) may be infinite.
        p = tl.where((tl.arange(0, KEYS) < end - start)[None, :], p, 0.0)
    ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["num_heads", "length", "key_length"])
def key_gradient_kernel(
    dout_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    kv_len_ptr,
    q_len_ptr,
    dk_ptr,
    dv_ptr,
    num_heads,
    length,
    key_length,
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
    TMA: tl.constexpr,
):
    """dk and dv of a block of keys, from all queries that take part."""
    b, n, first = place(num_heads, key_length, KEYS)
    queries, end = taking_part(kv_len_ptr, q_len_ptr, b, length, key_length)
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn
    k = rows_of(k_head, first, end, stride_kl, D, BLOCK_D, KEYS, TMA)
    v = rows_of(v_head, first, end, stride_vl, D, BLOCK_D, KEYS, TMA)
    q_head = q_ptr + b * stride_qb + n * stride_qn
    dout_head = dout_ptr + b * stride_db + n * stride_dn
    q_rows = source(q_head, queries, stride_ql, D, BLOCK_D, QUERIES, TMA)
    dout_rows = source(dout_head, queries, stride_dl, D, BLOCK_D, QUERIES, TMA)
    row = (b * num_heads + n) * length
    lse_row, delta_row = lse_ptr + row, delta_ptr + row
    seeing = tl.where(first < end, queries, 0)
    whole = seeing // QUERIES * QUERIES
    score_scale = scale * LOG2_E

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for start in range(0, whole, QUERIES):
        q = tile(q_rows, start, queries, stride_ql, D, BLOCK_D, QUERIES, TMA, TAIL=False)
        dout = tile(dout_rows, start, queries, stride_dl, D, BLOCK_D, QUERIES, TMA, TAIL=False)
        dk, dv = _add_to_dk_dv(
            dk,
            dv,
            k,
            v,
            q,
            dout,
            lse_row,
            delta_row,
            score_scale,
            start,
            queries,
            QUERIES,
            TAIL=False,
        )
    for start in tl.range(whole, seeing, QUERIES, num_stages=1):
        q = tile(q_rows, start, queries, stride_ql, D, BLOCK_D, QUERIES, TMA, TAIL=True)
        dout = tile(dout_rows, start, queries, stride_dl, D, BLOCK_D, QUERIES, TMA, TAIL=True)
        dk, dv = _add_to_dk_dv(
            dk,
            dv,
            k,
            v,
            q,
            dout,
            lse_row,
            delta_row,
            score_scale,
            start,
            queries,
            QUERIES,
            TAIL=True,
        )
    head = (b * key_length * num_heads + n) * D
    store(dk_ptr + head, dk * scale, first, end, key_length, num_heads * D, D, BLOCK_D)
    store(dv_ptr + head, dv, first, end, key_length, num_heads * D, D, BLOCK_D)


@triton.jit
def _add_to_dk_dv(
    dk,
    dv,
    k,
    v,
    q,
    dout,
    lse_row,
    delta_row,
    score_scale,
    start,
    end,
    QUERIES: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The shares of one tile of queries."""
    # Where no query is, no probability either.
    lse = _row(lse_row, start, end, float("inf"), QUERIES, TAIL)
    p = tl.exp2(tl.dot(k, tl.trans(q)) * score_scale - (lse * LOG2_E)[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv)
    delta = _row(delta_row, start, end, 0.0, QUERIES, TAIL)
    # This product starts from -delta: a subtraction after it would keep 16 registers busy, which
    # Hopper does not have.
    ds = p * tl.dot(v, tl.trans(dout), tl.broadcast_to(-delta[None, :], p.shape))
    return tl.dot(ds.to(q.dtype), q, dk), dv


@triton.jit
def _row(ptr, start, end, other, QUERIES: tl.constexpr, TAIL: tl.constexpr):
    """A number for each of a tile of queries."""
    rows = start + tl.arange(0, QUERIES)
    if TAIL:
        x = tl.load(ptr + rows, mask=rows < end, other=other)
    else:
        x = tl.load(ptr + rows)
    return x
