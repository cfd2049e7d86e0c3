"""Where tokens lie, for the Triton kernels: tiles, the boxes that they see, numbers, rows.

A program numbers the tokens that it meets, those of a box of the grid first and then the text's.
Rows rise with the numbers, within the box and beyond, so that padding comes last.
"""

import triton
import triton.language as tl


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
def _before(row, t, size_t, h, size_h, w, size_w, H, W):
    """How many tokens of a box lie before a row of the video: rows rise with their numbers."""
    on_t, on_h, on_w = row // W // H - t, row // W % H - h, row % W - w
    count = tl.minimum(tl.maximum(on_t, 0), size_t) * size_h * size_w
    on_plane = (on_t >= 0) & (on_t < size_t)
    count += tl.where(on_plane, tl.minimum(tl.maximum(on_h, 0), size_h) * size_w, 0)
    on_line = on_plane & (on_h >= 0) & (on_h < size_h)
    return count + tl.where(on_line, tl.minimum(tl.maximum(on_w, 0), size_w), 0)


@triton.jit
def place(
    windows_ptr,
    n,
    length,
    T,
    H,
    W,
    tile_t,
    tile_h,
    tile_w,
    valid,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """The box of this program's tile and the box that it meets: first row, sides w and h, tokens.

    And numbers of tokens: the program's first, one past the last of its tile, one past the last
    valid one of its tile, and of those it meets (none where the program has no valid token).
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

    video = tl.minimum(valid, T * H * W)
    valid_text = tl.maximum(valid - T * H * W, 0)
    own_valid = _before(video, t, size_t, h, size_h, w, size_w, H, W)
    own_valid = tl.where(is_text, valid_text, own_valid)
    met_valid = _before(video, met_t, met_size_t, met_h, met_size_h, met_w, met_size_w, H, W)
    met_valid = tl.where(first < own_valid, met_valid + valid_text, 0)
    mine, others = (own_row, size_w, size_h, own), (met_row, met_size_w, met_size_h, met)
    return mine, others, first, after, own_valid, met_valid


@triton.jit
def _divide(x, y):
    """x // y for x y < 2^31, which takes two instructions where y is the same for a whole loop.

    The factor is (2^31 + e) / y with e < y, so the product is off by less than x / 2^31 < 1 / y.
    """
    factor = (0x7FFFFFFF // y).to(tl.uint32) + 1
    return tl.umulhi((2 * x).to(tl.uint32), factor).to(tl.int32)


@triton.jit
def row_of(number, box, T, H, W):
    """The row of a token by its number: those of a box come first, then the text's."""
    first, side_w, side_h, count = box
    line = _divide(number, side_w)
    plane = _divide(line, side_h)
    row = first + (plane * H + line - plane * side_h) * W + number - line * side_w
    return tl.where(number < count, row, T * H * W + number - count)
