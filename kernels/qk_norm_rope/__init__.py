"""From packed projections to the heads of joint attention: split, RMS norm, rotation, joining.

A row of qkv holds q, k and v of N heads of D features, ordered (q, k or v; head; feature), as the
matrix product leaves it. For each head x of q, and likewise of k with its own weight,

    rstd = 1 / sqrt(sum(x^2) / D + eps)      n = x rstd      y = n weight
    video rows: out_2i = c y_2i - s y_2i+1   out_2i+1 = s y_2i + c y_2i+1     text rows: out = y

and v is copied. c and s are those of the row and of feature 2i: a pair shares one angle, and only
the even features of the tables are read. Backwards, with the gradient turned back by the angle,

    video rows: u_2i = c g_2i + s g_2i+1     u_2i+1 = c g_2i+1 - s g_2i       text rows: u = g
    dx = rstd (u weight - n sum(u weight n) / D)      dweight = sum over rows and heads of u n

In one stream qkv (B, L, 3ND) holds video rows, then text rows, and the first len(cos) rows are
video. In two streams qkv holds the video rows and text_qkv the text rows, with weights of their
own; the output rows are video, then text. Everything is computed in fp32 whatever the tensors hold,
and rounded once; with qkv in float64 everything is float64.

Unfused, torch writes the normalised, the rotated and the joined tensors to memory and reads them
again; here qkv is read once and q, k, v are written once. Backward keeps nothing but the inputs:
it reads q and k anyway, and finds rstd in them anew, for nothing. The sums over rows are taken in
two stages, over fixed chunks of rows and then over the chunks in order: no atomics, and the same
bits at every run. What a row holds, NaN included, stays in that row of every output and of dqkv;
the gradients of the weights are sums over all rows, padding included, so a NaN anywhere reaches
them.

    forward(qkv, q_weight, k_weight, cos, sin, num_heads, text_qkv, text_q_weight, text_k_weight,
            eps, *, with_q=True) -> q, k, v, each (B, L, N, D) of the joint sequence; None for q
            where it is not wanted
    backward(dq, dk, dv, *the arguments of forward) -> dqkv, dtext_qkv, dweights
    supports(*the arguments of forward) -> None, or why not

dtext_qkv is None in one stream. dweights, fp32, is (2, D), for q and k, or (4, D), followed by
those of the text rows.
"""
