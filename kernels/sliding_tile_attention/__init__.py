"""Attention in which video tokens see the tiles around their own, and all of the text.

Tokens of a sample are laid out as everywhere, ``[video, text, padding]``, ``n = kv_len[b]`` of them
valid, the video in raster order on a grid (T, H, W). The grid is cut into tiles of (t, h, w)
tokens; where it is no multiple of them, the last tile along an axis is smaller. Along an axis with
c tiles, a token of tile i sees the tokens of ``m = min(window, c)`` tiles, as far around its own as
the grid allows:

    first(i) = min(max(i - m // 2, 0), c - m)          tiles first(i) .. first(i) + m - 1

A video token sees the video tokens that it sees along all three axes, and every text token; a text
token sees everything. Of all these the valid ones count. Each head has a window of its own. With
``V_i`` what token i sees,

    A_ij = scale * q_i k_j, j in V_i                   scale = 1/sqrt(D) unless given
    lse_i = log sum_j exp(A_ij)                        P_ij = exp(A_ij - lse_i)
    out_i = sum_j P_ij v_j                             rows n.. of out are 0, of lse -inf

and backwards, with ``delta_i = sum_d dout_id out_id``,

    dv = P^T dout              dP = dout v^T           dA = P * (dP - delta)
    dq = scale dA k            dk = scale dA^T q

The tokens of a tile see the same tokens, which form a box of the grid; and those that see a tile
are a box as well. So an implementation walks boxes, whose places follow from the window by
arithmetic: there is no mask and no list of blocks, any grid will do, and a window that covers the
grid gives ``rope3d_attention``. Rows of a head are N D elements apart in raster order already; to
bring those of a tile together would save nothing, and the order of tokens stays what it is.

Rows past ``kv_len`` take no part: whatever they hold, NaN included, reaches neither an output nor
a gradient, and their own gradients are zero.

Source of the pattern: Zhang et al., "Fast Video Generation with Sliding Tile Attention",
arXiv 2502.04507, which asks for grids that are multiples of the tile.

Shapes: q, k, v, out ``(B, L, N, D)``; windows ``(N, 3)`` int32, in tiles along (T, H, W), at least
1; grid, tile three ints each; kv_len ``(B,)``; lse ``(B, N, L)`` fp32 (fp64 for fp64 inputs).

Every implementation has
``forward(q, k, v, windows, grid, tile, kv_len, scale, out=None) -> (out, lse)``,
``backward(dout, out, lse, q, k, v, windows, grid, tile, kv_len, scale) -> (dq, dk, dv)`` and
``supports(q, k, v, windows, grid, tile, kv_len, scale, out=None)``; lse is exchangeable between
implementations.
"""
