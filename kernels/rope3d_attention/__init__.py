"""Joint video and text attention with rotary positions on the video tokens.

With the tokens of a sample laid out as ``[video, text, padding]``, ``n = kv_len[b]`` of them valid,

    S = scale * rot(q) rot(k)^T        (n x n), scale = 1/sqrt(D) unless given
    lse_i = log sum_j exp(S_ij)        P = exp(S - lse)
    out = P v                          rows n.. of out are 0, of lse -inf

and backwards, with ``delta_i = sum_d dout_id out_id``,

    dv = P^T dout              dP = dout v^T              dS = P * (dP - delta)
    dq = scale dS k            dk = scale dS^T q

Attention is not causal: every valid token sees every valid token. Rows past ``kv_len`` take no
part: whatever they hold, NaN included, reaches neither an output nor a gradient, and their own
gradients are zero. A sample with ``kv_len`` 0 yields zeros. There is no mask tensor in the
contract, because a mask rules out the fast kernels.

**Queries of their own.** With ``q_len``, q (B, Lq, N, D) asks keys and values (B, Lk, N, D) of
other tokens: of another rank in ring attention, or of another part of a frame. Of sample b the
first ``q_len[b]`` queries see the first ``kv_len[b]`` keys, all Lk without ``kv_len``;
a row of out past the queries is 0, of lse -inf, and so is every row of a sample without keys. out,
dout and dq are like q, dk and dv like k, lse is ``(B, N, Lq)``. Without ``q_len`` queries are the
tokens of the keys.

backward may be given out and lse of a softmax over more keys than these: attention over parts of
the keys, merged. Then P sums to less than 1, delta is of the merged out, and the gradients are the
share of these keys: dk and dv of parts beside each other, and dq added up, are those of the whole.
Where lse is -inf, no key was seen at all, and the row takes no part.

Rotation is the three-axis rotary embedding of HunyuanVideo (technical report, section 4.2):
features ``(2i, 2i+1)`` form a pair, in fp32, on video tokens only, axes in the order (t, h, w).

Shapes: q, k, v, out ``(B, L, N, D)``; lse ``(B, N, L)`` fp32 (fp64 for fp64 inputs); kv_len and
q_len ``(B,)``; cos, sin ``(num_video_tokens, D)``, every angle repeated for the two features of a
pair.

Every implementation has
``forward(q, k, v, kv_len, scale, out=None, q_len=None) -> (out, lse)``,
``backward(dout, out, lse, q, k, v, kv_len, scale, q_len=None) -> (dq, dk, dv)`` and
``supports(q, k, v, kv_len, scale, out=None, q_len=None)``; lse is exchangeable between
implementations.
"""
