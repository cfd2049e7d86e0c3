"""GELU in its tanh form, by itself or written behind another tensor.

    u = sqrt(2/pi) (x + 0.044715 x^3)      s = 1 / (1 + exp(-2 u))
    y = 0.5 x (1 + tanh(u)) = x s          dx = dy (s + x 2u' s (1 - s))

Everything is computed in fp32 whatever the tensors hold (in float64 when they do), and rounded
once. The form with s is the one that is computed: 1 + tanh(u) has lost its digits when u is far
below zero. At the ends y is 0 for x = -inf, where the formula with tanh has 0 * inf, and inf for
x = +inf; the derivative is 0 and 1; NaN stays NaN.

The single block's second linear layer takes the attention output (width E) beside the activation
(width M). forward writes both into one tensor: x, a view of the first linear layer's output, is
read once, and there is no activation by itself to write, read and write again. Backward needs x
alone, the same view, and makes s anew.

    forward(x, left=None, out=None) -> y
        x (..., M) of any strides
        left: None, or (B, L, E) for x (B, L, M); y (B, L, E + M) is then [left, gelu(x)]
        out: None, or a tensor to write into and return, for a call without left: x itself, or one
            of any strides that shares no memory with x
    backward(dy, x) -> dx
        dy, x of one shape and of any strides; for the gradient of left there is nothing to compute
    supports(x, left=None, out=None) -> None, or why not

y and dx are contiguous where they are new.
"""
