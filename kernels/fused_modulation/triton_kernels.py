"""The Triton kernels: one program per row forward, per chunk of rows backward.

A row is read once and stays in registers. A pointer that is None says that the call has no such
tensor: Triton takes it for a constant, and what depends on it is left out.
"""

import triton
import triton.language as tl


@triton.jit
def _load_row(row_ptr, e, inside):
    """A row that is read once, in fp32; zero in the lanes past its end."""
    return tl.load(row_ptr + e, mask=inside, other=0.0, eviction_policy="evict_first").to(
        tl.float32
    )


@triton.jit
def _load_vector(vector_ptr, e, inside):
    """A vector in fp32. Every program of a sample reads it: it stays in the first-level cache."""
    return tl.load(vector_ptr + e, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    index_ptr,
    residual_ptr,
    modulated_ptr,
    mean_ptr,
    rstd_ptr,
    length,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_gate_b,
    stride_gate_m,
    stride_shift_b,
    stride_shift_m,
    stride_scale_b,
    stride_scale_m,
    stride_index_b,
    stride_index_l,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A row of residual and of modulated, and its mean and rstd."""
    # int64: a row may start past element 2^31.
    row = tl.program_id(0).to(tl.int64)
    b = row // length
    l = row % length
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    m = b * 0
    if index_ptr is not None:
        m = tl.load(index_ptr + b * stride_index_b + l * stride_index_l).to(tl.int64)

    x = _load_row(x_ptr + b * stride_xb + l * stride_xl, e, inside)
    if gate_ptr is not None:
        y = _load_row(y_ptr + b * stride_yb + l * stride_yl, e, inside)
        gate = _load_vector(gate_ptr + b * stride_gate_b + m * stride_gate_m, e, inside)
        residual = (x + gate * y).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * E + e, residual, mask=inside)
        x = residual.to(tl.float32)  # as it was rounded

    if scale_ptr is not None:
        mean = tl.div_rn(tl.sum(x, axis=0), E * 1.0)
        centred = tl.where(inside, x - mean, 0.0)
        variance = tl.div_rn(tl.sum(centred * centred, axis=0), E * 1.0)
        rstd = tl.rsqrt(variance + eps)
        scale = _load_vector(scale_ptr + b * stride_scale_b + m * stride_scale_m, e, inside)
        shift = _load_vector(shift_ptr + b * stride_shift_b + m * stride_shift_m, e, inside)
        modulated = centred * rstd * (1.0 + scale) + shift
        modulated = modulated.to(modulated_ptr.dtype.element_ty)
        tl.store(modulated_ptr + row * E + e, modulated, mask=inside)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def _add_run(partial_ptr, total, inside):
    """Adds the sum over a run of tokens of one vector to what earlier runs have left."""
    tl.store(partial_ptr, tl.load(partial_ptr, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def backward_kernel(
    dresidual_ptr,
    dmodulated_ptr,
    residual_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    index_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dy_ptr,
    partials_ptr,
    length,
    num_chunks,
    chunk_rows,
    num_vectors,
    stride_drb,
    stride_drl,
    stride_dmb,
    stride_dml,
    stride_rb,
    stride_rl,
    stride_yb,
    stride_yl,
    stride_gate_b,
    stride_gate_m,
    stride_scale_b,
    stride_scale_m,
    stride_index_b,
    stride_index_l,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The rows of a chunk of dx and dy, and their sums for each vector in ``partials``."""
    NORM: tl.constexpr = scale_ptr is not None
    DY: tl.constexpr = dy_ptr is not None
    DGATE: tl.constexpr = y_ptr is not None
    INDEXED: tl.constexpr = index_ptr is not None
    # With both halves registers are dear: the vectors are read again for every row, from a cache.
    HOLD: tl.constexpr = (not INDEXED) and not (NORM and (DY or DGATE))
    NUM_SUMS: tl.constexpr = (2 if NORM else 0) + (1 if DGATE else 0)

    chunk = tl.program_id(0).to(tl.int64)
    b = chunk // num_chunks
    first = (chunk % num_chunks) * chunk_rows
    num_rows = tl.minimum(chunk_rows, length - first)
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    zero = b * 0
    columns = zero + num_vectors * E
    if NUM_SUMS > 0:
        partial = partials_ptr + chunk * NUM_SUMS * columns + e

    dshift = tl.zeros([BLOCK_E], dtype=tl.float32)
    dscale = tl.zeros([BLOCK_E], dtype=tl.float32)
    dgate = tl.zeros([BLOCK_E], dtype=tl.float32)
    m = zero
    if INDEXED:
        m = tl.load(index_ptr + b * stride_index_b + first * stride_index_l).to(tl.int64)
    if HOLD and NORM:
        gain = 1.0 + _load_vector(scale_ptr + b * stride_scale_b, e, inside)
    if HOLD and DY:
        gate = _load_vector(gate_ptr + b * stride_gate_b, e, inside)
    for step in range(num_rows):
        l = first + step  # int64, which the counter of a loop need not be
        row = b * length + l
        if INDEXED:
            own = tl.load(index_ptr + b * stride_index_b + l * stride_index_l).to(tl.int64)
            if own != m:
                if NORM:
                    _add_run(partial + m * E, dshift, inside)
                    _add_run(partial + columns + m * E, dscale, inside)
                    dshift = tl.zeros([BLOCK_E], dtype=tl.float32)
                    dscale = tl.zeros([BLOCK_E], dtype=tl.float32)
                if DGATE:
                    _add_run(partial + (NUM_SUMS - 1) * columns + m * E, dgate, inside)
                    dgate = tl.zeros([BLOCK_E], dtype=tl.float32)
                tl.debug_barrier()  # the next run may belong to this vector again
                m = own
        if NORM:
            if not HOLD:
                scale_row = scale_ptr + b * stride_scale_b + m * stride_scale_m
                gain = 1.0 + _load_vector(scale_row, e, inside)
            d = _load_row(dmodulated_ptr + b * stride_dmb + l * stride_dml, e, inside)
            x = _load_row(residual_ptr + b * stride_rb + l * stride_rl, e, inside)
            rstd = tl.load(rstd_ptr + row)
            normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
            dshift += d
            dscale += d * normed
            g = d * gain
            mean_g = tl.sum(g, axis=0) * (1.0 / E)
            mean_gn = tl.sum(g * normed, axis=0) * (1.0 / E)
            total = (g - mean_g - normed * mean_gn) * rstd
            if dresidual_ptr is not None:
                total += _load_row(dresidual_ptr + b * stride_drb + l * stride_drl, e, inside)
            tl.store(dx_ptr + row * E + e, total.to(dx_ptr.dtype.element_ty), mask=inside)
        else:
            total = _load_row(dresidual_ptr + b * stride_drb + l * stride_drl, e, inside)
        if DY:
            if not HOLD:
                gate = _load_vector(gate_ptr + b * stride_gate_b + m * stride_gate_m, e, inside)
            dy = (gate * total).to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + row * E + e, dy, mask=inside)
        if DGATE:
            y = _load_row(y_ptr + b * stride_yb + l * stride_yl, e, inside)
            dgate += total * y
    if INDEXED:
        if NORM:
            _add_run(partial + m * E, dshift, inside)
            _add_run(partial + columns + m * E, dscale, inside)
        if DGATE:
            _add_run(partial + (NUM_SUMS - 1) * columns + m * E, dgate, inside)
    else:
        if NORM:
            tl.store(partial, dshift, mask=inside)
            tl.store(partial + columns, dscale, mask=inside)
        if DGATE:
            tl.store(partial + (NUM_SUMS - 1) * columns, dgate, mask=inside)


