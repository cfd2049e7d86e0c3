"""The VAE's convolution: symmetric in space, causal in time, alone or after upsampling.

Formula and contract: ``hunyuan_fast.kernels.causal_conv3d``.
"""

from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.ops.operator import define, refuse_second_derivative

_ROOM = "causal_conv3d"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ONES = (1, 1, 1)

Triple = tuple[int, int, int]


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    past: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve with edge values repeated in space and the first frame repeated before time zero.

    x: (B, C, T, H, W) of any strides, fp32, bf16, fp16 or float64.
    weight: (O, C, KT, KH, KW), KH and KW odd; bias: (O,).
    stride: in (t, h, w).
    past: (B, C, P, H, W), the frames of the clip before x, which stand there instead of the first
        frame; all of them count, and the kernel begins at the first. P may be 0.
    scale, shift: (B, C), fp32 (float64 for x in float64); inference only. x and past are replaced
        by silu(x * scale + shift) of them, in the dtype of x: the norm before this convolution.
    residual: like the result, which it is added to; inference only.

    Returns (B, O, T', (H-1)//sh + 1, (W-1)//sw + 1), channels-last, in the dtype of x, with
    T' = (T-1)//st + 1, or (P+T-KT)//st + 1 with past. Under autocast everything but scale and shift
    is first cast to its dtype, as by torch's convolutions.
    Gradients for x, weight, bias and past; a second derivative is refused.
    Raises TypeError or ValueError when shapes, dtypes, devices or stride do not fit.
    Source: technical report, section 4.1 (CausalConv3D).
    """
    _check_map("x", x)
    x, weight, bias, past, residual = _autocast(x, weight, bias, past, residual)
    _check_weights(weight, bias, x)
    _check_triple("stride", stride)
    if past is not None:
        _check_past(past, x)
        if past.shape[2] + x.shape[2] < weight.shape[2]:
            raise ValueError(
                f"past and x must have at least KT = {weight.shape[2]} frames together, got "
                f"{past.shape[2]} and {x.shape[2]}"
            )
    if scale is not None or shift is not None or residual is not None:
        _check_fused(x, weight, bias, stride, past, scale, shift, residual)
    return _forward(x, weight, bias, past, *stride, scale, shift, residual)


def fuses_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `causal_conv3d` of this map had better be given scale and shift than a normed map.

    True at inference where the implementation that answers applies them as it reads, for little or
    nothing; others make a map of their own, which the norm's own op does faster.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if x.device.type == "meta" or torch.is_autocast_enabled(x.device.type):
        return False
    implementation = select(_ROOM, x, weight, None, _ONES, None, None)
    return bool(getattr(implementation, "FUSES_NORM", False))


def upsample_causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: Triple,
    past: Tensor | None = None,
) -> Tensor:
    """Repeat pixels by factor, a clip's first frame in space only, then convolve causally.

    x: (B, C, T, H, W) of any strides, fp32, bf16, fp16 or float64.
    weight: (O, C, 3, 3, 3); bias: (O,).
    factor: (t, h, w), each 1 or 2.
    past: (B, C, P, H, W), the frames of the clip before x, which then continues it: one frame
        where t is 2, two where t is 1, or one if there are no more.

    Returns (B, O, 1 + (T-1) t, H h, W w), or with past (B, O, T t, H h, W w), channels-last, in the
    dtype of x. The repeated map is never built. Autocast, gradients and errors as with
    :func:`causal_conv3d`.
    """
    _check_map("x", x)
    x, weight, bias, past, _ = _autocast(x, weight, bias, past, None)
    _check_weights(weight, bias, x)
    if tuple(weight.shape[2:]) != (3, 3, 3):
        raise ValueError(f"weight must be (O, C, 3, 3, 3), got shape {tuple(weight.shape)}")
    _check_triple("factor", factor)
    if not set(factor) <= {1, 2}:
        raise ValueError(f"factor must hold 1 and 2 only, got {factor}")
    if past is not None:
        _check_past(past, x)
        longest = 3 - factor[0]
        if not 1 <= past.shape[2] <= longest:
            wanted = "1 frame" if longest == 1 else "1 or 2 frames"
            raise ValueError(
                f"past must have {wanted} for a factor of {factor[0]} in time, got {past.shape[2]}"
            )
    return _forward_upsampled(x, weight, bias, past, *factor)


def _forward_kernel(*args: Any) -> Tensor:
    x, weight, bias, past, st, sh, sw, *fused = args
    call = x, weight, bias, (st, sh, sw), past, None, *fused
    return select(_ROOM, *call).forward(*call)


def _upsampled_kernel(*args: Any) -> Tensor:
    x, weight, bias, past, *factor = args
    call = x, weight, bias, _ONES, past, tuple(factor)
    return select(_ROOM, *call).forward(*call)


def _backward_kernel(dy: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    x, weight, past, a, b, c, upsampled, *wants = args
    stride, factor = (_ONES, (a, b, c)) if upsampled else ((a, b, c), None)
    room = select(_ROOM, x, weight, None, stride, past, factor)
    return room.backward(dy, x, weight, stride, past, factor, tuple(wants))


def _fake_forward(*args: Any) -> Tensor:
    x, weight, _, past, *stride = args[:7]
    return _new_map(x, _output_shape(x, weight, past, stride))


def _fake_upsampled(*args: Any) -> Tensor:
    x, weight, _, past, t, h, w = args
    batch, _, frames, height, width = x.shape
    length = 1 + (frames - 1) * t if past is None else frames * t
    return _new_map(x, (batch, weight.shape[0], length, height * h, width * w))


def _fake_backward(dy: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    x, weight, past, *_, want_x, want_weight, want_bias, want_past = args
    return (
        _new_map(x, x.shape) if want_x else None,
        weight.new_empty(weight.shape) if want_weight else None,
        weight.new_empty(weight.shape[:1]) if want_bias else None,
        _new_map(past, past.shape) if want_past else None,
    )


def _new_map(x: Tensor, shape: Any) -> Tensor:
    layout = torch.channels_last_3d
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _output_shape(x: Tensor, weight: Tensor, past: Tensor | None, stride: Any) -> tuple[int, ...]:
    lengths = [*x.shape[2:]]
    if past is not None:
        lengths[0] = past.shape[2] + lengths[0] - weight.shape[2] + 1
    counts = ((n - 1) // step + 1 for n, step in zip(lengths, stride, strict=True))
    return x.shape[0], weight.shape[0], *counts


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, past, *ctx.steps = inputs[:7]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(x, weight, past)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    upsampled = ctx.num_inputs == 7
    wants = ctx.needs_input_grad[:4]
    results = _backward(dy, *ctx.saved_tensors, *ctx.steps, upsampled, *wants)
    gradients = (g if want else None for g, want in zip(results, wants, strict=True))
    return *gradients, *[None] * (ctx.num_inputs - 4)


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? past"
_forward = define(
    f"causal_conv3d({_TENSORS}, int stride_t, int stride_h, int stride_w, Tensor? scale, "
    "Tensor? shift, Tensor? residual) -> Tensor",
    _forward_kernel,
    _fake_forward,
    save=_save,
    gradients=_gradients,
)
_forward_upsampled = define(
    f"upsample_causal_conv3d({_TENSORS}, int factor_t, int factor_h, int factor_w) -> Tensor",
    _upsampled_kernel,
    _fake_upsampled,
    save=_save,
    gradients=_gradients,
)
_backward = define(
    "causal_conv3d_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? past, int step_t, int step_h, "
    "int step_w, bool upsampled, bool want_x, bool want_weight, bool want_bias, bool want_past) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _fake_backward,
    gradients=refuse_second_derivative("causal_conv3d"),
)


def _autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """The tensors in the dtype that torch's convolutions would take them in."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in _DTYPES[:3] else t for t in (x, *others)
    )


