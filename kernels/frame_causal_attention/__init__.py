"""Attention in which a token sees every token of its own frame and of earlier frames.

The tokens of a clip come frame by frame, S of them each. The queries are the last Lq of the Lk
tokens that have keys and values, whole frames all: query i stands in frame f_i = (Lk - Lq + i) // S
and sees the keys j < n_i = (f_i + 1) S.

    A_ij = scale * q_i k_j, j < n_i             scale = 1/sqrt(D) unless given
    lse_i = log sum_j exp(A_ij)                 P_ij = exp(A_ij - lse_i)
    out_i = sum_j P_ij v_j

and backwards, with ``delta_i = sum_d dout_id out_id``,

    dv = P^T dout              dP = dout v^T              dA = P * (dP - delta)
    dq = scale dA k            dk = scale dA^T q

All queries of a frame see the same keys, the first n of the clip. So nobody builds a mask, which
for 17 frames of 32 x 32 latents would have 17,408 x 17,408 entries: an implementation takes the
queries of one frame, in blocks, through the keys that they see, and what memory holds grows with
the number of tokens. Later frames are not read for the outputs of earlier ones: whatever they hold,
NaN included, does not reach them. Gradients of keys and values are sums over their own frame and
all later ones.

**Some queries of every frame.** With ``query_tokens`` a frame has that many queries, R of them, and
S keys all the same: whoever holds a part of every frame asks the whole frames of all. The queries
are then those of the last Lq / R frames, and query i stands in frame Lk / S - Lq / R + i // R.

Shapes: q, out ``(B, Lq, N, D)``; k, v ``(B, Lk, N, D)``, no fewer frames than those of the queries;
lse ``(B, N, Lq)``, fp32 (fp64 for fp64 inputs).

Every implementation has
``forward(q, k, v, tokens_per_frame, scale, query_tokens=None) -> (out, lse)``,
``backward(dout, out, lse, q, k, v, tokens_per_frame, scale, query_tokens=None) -> (dq, dk, dv)``
and ``supports(q, k, v, tokens_per_frame, scale, query_tokens=None)``; lse is exchangeable between
implementations.
"""
