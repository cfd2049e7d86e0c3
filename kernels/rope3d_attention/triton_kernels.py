"""The Triton kernels: a block of rows of one head goes through all rows that take part.

Each program reads how many rows of its sample take part: queries, and, where these are not the
tokens of the keys (``q_len_ptr`` is given then), keys. Nothing past them is loaded, blocks past
them do no work, and their results are written as zeros (the log-sum-exp as -inf). The main loops
are free of masks over rows: what is left of the last tile has a loop of its own, of one turn at
most. Scores are kept in units of log 2. Offsets are int64: a row may start past element 2^31.

With ``TMA`` tiles come through tensor descriptors, which each program makes for its head: as many
rows as take part, so that the hardware fills the rest of the last tile with zeros unread.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(num_heads, length, ROWS: tl.constexpr):
    """This program's sample, head and first row."""
    blocks = tl.cdiv(length, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    head = (tl.program_id(0) // blocks).to(tl.int64)
    return head // num_heads, head % num_heads, first


@triton.jit
def taking_part(kv_len_ptr, q_len_ptr, b, length, key_length):
    """How many queries and how many keys of a sample take part: some of both, or none."""
    keys = key_length
    if kv_len_ptr is not None:
        keys = tl.minimum(tl.maximum(tl.load(kv_len_ptr + b), 0), key_length).to(tl.int32)
    queries = keys
    if q_len_ptr is not None:
        queries = tl.minimum(tl.maximum(tl.load(q_len_ptr + b), 0), length).to(tl.int32)
        queries, keys = tl.where(keys > 0, queries, 0), tl.where(queries > 0, keys, 0)
    return queries, keys


@triton.jit
def source(
    ptr,
    end,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    """What ``_tile`` reads from: the rows of a head before ``end``."""
    if TMA:
        # A shape of no rows cannot be described; nothing is read from it.
        rows = tl.make_tensor_descriptor(
            ptr, shape=[tl.maximum(end, 1), D], strides=[stride, 1], block_shape=[ROWS, BLOCK_D]
        )
    else:
        rows = ptr
    return rows


@triton.jit
def tile(
    of,
    start,
    end,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    TAIL: tl.constexpr,
):
    """ROWS rows of a head; those from ``end`` on, which only a TAIL has, are zeros."""
    if TMA:
        x = of.load([start, 0])
    else:
        rows, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        at = (
            of
            + tl.cast(start, tl.int64) * stride
            + rows.to(tl.int64)[:, None] * stride
            + d[None, :]
        )
        inside = (d < D)[None, :]
        if TAIL:
            inside = inside & (rows < end - start)[:, None]
        if TAIL or D < BLOCK_D:
            x = tl.load(at, mask=inside, other=0.0)
        else:
            x = tl.load(at)
    return x


@triton.jit
def rows_of(
    ptr,
    first,
    end,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    """A block of rows of a head, which a program keeps; zeros from row ``end`` on."""
    rows = source(ptr, end, stride, D, BLOCK_D, ROWS, TMA)
    return tile(rows, first, end, stride, D, BLOCK_D, ROWS, TMA, TAIL=True)


@triton.jit
def store(ptr, x, first, end, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows before ``end``, and zeros after it."""
    rows, d = first + tl.arange(0, x.shape[0]), tl.arange(0, BLOCK_D)
    inside = (rows < length)[:, None] & (d < D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    x = tl.where((rows < end)[:, None], x, 0.0)
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weigh(highest, total, scores, score_scale):
    """A tile of scores enters the highest ones and the totals of a block of queries.

    Also returns the weights of the tile, and the factor of all sums so far.
    """
    higher = tl.maximum(highest, tl.max(scores, axis=1) * score_scale)
    p = tl.exp2(scores * score_scale - higher[:, None])
    correction = tl.exp2(highest - higher)
    return higher, total * correction + tl.sum(p, axis=1), p, correction


@triton.jit
def _mask(scores, start, end, KEYS: tl.constexpr):
    return tl.where((tl.arange(0, KEYS) < end - start)[None, :], scores, -float("inf"))


@triton.jit(do_not_specialize=["num_heads", "length", "key_length"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_len_ptr,
    q_len_ptr,
    out_ptr,
    lse_ptr,
    num_heads,
    length,
    key_length,
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
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Outputs and log-sum-exp of a block of queries.

    AHEAD: the scores of the next tile are asked for before those of this one are made use of, so
    that the matrix unit of Hopper has work (this product, and the sums of the tile before) while
    the exponentials are taken. It costs the registers of a second tile of scores.
    """
    b, n, first = place(num_heads, length, QUERIES)
    end, keys = taking_part(kv_len_ptr, q_len_ptr, b, length, key_length)
    q_head = q_ptr + b * stride_qb + n * stride_qn
    q = rows_of(q_head, first, end, stride_ql, D, BLOCK_D, QUERIES, TMA)
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn
    k_rows = source(k_head, keys, stride_kl, D, BLOCK_D, KEYS, TMA)
    v_rows = source(v_head, keys, stride_vl, D, BLOCK_D, KEYS, TMA)
    seen = tl.where(first < end, keys, 0)
    score_scale = scale * LOG2_E

    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if AHEAD:
        last = tl.maximum(tl.cdiv(seen, KEYS) - 1, 0) * KEYS
        # For a block of padding this is past the end, and zeros.
        begin = tl.where(seen > 0, 0, key_length)
        k = tile(k_rows, begin, keys, stride_kl, D, BLOCK_D, KEYS, TMA, TAIL=True)
        scores = tl.dot(q, tl.trans(k))
        for start in range(0, last, KEYS):
            highest, total, p, correction = _weigh(highest, total, scores, score_scale)
            k = tile(k_rows, start + KEYS, keys, stride_kl, D, BLOCK_D, KEYS, TMA, TAIL=True)
            scores = tl.dot(q, tl.trans(k))
            v = tile(v_rows, start, keys, stride_vl, D, BLOCK_D, KEYS, TMA, TAIL=False)
            sums = tl.dot(p.to(v.dtype), v, sums * correction[:, None])
        for start in tl.range(last, seen, KEYS, num_stages=1):
            scores = _mask(scores, start, keys, KEYS)
            highest, total, p, correction = _weigh(highest, total, scores, score_scale)
            v = tile(v_rows, start, keys, stride_vl, D, BLOCK_D, KEYS, TMA, TAIL=True)
            sums = tl.dot(p.to(v.dtype), v, sums * correction[:, None])
    else:
        whole = seen // KEYS * KEYS
        for start in range(0, whole, KEYS):
            k = tile(k_rows, start, keys, stride_kl, D, BLOCK_D, KEYS, TMA, TAIL=False)
            scores = tl.dot(q, tl.trans(k))
            highest, total, p, correction = _weigh(highest, total, scores, score_scale)
            v = tile(v_rows, start, keys, stride_vl, D, BLOCK_D, KEYS, TMA, TAIL=False)
            sums = tl.dot(p.to(v.dtype), v, sums * correction[:, None])
        for start in tl.range(whole, seen, KEYS, num_stages=1):
            k = tile(k_rows, start, keys, stride_kl, D, BLOCK_D, KEYS, TMA, TAIL=True)
            scores = _mask(tl.dot(q, tl.trans(k)), start, keys, KEYS)
            highest, total, p, correction = _weigh(highest, total, scores, score_scale)
            v = tile(v_rows, start, keys, stride_vl, D, BLOCK_D, KEYS, TMA, TAIL=True)
            sums = tl.dot(p.to(v.dtype), v, sums * correction[:, None])

    rows = first + tl.arange(0, QUERIES)
    total = tl.where(rows < end, total, 1.0)  # a block of padding has no total
    out_head = out_ptr + b * stride_ob + n * stride_on
    store(out_head, sums / total[:, None], first, end, length, stride_ol, D, BLOCK_D)
    lse = tl.where(rows < end, (highest + tl.log2(total)) * LN_2, -float("inf"))
    tl.store(lse_ptr + (b * num_heads + n) * length + rows, lse, mask=rows < length)
