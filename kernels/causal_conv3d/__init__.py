"""The convolution of the VAE: symmetric in space, causal in time, alone or after upsampling.

    y[o; t, h, w] = bias[o] + sum over c, i, j, k of weight[o, c; i, j, k] z[c; t', h', w']
    t' = t st + i - lead        h' = h sh + j - KH // 2        w' = w sw + k - KW // 2

Outside of the frame z is the nearest pixel inside. In time nothing is read past the frame itself:
lead is KT - 1, and before the first frame stands the first frame. With ``past`` (B, C, P, H, W) the
frames of a clip before x stand there instead, all of them, and lead is P.

z is x. With ``factor`` (ft, fh, fw), each 1 or 2, it is x with its pixels repeated: every frame
ft times, every row fh times, every column fw times, and the very first frame of a clip in space
only. x continues a clip when past is given, and then every frame of it stands ft times; the P
frames before it are 1 for ft = 2, and for ft = 1 they are 2, or the first one alone.

**Phases.** The repeated map need not exist. Along a doubled axis two of three taps always meet the
same input value, so each output parity is a convolution of x with two taps, one of them a sum:
8/27 of the multiplications for (2, 2, 2), 4/9 for (1, 2, 2). Of one frame that begins a clip every
tap in time sees that frame, so the taps are added up: a third of the multiplications. Sums of taps
in 16 bits are made in fp32 and rounded once.

Inference has a prologue and an epilogue: with ``scale`` and ``shift`` (B, C), z comes of
silu(x * scale + shift) instead of x, computed in fp32 and rounded to the dtype of x, and of past
alike; ``residual``, of the shape of y, is added to y. An implementation for which scale and shift
cost less than a norm in a call of its own says ``FUSES_NORM = True``.

    forward(x, weight, bias, stride, past, factor, scale=None, shift=None, residual=None) -> y
        x (B, C, T, H, W) of any strides; weight (O, C, KT, KH, KW), KH and KW odd, all three 3 with
        factor; bias (O,) or None; stride (st, sh, sw), all 1 with factor; past or None
        y (B, O, T', H', W'): H' = (H - 1) // sh + 1 or H fh, W' likewise; T' = (T - 1) // st + 1,
        with past (P + T - KT) // st + 1, with factor 1 + (T - 1) ft, with both T ft
    backward(dy, x, weight, stride, past, factor, wants) -> (dx, dweight, dbias, dpast)
        wants: which of the four are computed; the others are None
        dy of any strides
    supports(x, weight, bias, stride, past, factor, scale=None, shift=None, residual=None)
        None, or why not; for backward as well

y, dx and dpast are channels-last (torch.channels_last_3d), dweight and dbias contiguous.
"""
