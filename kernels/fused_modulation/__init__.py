"""What a block of the transformer does around its layers: gated residual sum, adaptive layer norm.

    gate half   residual = x + gate y                                 rounded to the dtype of x
    norm half   n = (residual - mean) rstd                            residual is x without a gate
                modulated = n (1 + scale) + shift
                mean = sum(residual) / E
                rstd = 1 / sqrt(sum((residual - mean)^2) / E + eps)

    g = dmodulated (1 + scale)
    dx = dresidual + rstd (g - sum(g) / E - n sum(g n) / E)
    dy = gate dx    dgate = sum_l dx y    dshift = sum_l dmodulated    dscale = sum_l dmodulated n

A call has one of the halves or both; without the norm half dx is dresidual. x, y, residual and
modulated and their gradients are (B, L, E). gate, shift and scale are (B, E): one vector for all
tokens of a sample. Or they are (B, M, E), and index (B, L) says which of the M vectors a token
meets: tokens of a clean first frame belong to another time than the rest. The sums then run over
the tokens of a vector. stats is (2, B, L): mean and rstd of every row.

Everything is computed in fp32 whatever the tensors hold, and rounded once. The norm half reads the
residual as it was rounded: backward is given nothing else, and both must see the same numbers. With
x in float64 everything is float64.

Unfused, torch writes the gated sum, the normalised tensor, the scaled one and the shifted one to
memory and reads them again; here x and y are read once, residual and modulated written once.
Backward needs residual, scale, stats, and of y and gate what dgate and dy ask for: the normalised
tensor is made anew, not stored. The sums over tokens are taken in two stages, over fixed chunks of
rows and then over the chunks in order: no atomics, and the same bits at every run.

    forward(x, shift, scale, eps, y, gate, index) -> residual, modulated, stats
    backward(dmodulated, residual, scale, stats, dresidual, y, gate, index, y_dtype)
        -> dx, dshift, dscale, dy, dgate
    supports(x, shift, scale, eps, y, gate, index) -> None, or why not

What a call has not is None, among arguments and results. In backward, with a gate half, y is None
when dgate is not wanted, y_dtype (the dtype of dy) when dy is not; dresidual may be None where
there is a norm half. stats is exchangeable between implementations.
"""
