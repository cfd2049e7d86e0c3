"""The Triton kernels: sums over a head, codes of its tokens, attention over codes.

A program has one head of one sample in the second index of the grid. Tokens past the valid ones
are never read. Offsets are int64: a row may start past element 2^31.
"""

import triton
import triton.language as tl

from hunyuan_fast.kernels.fp8_attention import reference

LARGEST = tl.constexpr(reference.LARGEST)
LEAST_PEAK = tl.constexpr(reference.LEAST_PEAK)
LEAST_SCALE = tl.constexpr(reference.LEAST_SCALE)
TOP_LOG2 = tl.constexpr(reference.TOP_LOG2)
GROUP = tl.constexpr(reference.GROUP)
QUERY_BLOCK = tl.constexpr(reference.QUERY_BLOCK)
KEY_BLOCK = tl.constexpr(reference.KEY_BLOCK)


@triton.jit
def _head(num_heads):
    """Sample and head of this program."""
    bn = tl.program_id(1)
    return (bn // num_heads).to(tl.int64), (bn % num_heads).to(tl.int64)


@triton.jit
def _valid(kv_len_ptr, b, length):
    """The number of valid tokens of a sample."""
    if kv_len_ptr is None:
        return length
    return tl.load(kv_len_ptr + b).to(tl.int32)


@triton.jit
def _tile(ptr, rows, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head in fp32, zeros where masked."""
    d = tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (d < D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _butterfly(x, ROWS: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr):
    """Sums and differences of features that are STEP apart."""
    pairs = tl.reshape(x, (ROWS, LANES // (2 * STEP), 2, STEP))
    first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
    return tl.reshape(pairs, (ROWS, LANES))


@triton.jit
def statistics_kernel(
    k_ptr,
    v_ptr,
    kv_len_ptr,
    parts_ptr,  # (4, B * N, chunks, D): sums of k and v, least and largest v
    num_heads,
    length,
    chunks,
    stride_kb,
    stride_kl,
    stride_kn,
    stride_vb,
    stride_vl,
    stride_vn,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """What a chunk of tokens adds to the statistics of its head."""
    b, n = _head(num_heads)
    valid = _valid(kv_len_ptr, b, length)
    k_head = k_ptr + b * stride_kb + n * stride_kn
    v_head = v_ptr + b * stride_vb + n * stride_vn
    key_sum = tl.zeros([BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_D], tl.float32)
    least = tl.full([BLOCK_D], float("inf"), tl.float32)
    largest = tl.full([BLOCK_D], -float("inf"), tl.float32)
    first = tl.program_id(0) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, valid), STEP):
        rows = start + tl.arange(0, STEP)
        seen = rows < valid
        key_sum += tl.sum(_tile(k_head, rows, stride_kl, seen, D, BLOCK_D), axis=0)
        v = _tile(v_head, rows, stride_vl, seen, D, BLOCK_D)
        value_sum += tl.sum(v, axis=0)
        least = tl.minimum(least, tl.min(tl.where(seen[:, None], v, float("inf")), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(seen[:, None], v, -float("inf")), axis=0))

    d = tl.arange(0, BLOCK_D)
    part = tl.num_programs(1).to(tl.int64) * chunks * D
    at = parts_ptr + (tl.program_id(1).to(tl.int64) * chunks + tl.program_id(0)) * D + d
    tl.store(at, key_sum, mask=d < D)
    tl.store(at + part, value_sum, mask=d < D)
    tl.store(at + 2 * part, least, mask=d < D)
    tl.store(at + 3 * part, largest, mask=d < D)


@triton.jit
def merge_kernel(
    parts_ptr,
    kv_len_ptr,
    key_mean_ptr,
    value_mean_ptr,
    value_peak_ptr,
    num_heads,
    length,
    chunks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The statistics of a head, of its chunks in order."""
    b, _ = _head(num_heads)
    valid = _valid(kv_len_ptr, b, length)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    part = tl.num_programs(1).to(tl.int64) * chunks * D
    at = parts_ptr + tl.program_id(1).to(tl.int64) * chunks * D + d
    key_sum = tl.zeros([BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_D], tl.float32)
    least = tl.full([BLOCK_D], float("inf"), tl.float32)
    largest = tl.full([BLOCK_D], -float("inf"), tl.float32)
    for _ in range(chunks):
        key_sum += tl.load(at, mask=inside, other=0.0)
        value_sum += tl.load(at + part, mask=inside, other=0.0)
        least = tl.minimum(least, tl.load(at + 2 * part, mask=inside, other=0.0))
        largest = tl.maximum(largest, tl.load(at + 3 * part, mask=inside, other=0.0))
        at += D

    count = tl.maximum(valid, 1).to(tl.float32)
    mean = tl.div_rn(value_sum, count)
    # Rounding keeps order, so these are the largest distances themselves.
    peak = tl.maximum(tl.maximum(largest - mean, mean - least), LEAST_PEAK)
    row = tl.program_id(1) * D + d
    tl.store(key_mean_ptr + row, tl.div_rn(key_sum, count), mask=inside)
    tl.store(value_mean_ptr + row, mean, mask=inside)
    tl.store(value_peak_ptr + row, peak, mask=inside)


@triton.jit
def rows_kernel(
    x_ptr,
    mean_ptr,  # (B * N, D), or None
    kv_len_ptr,
    codes_ptr,  # (B * N, padded, D)
    scale_ptr,  # (B * N, padded / ROWS)
    num_heads,
    length,
    padded,
    factor,
    stride_b,
    stride_l,
    stride_n,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,  # of the rotation
):
    """Codes of queries or keys that share a scale: centred, rotated, rounded."""
    b, n = _head(num_heads)
    seen_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = seen_rows < _valid(kv_len_ptr, b, length)
    x = _tile(x_ptr + b * stride_b + n * stride_n, seen_rows, stride_l, seen, D, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    head = tl.program_id(1).to(tl.int64)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + head * D + d, mask=inside, other=0.0)
        x = tl.where(seen[:, None], x - mean[None, :], 0.0)
    for stage in tl.static_range(STAGES):
        x = _butterfly(x, ROWS, BLOCK_D, 1 << stage)
    peak = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), LEAST_PEAK)
    codes = (x * tl.div_rn(LARGEST, peak)).to(tl.float8e4nv)

    at = codes_ptr + (head * padded + seen_rows.to(tl.int64))[:, None] * D + d[None, :]
    tl.store(at, codes, mask=(seen_rows < padded)[:, None] & inside[None, :])
    scales = scale_ptr + head * (padded // ROWS) + tl.program_id(0)
    tl.store(scales, tl.maximum(peak * factor, LEAST_SCALE))


@triton.jit
def values_kernel(
    v_ptr,
    mean_ptr,  # (B * N, D)
    peak_ptr,  # (B * N, D)
    kv_len_ptr,
    codes_ptr,  # (B * N, D, padded)
    num_heads,
    length,
    padded,
    stride_b,
    stride_l,
    stride_n,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Codes of a block of values, every token at its position."""
    b, n = _head(num_heads)
    position = tl.arange(0, KEYS)
    inner = position % GROUP
    token = position - inner + 8 * (inner % 4 // 2) + 2 * (inner // 4) + inner % 2
    token += tl.program_id(0) * KEYS
    seen = token < _valid(kv_len_ptr, b, length)
    v = _tile(v_ptr + b * stride_b + n * stride_n, token, stride_l, seen, D, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    head = tl.program_id(1).to(tl.int64)
    mean = tl.load(mean_ptr + head * D + d, mask=inside, other=0.0)
    peak = tl.load(peak_ptr + head * D + d, mask=inside, other=1.0)
    v = tl.where(seen[:, None], (v - mean[None, :]) * tl.div_rn(LARGEST, peak)[None, :], 0.0)
    codes = tl.trans(v.to(tl.float8e4nv))

    positions = tl.program_id(0) * KEYS + position
    at = codes_ptr + (head * D + d)[:, None] * padded + positions[None, :]
    tl.store(at, codes, mask=inside[:, None])


@triton.jit
def attend_kernel(
    q_ptr,  # (B * N, padded, D)
    q_scale_ptr,
    k_ptr,  # (B * N, padded, D)
    k_scale_ptr,
    v_ptr,  # (B * N, D, padded)
    v_scale_ptr,
    v_mean_ptr,
    kv_len_ptr,
    out_ptr,
    num_heads,
    length,
    padded,
    stride_ob,
    stride_ol,
    stride_on,
    stride_od,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The outputs of a block of queries."""
    b, n = _head(num_heads)
    valid = _valid(kv_len_ptr, b, length)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    first = tl.program_id(0) * QUERIES
    rows = first + tl.arange(0, QUERIES)
    # All of the block past the valid tokens: no key is read, and zeros are written.
    keys = tl.where(first < valid, valid, 0)

    q_at = q_ptr + (head * padded + rows.to(tl.int64))[:, None] * D + d[None, :]
    q = tl.load(q_at, mask=(rows < padded)[:, None] & inside[None, :], other=0.0)
    blocks = padded // QUERY_BLOCK
    q_scale_at = q_scale_ptr + head * blocks + rows // QUERY_BLOCK
    q_scale = tl.load(q_scale_at, mask=rows < padded, other=1.0)

    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, keys, KEYS):
        j = start + tl.arange(0, KEYS)
        k_at = k_ptr + (head * padded + j.to(tl.int64))[None, :] * D + d[:, None]
        k = tl.load(k_at, mask=inside[:, None], other=0.0)
        c = q_scale * tl.load(k_scale_ptr + head * (padded // KEY_BLOCK) + start // KEY_BLOCK)
        scores = tl.dot(q, k)
        if start + KEYS > valid:
            scores = tl.where((j < valid)[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1) * c)
        p = tl.exp2(scores * c[:, None] - (higher - TOP_LOG2)[:, None])
        correction = tl.exp2(highest - higher)
        total = total * correction + tl.sum(p, axis=1)
        # From tokens to positions: where registers hold them as an operand, nothing moves.
        p = tl.reshape(p, (QUERIES, KEYS // GROUP, 2, 4, 2))
        p = tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (QUERIES, KEYS))
        v_at = v_ptr + (head * D + d)[None, :] * padded + j[:, None]
        v = tl.load(v_at, mask=inside[None, :], other=0.0)
        sums = tl.dot(
            p.to(tl.float8e4nv), v, sums * correction[:, None], max_num_imprecise_acc=KEYS
        )
        highest = higher

    v_scale = tl.load(v_scale_ptr + head * D + d, mask=inside, other=0.0)
    v_mean = tl.load(v_mean_ptr + head * D + d, mask=inside, other=0.0)
    inverse = 1.0 / tl.where(total == 0, 1.0, total)  # 0 for rows that saw no key
    result = sums * inverse[:, None] * v_scale[None, :] + v_mean[None, :]
    result = tl.where((rows < valid)[:, None], result, 0.0)
    at = out_ptr + b * stride_ob + n * stride_on + rows.to(tl.int64)[:, None] * stride_ol
    at += d[None, :] * stride_od
    mask = (rows < length)[:, None] & inside[None, :]
    tl.store(at, result.to(out_ptr.dtype.element_ty), mask=mask)
