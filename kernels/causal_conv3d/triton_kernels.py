"""Implicit matrix products over channels-last maps: a program makes a tile of positions x channels.

No padded and no repeated map exists: the frame, row and column of a tap are computed per position
and clamped into [past, x]. Along an axis that is doubled (F* = 2) the positions are those of the
map before it, and a phase is one parity of the outputs with a kernel of its own. Offsets of
elements are int64; positions of a sample fit 32 bits.

Names: LEAD taps stand before a position, phase p begins p * SHIFT later; STEP is the stride.
"""

import triton
import triton.language as tl


@triton.jit
def _phase(program, FT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr):
    """The parities (t, h, w) of a phase, columns fastest."""
    return program // (FH * FW), (program // FW) % FH, program % FW


@triton.jit
def _clip_rows(
    x_ptr,
    past_ptr,
    b,
    frame,
    row,
    column,
    height,
    width,
    x_strides,
    past_strides,
    PAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pointers to the channels of the nearest position in [past, x]; past is below frame zero.

    ALIGNED: all of them are multiples of 16 bytes. Of a choice between two the compiler does not
    see it by itself, and would read value by value.
    """
    f = tl.maximum(frame, -PAST)
    r = tl.minimum(tl.maximum(row, 0), height - 1).to(tl.int64)
    c = tl.minimum(tl.maximum(column, 0), width - 1).to(tl.int64)
    t = f.to(tl.int64)
    at = b * x_strides[0] + t * x_strides[1]
    pointers = x_ptr + (at + r * x_strides[2] + c * x_strides[3])
    if PAST > 0:
        before = b * past_strides[0] + (t + PAST) * past_strides[1]
        before += r * past_strides[2] + c * past_strides[3]
        pointers = tl.where(f < 0, past_ptr + before, pointers)
        if ALIGNED:
            pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def forward_kernel(
    x_ptr,
    past_ptr,
    weight_ptr,  # (phases, taps, C, OUT_PAD)
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,  # (B, T', H', W', OUT) in memory
    frames,
    height,
    width,
    out_frames,
    out_height,
    out_width,
    tiles_n,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_xw,
    stride_pb,
    stride_pt,
    stride_ph,
    stride_pw,
    stride_rb,
    stride_rt,
    stride_rh,
    stride_rw,
    C: tl.constexpr,
    OUT: tl.constexpr,
    OUT_PAD: tl.constexpr,
    PAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STEP_T: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    LEAD_T: tl.constexpr,
    LEAD_H: tl.constexpr,
    LEAD_W: tl.constexpr,
    FT: tl.constexpr,
    FH: tl.constexpr,
    FW: tl.constexpr,
    SHIFT_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one phase of y: all taps and channels, then bias, residual and one rounding."""
    phase = tl.program_id(2)
    pt, ph, pw = _phase(phase, FT, FH, FW)
    b = tl.program_id(1).to(tl.int64)
    # the outputs of this phase
    rows = (out_height - ph + FH - 1) // FH
    columns = (out_width - pw + FW - 1) // FW
    positions = ((out_frames - pt + FT - 1) // FT) * rows * columns
    first = (tl.program_id(0) // tiles_n) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    position = tl.minimum(m, positions - 1)
    column = position % columns
    row = (position // columns) % rows
    frame = position // (columns * rows)
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)

    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = KT * KH * KW
    EVEN: tl.constexpr = C % BLOCK_K == 0
    weights = weight_ptr + phase.to(tl.int64) * (TAPS * C * OUT_PAD)
    x_strides = (stride_xb, stride_xt, stride_xh, stride_xw)
    past_strides = (stride_pb, stride_pt, stride_ph, stride_pw)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(TAPS * CHANNEL_BLOCKS):
        tap = step // CHANNEL_BLOCKS
        c = (step % CHANNEL_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        f = frame * STEP_T + (tap // (KH * KW) - LEAD_T + pt * SHIFT_T)
        r = row * STEP_H + ((tap // KW) % KH - LEAD_H + ph)
        q = column * STEP_W + (tap % KW - LEAD_W + pw)
        met = _clip_rows(
            x_ptr, past_ptr, b, f, r, q, height, width, x_strides, past_strides, PAST, ALIGNED
        )
        at_x = met[:, None] + c[None, :]
        at_w = weights + (tap * C + c)[:, None] * OUT_PAD + n[None, :]
        if EVEN:
            z = tl.load(at_x)
            w = tl.load(at_w)
        else:
            z = tl.load(at_x, mask=(c < C)[None, :], other=0.0)
            w = tl.load(at_w, mask=(c < C)[:, None], other=0.0)
        if ACTIVATED:
            inside = c < C
            gain = tl.load(scale_ptr + b * C + c, mask=inside, other=0.0)
            offset = tl.load(shift_ptr + b * C + c, mask=inside, other=0.0)
            u = z.to(tl.float32) * gain[None, :] + offset[None, :]
            z = (u * tl.sigmoid(u)).to(x_ptr.dtype.element_ty)
        total = tl.dot(z, w, total, input_precision="ieee")

    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < OUT, other=0.0).to(tl.float32)
        total += bias[None, :]
    f = (frame * FT + pt).to(tl.int64)
    r = (row * FH + ph).to(tl.int64)
    q = (column * FW + pw).to(tl.int64)
    mask = (m < positions)[:, None] & (n < OUT)[None, :]
    if HAS_RESIDUAL:
        base = b * stride_rb + f * stride_rt + r * stride_rh + q * stride_rw
        residual = tl.load(residual_ptr + base[:, None] + n[None, :], mask=mask, other=0.0)
        total += residual.to(tl.float32)
    at_y = ((b * out_frames + f) * out_height + r) * out_width + q
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (at_y * OUT)[:, None] + n[None, :], y, mask=mask)


@triton.jit
def _source(place, tap, phase, count, STEP: tl.constexpr, LEAD: tl.constexpr, SHIFT: tl.constexpr):
    """Which of the ``count`` positions of a phase meets a place by a tap, and whether one does."""
    ahead = place + LEAD - tap - phase * SHIFT
    index = ahead // STEP
    meets = (ahead >= 0) & (index * STEP == ahead) & (index < count)
    return tl.where(meets, index, 0), meets


@triton.jit
def input_gradient_kernel(
    dy_ptr,
    weight_ptr,  # (phases, taps, OUT, C_PAD)
    dx_ptr,  # (B, T, H, W, C) in memory, of x or of past
    frames,  # of dx
    height,
    width,
    out_frames,
    out_height,
    out_width,
    first_frame,  # the box of places that this launch is for; frames of past are below zero
    first_row,
    first_column,
    box_frames,
    box_rows,
    box_columns,
    from_frame,  # what else of the padded map each place stands for, as offsets
    from_row,
    from_column,
    folds_frame,
    folds_row,
    folds_column,
    tiles_n,
    stride_b,  # of dy
    stride_t,
    stride_h,
    stride_w,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    OUT: tl.constexpr,
    PAST: tl.constexpr,  # added to a frame, it is that of dx
    EDGE: tl.constexpr,  # whether places stand for others
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STEP_T: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    LEAD_T: tl.constexpr,
    LEAD_H: tl.constexpr,
    LEAD_W: tl.constexpr,
    FT: tl.constexpr,
    FH: tl.constexpr,
    FW: tl.constexpr,
    SHIFT_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A gather: every place sums over the outputs that have met it, or what it stands for."""
    b = tl.program_id(1).to(tl.int64)
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    places = box_frames * box_rows * box_columns
    place = tl.minimum(m, places - 1)
    column = first_column + place % box_columns
    row = first_row + (place // box_columns) % box_rows
    frame = first_frame + place // (box_columns * box_rows)
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)

    BLOCKS: tl.constexpr = (OUT + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = KT * KH * KW
    PHASES: tl.constexpr = FT * FH * FW
    folds = folds_frame * folds_row * folds_column
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(folds * PHASES * TAPS * BLOCKS):
        o = (step % BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = (step // BLOCKS) % TAPS
        phase = (step // (BLOCKS * TAPS)) % PHASES
        fold = step // (BLOCKS * TAPS * PHASES)
        pt, ph, pw = _phase(phase, FT, FH, FW)
        kt = tap // (KH * KW)
        kh = (tap // KW) % KH
        kw = tap % KW
        df = from_frame + fold // (folds_row * folds_column)
        dr = from_row + (fold // folds_column) % folds_row
        dq = from_column + fold % folds_column
        count_t = (out_frames - pt + FT - 1) // FT
        count_h = (out_height - ph + FH - 1) // FH
        count_w = (out_width - pw + FW - 1) // FW
        needed = True
        if EDGE:
            # an axis on which places stand for others has one place: most taps miss it
            _, by_f = _source(first_frame + df, kt, pt, count_t, STEP_T, LEAD_T, SHIFT_T)
            _, by_r = _source(first_row + dr, kh, ph, count_h, STEP_H, LEAD_H, 1)
            _, by_q = _source(first_column + dq, kw, pw, count_w, STEP_W, LEAD_W, 1)
            needed = (by_f | (folds_frame == 1)) & (by_r | (folds_row == 1))
            needed = needed & (by_q | (folds_column == 1))
        if needed:
            f, in_f = _source(frame + df, kt, pt, count_t, STEP_T, LEAD_T, SHIFT_T)
            r, in_r = _source(row + dr, kh, ph, count_h, STEP_H, LEAD_H, 1)
            q, in_q = _source(column + dq, kw, pw, count_w, STEP_W, LEAD_W, 1)
            at = b * stride_b + (f * FT + pt).to(tl.int64) * stride_t
            at += (r * FH + ph).to(tl.int64) * stride_h + (q * FW + pw).to(tl.int64) * stride_w
            mask = (in_f & in_r & in_q)[:, None] & (o < OUT)[None, :]
            g = tl.load(dy_ptr + at[:, None] + o[None, :], mask=mask, other=0.0)
            at_w = (phase * TAPS + tap) * OUT + o
            at_w = at_w.to(tl.int64)[:, None] * C_PAD + n[None, :]
            w = tl.load(weight_ptr + at_w, mask=(o < OUT)[:, None], other=0.0)
            total = tl.dot(g, w, total, input_precision="ieee")

    at = ((b * frames + (frame + PAST)) * height + row) * width + column
    mask = (m < places)[:, None] & (n < C)[None, :]
    dx = total.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + (at * C)[:, None] + n[None, :], dx, mask=mask)


@triton.jit
def weight_gradient_kernel(
    dy_ptr,
    x_ptr,
    past_ptr,
    partials_ptr,  # (splits, phases, taps, C, OUT) fp32
    batch,
    height,
    width,
    out_frames,
    out_height,
    out_width,
    tiles_n,
    chunk,  # positions of one split
    stride_b,  # of dy
    stride_t,
    stride_h,
    stride_w,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_xw,
    stride_pb,
    stride_pt,
    stride_ph,
    stride_pw,
    C: tl.constexpr,
    OUT: tl.constexpr,
    PAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STEP_T: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    LEAD_T: tl.constexpr,
    LEAD_H: tl.constexpr,
    LEAD_W: tl.constexpr,
    FT: tl.constexpr,
    FH: tl.constexpr,
    FW: tl.constexpr,
    SHIFT_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tap of one phase: BLOCK_M channels of x times BLOCK_N of dy, summed over a chunk."""
    TAPS: tl.constexpr = KT * KH * KW
    PHASES: tl.constexpr = FT * FH * FW
    phase = tl.program_id(1) // TAPS
    tap = tl.program_id(1) % TAPS
    pt, ph, pw = _phase(phase, FT, FH, FW)
    rows = (out_height - ph + FH - 1) // FH
    columns = (out_width - pw + FW - 1) // FW
    of_sample = ((out_frames - pt + FT - 1) // FT) * rows * columns
    c = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)

    x_strides = (stride_xb, stride_xt, stride_xh, stride_xw)
    past_strides = (stride_pb, stride_pt, stride_ph, stride_pw)
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, batch * of_sample)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        valid = k < end
        k = tl.minimum(k, end - 1)
        column = k % columns
        row = (k // columns) % rows
        frame = (k // (columns * rows)) % (of_sample // (columns * rows))
        b = (k // of_sample).to(tl.int64)
        f = frame * STEP_T + (tap // (KH * KW) - LEAD_T + pt * SHIFT_T)
        r = row * STEP_H + ((tap // KW) % KH - LEAD_H + ph)
        q = column * STEP_W + (tap % KW - LEAD_W + pw)
        met = _clip_rows(
            x_ptr, past_ptr, b, f, r, q, height, width, x_strides, past_strides, PAST, ALIGNED
        )
        mask = valid[:, None]
        z = tl.load(met[:, None] + c[None, :], mask=mask & (c < C)[None, :], other=0.0)
        at = b * stride_b + (frame * FT + pt).to(tl.int64) * stride_t
        at += (row * FH + ph).to(tl.int64) * stride_h + (column * FW + pw).to(tl.int64) * stride_w
        g = tl.load(dy_ptr + at[:, None] + n[None, :], mask=mask & (n < OUT)[None, :], other=0.0)
        total = tl.dot(tl.trans(z), g, total, input_precision="ieee")

    part = (tl.program_id(2) * PHASES * TAPS + tl.program_id(1)).to(tl.int64)
    at = (part * C + c)[:, None] * OUT + n[None, :]
    tl.store(partials_ptr + at, total, mask=(c < C)[:, None] & (n < OUT)[None, :])


@triton.jit
def reduce_kernel(
    partials_ptr,
    sums_ptr,
    num_parts,
    size,
    BLOCK: tl.constexpr,
):
    """partials (num_parts, size) -> sums (size,), part after part."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(num_parts):
        at = partials_ptr + tl.cast(part, tl.int64) * size + e
        sums += tl.load(at, mask=inside, other=0.0)
    tl.store(sums_ptr + e, sums, mask=inside)
