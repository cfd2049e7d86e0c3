"""Adaptive layer norm: normalise without weights, then scale and shift by vectors of the sample.

    mean = sum(x) / E      rstd = 1 / sqrt(sum((x - mean)^2) / E + eps)      n = (x - mean) rstd
    y = n (1 + scale) + shift

    g = dy (1 + scale)     dx = rstd (g - sum(g) / E - n sum(g n) / E)
    dshift = sum_L dy      dscale = sum_L dy n

x, y, dy, dx are (B, L, E), shift, scale and their gradients (B, E), mean and rstd (B, L).
Everything is computed in fp32 whatever the tensors hold, and rounded once: y and dx to the dtype of
x, dshift and dscale to that of scale. With x in float64 everything is float64.

Unfused, torch writes the normalised tensor, the scaled one and the shifted one to memory and reads
them again; here x is read once and y written once. Backward needs x, scale, mean and rstd: the
normalised tensor is made anew, not stored. The sums over L are taken in two stages, over fixed
chunks of rows and then over the chunks in order: no atomics, and the same bits at every run.

    forward(x, shift, scale, eps) -> y, mean, rstd
    backward(dy, x, scale, mean, rstd) -> dx, dshift, dscale
    supports(x, shift, scale, eps) -> None, or why not

mean and rstd are exchangeable between implementations.
"""
