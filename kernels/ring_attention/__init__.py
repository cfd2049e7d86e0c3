"""Attention over two parts of the keys, merged into attention over both.

Ring attention sees the keys in parts, one from each process. A part gives out_i = P_i v_i and the
log-sum-exp lse_i of its scores, for every row; two parts make the whole:

    m = max(lse_1, lse_2)          w_i = exp(lse_i - m)        s = w_1 + w_2
    out = (w_1 out_1 + w_2 out_2) / s                          lse = m + log(s)

and backwards, with p_i = w_i / s and delta = sum_d dout_d (out_1 - out_2)_d,

    dout_i = p_i dout          dlse_1 = p_1 dlse + p_1 p_2 delta
                               dlse_2 = p_2 dlse - p_1 p_2 delta

A row that has seen no key in a part has lse_i = -inf there: what out_i holds, NaN included, is then
without effect, and its gradients are zero. Where both are -inf, out is 0 and lse -inf: there is
never a NaN that was not in what counts. Everything is computed in the dtype of the accumulator:
fp32, or float64 when it is. A part may have any dtype, and is rounded nowhere.

    forward(out, lse, part, part_lse, in_place=False) -> (out, lse)
        out (B, L, N, D) and lse (B, N, L) of the accumulator's dtype; part (B, L, N, D) of any
        strides, part_lse (B, N, L) like lse
        in_place: results take the place of out and lse, which may be of any strides
    backward(dout, dlse, out, lse, part, part_lse) -> (dout_1, dlse_1, dpart, dpart_lse)
        of out and lse before the merge; dlse may be None
    supports(out, lse, part, part_lse, in_place=False) -> None, or why not

The results are contiguous where they are new. The ring itself, which is written in terms of this
and of ``rope3d_attention``, is in ``hunyuan_fast.ops.ring_attention``.
"""