@triton.jit
def _add_chunks(
    partial_ptr,
    out_ptr,
    num_chunks,
    step,
    inside,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    total = tl.zeros([BLOCK_E], dtype=tl.float32)
    for start in range(0, num_chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < num_chunks)[:, None] & inside[None, :]
        part = tl.load(partial_ptr[None, :] + chunk[:, None] * step, mask=mask, other=0.0)
        total += tl.sum(part, axis=0)
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(
    partials_ptr,
    dshift_ptr,
    dscale_ptr,
    dgate_ptr,
    num_chunks,
    columns,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """partials (B, num_chunks, sums, columns) -> dshift, dscale, dgate (B, columns)."""
    NORM: tl.constexpr = dshift_ptr is not None
    DGATE: tl.constexpr = dgate_ptr is not None
    NUM_SUMS: tl.constexpr = (2 if NORM else 0) + (1 if DGATE else 0)
    blocks = tl.cdiv(columns, BLOCK_E)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < columns
    step = b * 0 + columns * NUM_SUMS
    partial = partials_ptr + b * num_chunks * step + e
    out = b * columns + e
    if NORM:
        _add_chunks(partial, dshift_ptr + out, num_chunks, step, inside, BLOCK_CHUNKS, BLOCK_E)
        partial += columns
        _add_chunks(partial, dscale_ptr + out, num_chunks, step, inside, BLOCK_CHUNKS, BLOCK_E)
        partial += columns
    if DGATE:
        _add_chunks(partial, dgate_ptr + out, num_chunks, step, inside, BLOCK_CHUNKS, BLOCK_E)
