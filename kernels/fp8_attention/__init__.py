"""Joint attention for inference, with both matrix products over e4m3 codes.

The formula is that of ``rope3d_attention``: with ``n = kv_len[b]`` valid tokens of a sample

    out = softmax(scale q k^T) v, rows n.. of out are 0

and eight bits go where they do least harm. First everything is coded, in three steps:

1. ``statistics``: per head and feature, over the valid tokens, the mean of k, the mean m of v, and
   the largest |v - m|.
2. k loses its mean, which adds the same to all scores of a query and so nothing to the softmax. v
   loses its mean too, which comes back at the end: the weights of a row add up to one.
3. q and k are multiplied by the same Hadamard matrix H, with H H^T = P 1: their products grow by P
   alone, and a feature that stands out is spread over all.

    q8 = e4m3(H q 448 / peak)              peak: largest |H q| in 64 tokens of a head
    k8 = e4m3(H (k - mean) 448 / peak)     peak: the same of k, in 128 tokens
    v8 = e4m3((v - m) 448 / peak)          peak: per head and feature
    q_scale = peak scale log2(e) / (448 P)          k_scale, v_scale = peak / 448

Rounding is to nearest even, saturating. Tokens past n are coded as zeros and never read. v8 lies
with features before tokens, and its tokens permuted in groups of 16 (``reference.token_at``), as
the matrix instructions of Hopper want both operands along the dimension that is summed over, and
the probabilities where the scores have left them. Then, over blocks of 128 keys,

    S = q8 k8^T q_scale k_scale                     in fp32, log2 of what is exponentiated
    h = max(h, rows of S)       p = 256 2^(S - h)   p8 = e4m3(p): 256 is the most it gets
    l = l 2^(h' - h) + sum p                        of p as it was before rounding
    A = A 2^(h' - h) + p8 v8^T                      a block's sum is made, then added in fp32
    out = A v_scale / l + m

The sums of eight-bit products are kept to some 14 bits by the tensor cores of Hopper; so no sum
lives there longer than a block.

Shapes: q, k, v, out ``(B, L, N, D)``, bf16, fp16 or fp32; kv_len ``(B,)``; ``Statistics`` and
``Codes`` in ``reference``. All codes have whole blocks of 128 tokens. No gradients.

Every implementation has
``statistics(k, v, kv_len) -> Statistics``,
``quantize(q, k, v, kv_len, scale, statistics) -> Codes``,
``attend(codes, kv_len, out) -> out``,
``forward(q, k, v, kv_len, scale, out=None) -> out``, which is all three, and
``supports(q, k, v, kv_len, scale, out=None)``; statistics and codes are exchangeable, and codes
of the same statistics are the same bit for bit, but for ties.
"""
