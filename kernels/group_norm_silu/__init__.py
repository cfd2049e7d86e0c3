"""Group norm over time, height and width together, with the SiLU behind it or without.

    n = (x - mean) rstd          mean, rstd of a sample and group, over (T, H, W) and its channels
    z = n weight + bias          rstd = 1 / sqrt(sum((x - mean)^2) / count + eps)
    y = z sigmoid(z), or z

    dz = dy s (1 + z (1 - s)), s = sigmoid(z), or dy      g = dz weight
    dx = rstd (g - sum(g) / count - n sum(g n) / count)
    dweight = sum over samples and places of dz n         dbias = the same of dz

x, y and their gradients are (B, C, T, H, W), results channels-last in memory; weight and bias (C,).
stats is (3, B, G) in float64: how many values, their mean, the sum of squared deviations from it.
Such triples of parts of a clip merge into those of the whole, so that a clip can be normalised in
chunks: forward takes stats from outside as well.

Everything is computed in fp32 whatever the tensors hold, and rounded once; float64 in float64. No
difference of large sums is ever taken: chunks are added up about a centre of their own and merged
by their distances, in double precision. Applied, the norm is (x - c) scale + shift, where c is the
mean as a float and shift holds what rounding it has lost. A mean of 1000 deviations costs nothing.

Unfused, torch writes z to memory and reads it again. Here x is read twice, y written once; backward
reads x and dy twice, writes dx once, and keeps x alone: z is made anew. All sums are taken in fixed
chunks and then over the chunks in order: no atomics, and the same bits at every run.

    statistics(x, num_groups) -> stats
    forward(x, num_groups, weight, bias, eps, silu, stats) -> y, stats
    backward(dy, x, weight, bias, stats, eps, silu) -> dx, dweight, dbias
    supports(x, num_groups, weight, bias, eps, silu, stats) -> None, or why not

forward returns None for stats where it was given them. dweight and dbias are fp32, float64 for x in
float64. stats is exchangeable between implementations.
"""
