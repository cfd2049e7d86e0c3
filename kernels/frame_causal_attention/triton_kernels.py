"""The Triton kernels: a block of rows of one frame goes through all that it sees, or is seen by.

A block never crosses the end of a frame, so all its rows meet the same keys (or queries), and
nothing but the last tile of those is masked. Scores are kept in units of log 2. Offsets are int64:
a row may start past element 2^31.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(tokens, BLOCK: tl.constexpr):
    """This program's frame, and the first of its rows in that frame."""
    blocks = tl.cdiv(tokens, BLOCK)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK


@triton.jit
def _tile(ptr, rows, stride, mask, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head, from a feature on, zeros where masked."""
    d = first + tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (d < D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(ptr, x, rows, stride, mask, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = first + tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (d < D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    num_heads,
    queries,
    past,  # keys before those of the first query's frame
    tokens,  # queries of a frame
    key_tokens,
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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Log-sum-exp of a block of queries, and VALUES features of their outputs."""
    frame, first = _place(tokens, QUERIES)
    parts = tl.cdiv(D, VALUES)
    b = (tl.program_id(1) // parts // num_heads).to(tl.int64)
    n = (tl.program_id(1) // parts % num_heads).to(tl.int64)
    feature = tl.program_id(1) % parts * VALUES
    # The last frame has the most to do: it goes first.
    frame = queries // tokens - 1 - frame
    inside = first + tl.arange(0, QUERIES)
    l = frame * tokens + inside
    valid = inside < tokens
    visible = past + (frame + 1) * key_tokens
    q = _tile(q_ptr + b * stride_qb + n * stride_qn, l, stride_ql, valid, 0, D, BLOCK_D)
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn

    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, VALUES], tl.float32)
    for start in range(0, visible, KEYS):
        j = start + tl.arange(0, KEYS)
        seen = j < visible
        k = _tile(k_head, j, stride_kl, seen, 0, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        correction = tl.exp2(highest - higher)
        total = total * correction + tl.sum(p, axis=1)
        v = _tile(v_head, j, stride_vl, seen, feature, D, VALUES)
        sums = tl.dot(p.to(v.dtype), v, sums * correction[:, None])
        highest = higher

    row = (b * queries * num_heads + n) * D
    _store(out_ptr + row, sums / total[:, None], l, num_heads * D, valid, feature, D, VALUES)
    lse = (highest + tl.log2(total)) * LN_2
    if feature == 0:
        tl.store(lse_ptr + (b * num_heads + n) * queries + l, lse, mask=valid)


@triton.jit
def query_gradient_kernel(
    dout_ptr,
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    delta_ptr,
    num_heads,
    queries,
    past,
    tokens,
    key_tokens,
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
):
    """dq of a block of queries; and delta, which the other kernel reads."""
    frame, first = _place(tokens, QUERIES)
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    n = (tl.program_id(1) % num_heads).to(tl.int64)
    frame = queries // tokens - 1 - frame
    inside = first + tl.arange(0, QUERIES)
    l = frame * tokens + inside
    valid = inside < tokens
    visible = past + (frame + 1) * key_tokens
    dout = _tile(dout_ptr + b * stride_db + n * stride_dn, l, stride_dl, valid, 0, D, BLOCK_D)
    out = _tile(out_ptr + b * stride_ob + n * stride_on, l, stride_ol, valid, 0, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    row = (b * num_heads + n) * queries
    tl.store(delta_ptr + row + l, delta, mask=valid)
    lse = tl.load(lse_ptr + row + l, mask=valid, other=0.0) * LOG2_E
    q = _tile(q_ptr + b * stride_qb + n * stride_qn, l, stride_ql, valid, 0, D, BLOCK_D)
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn

    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, visible, KEYS):
        j = start + tl.arange(0, KEYS)
        seen = j < visible
        k = _tile(k_head, j, stride_kl, seen, 0, D, BLOCK_D)
        # Keys past the last visible one are zeros, and what is made of them meets zeros again.
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse[:, None])
        v = _tile(v_head, j, stride_vl, seen, 0, D, BLOCK_D)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        ds = tl.where(seen[None, :], ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    head = (b * queries * num_heads + n) * D
    _store(dq_ptr + head, dq * scale, l, num_heads * D, valid, 0, D, BLOCK_D)


@triton.jit
def key_gradient_kernel(
    dout_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dk_ptr,
    dv_ptr,
    num_heads,
    queries,
    past,  # frames
    tokens,
    key_tokens,
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
):
    """dk and dv of a block of keys, from all queries of their frame and of later ones."""
    frame, first = _place(key_tokens, KEYS)
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    n = (tl.program_id(1) % num_heads).to(tl.int64)
    inside = first + tl.arange(0, KEYS)
    j = frame * key_tokens + inside
    valid = inside < key_tokens
    k = _tile(k_ptr + b * stride_kb + n * stride_kn, j, stride_kl, valid, 0, D, BLOCK_D)
    v = _tile(v_ptr + b * stride_vb + n * stride_vn, j, stride_vl, valid, 0, D, BLOCK_D)
    q_head = q_ptr + b * stride_qb + n * stride_qn
    dout_head = dout_ptr + b * stride_db + n * stride_dn
    row = (b * num_heads + n) * queries

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for start in range(tl.maximum(frame - past, 0) * tokens, queries, QUERIES):
        l = start + tl.arange(0, QUERIES)
        seeing = l < queries
        q = _tile(q_head, l, stride_ql, seeing, 0, D, BLOCK_D)
        lse = tl.load(lse_ptr + row + l, mask=seeing, other=0.0) * LOG2_E
        p = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2_E) - lse[None, :])
        p = tl.where(seeing[None, :], p, 0.0)
        dout = _tile(dout_head, l, stride_dl, seeing, 0, D, BLOCK_D)
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + row + l, mask=seeing, other=0.0)
        # This product starts from -delta: a subtraction after it would keep more numbers than
        # there are registers on sm_80.
        ds = p * tl.dot(v, tl.trans(dout), tl.broadcast_to(-delta[None, :], p.shape))
        dk = tl.dot(ds.to(q.dtype), q, dk)
    keys = (past + queries // tokens) * key_tokens
    head = (b * keys * num_heads + n) * D
    _store(dk_ptr + head, dk * scale, j, num_heads * D, valid, 0, D, BLOCK_D)
    _store(dv_ptr + head, dv, j, num_heads * D, valid, 0, D, BLOCK_D)