def _check_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def _check_like(name: str, t: Any, x: Tensor) -> None:
    _check_tensor(name, t)
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}; cast it")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def _check_map(name: str, x: Any) -> None:
    _check_tensor(name, x)
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; cast it"
        )
    if x.dim() != 5:
        raise ValueError(f"{name} must be (B, C, T, H, W), got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{name} must have channels, frames, rows and columns, got shape {tuple(x.shape)}"
        )


def _check_weights(weight: Any, bias: Any, x: Tensor) -> None:
    _check_like("weight", weight, x)
    if weight.dim() != 5 or weight.shape[1] != x.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"weight must be (O, C, KT, KH, KW) with C = {x.shape[1]}, as in x, got shape "
            f"{tuple(weight.shape)}"
        )
    if weight.shape[3] % 2 == 0 or weight.shape[4] % 2 == 0:
        raise ValueError(f"weight must have odd KH and KW, got shape {tuple(weight.shape)}")
    if bias is not None:
        _check_like("bias", bias, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias must be (O,) = ({weight.shape[0]},), got shape {tuple(bias.shape)}"
            )


def _check_triple(name: str, steps: Any) -> None:
    if not isinstance(steps, (tuple, list)) or not all(type(n) is int for n in steps):
        raise TypeError(f"{name} must be a tuple of three integers, got {steps!r}")
    if len(steps) != 3 or min(steps) < 1:
        raise ValueError(f"{name} must be three integers (t, h, w), each at least 1, got {steps}")


def _check_past(past: Any, x: Tensor) -> None:
    _check_like("past", past, x)
    sizes = (*x.shape[:2], *x.shape[3:])
    if past.dim() != 5 or (*past.shape[:2], *past.shape[3:]) != sizes:
        raise ValueError(
            f"past must be (B, C, P, H, W), as x, {tuple(x.shape)}, but for the frames, got shape "
            f"{tuple(past.shape)}"
        )


def _check_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    past: Tensor | None,
    scale: Any,
    shift: Any,
    residual: Any,
) -> None:
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift go together, got one of them only")
    if scale is not None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        for name, vector in (("scale", scale), ("shift", shift)):
            _check_tensor(name, vector)
            if vector.dtype != dtype:
                raise TypeError(f"{name} must be {dtype} beside x in {x.dtype}, got {vector.dtype}")
            if vector.shape != x.shape[:2]:
                raise ValueError(
                    f"{name} must be (B, C) = {tuple(x.shape[:2])}, got shape {tuple(vector.shape)}"
                )
            if vector.device != x.device:
                raise ValueError(
                    f"{name} must be on the device of x, {x.device}, got {vector.device}"
                )
    if residual is not None:
        _check_like("residual", residual, x)
        shape = _output_shape(x, weight, past, stride)
        if tuple(residual.shape) != shape:
            raise ValueError(
                f"residual must have the shape of the result, {shape}, got {tuple(residual.shape)}"
            )
    tensors = (x, weight, bias, past, scale, shift, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "scale, shift and residual are for inference: they have no gradients; compute them "
            "apart, or use torch.no_grad()"
        )
