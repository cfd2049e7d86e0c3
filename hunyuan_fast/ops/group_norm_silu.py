"""Group norm of feature maps in one call with its SiLU, over a clip or over chunks of one.

Formula and contract: ``hunyuan_fast.kernels.group_norm_silu``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.kernels.group_norm_silu.reference import merge
from hunyuan_fast.ops.operator import define, refuse_second_derivative

_ROOM = "group_norm_silu"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    silu: bool = True,
    stats: Tensor | None = None,
) -> Tensor:
    """SiLU of the group norm of x; statistics over T, H, W and the group's channels together.

    x: (B, C, T, H, W), of any strides; fp32, bf16, fp16, or float64, which is computed in float64.
    num_groups: G, which divides C.
    weight, bias: (C,), of any dtype but float64, which goes with x in float64 only.
    silu: whether SiLU follows; without it this is the group norm.
    stats: None, or (3, B, G) as :func:`group_norm_stats` makes them, which stand in place of x's
        own: those of a whole clip, of which x is a chunk. Inference only.

    Returns the shape and dtype of x, channels-last in memory, under autocast too: computed in fp32
    and rounded once, whatever the mean. NaN in a sample stays in that sample's group. Backward
    keeps x, and gives gradients in the dtype of their tensor; a second derivative is refused.
    Raises TypeError or ValueError when shapes, dtypes, devices, num_groups or eps do not fit.
    """
    _check_maps(x, num_groups)
    _check_vector("weight", weight, x)
    _check_vector("bias", bias, x)
    _check_eps(eps)
    if stats is not None:
        _check_stats("stats", stats)
        _check_stats_of(stats, x, num_groups)
        _check_inference(x, weight, bias, stats)
    y: Tensor = _forward(x, num_groups, weight, bias, float(eps), bool(silu), stats)[0]
    return y


def group_norm_stats(x: Tensor, num_groups: int) -> Tensor:
    """How many values, their mean, the sum of squared deviations from it: (3, B, G) in float64.

    x, num_groups: as in :func:`group_norm_silu`. There is no gradient.
    """
    _check_maps(x, num_groups)
    stats: Tensor = _statistics(x.detach(), num_groups)
    return stats


def merge_group_norm_stats(parts: Sequence[Tensor]) -> Tensor:
    """The statistics (3, B, G) of all parts of a clip together, merged in their order.

    parts: at least one, each as :func:`group_norm_stats` makes them, of one shape. By the formula
    of Chan, Golub and LeVeque, so that a large mean costs no digits.
    """
    if not parts:
        raise ValueError("parts must hold at least one tensor, got none")
    for i, part in enumerate(parts):
        _check_stats(f"parts[{i}]", part)
        if part.shape != parts[0].shape:
            raise ValueError(
                f"parts must have one shape, got {tuple(parts[0].shape)} and {tuple(part.shape)}"
            )
    return merge(parts)


def group_norm_affine(
    stats: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The group norm as ``x * scale + shift``: both (B, C), fp32, or float64 for such a weight.

    stats: (3, B, G) as :func:`group_norm_stats` makes them; weight, bias: (C,); eps: as in
        :func:`group_norm_silu`. For ``causal_conv3d(x, ..., scale=scale, shift=shift)``.

    A mean of m deviations costs log2(m) bits of x, as in torch's group norm; not so in
    :func:`group_norm_silu`, which centres first. There is no gradient.
    """
    _check_stats("stats", stats)
    for name, vector in (("weight", weight), ("bias", bias)):
        _check_tensor(name, vector)
        if vector.dim() != 1 or not len(vector) or len(vector) % stats.shape[2]:
            raise ValueError(
                f"{name} must be (C,) with C a multiple of G = {stats.shape[2]}, got shape "
                f"{tuple(vector.shape)}"
            )
    if weight.shape != bias.shape:
        raise ValueError(
            f"bias must be like weight, {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    with torch.no_grad():
        count, mean, squares = stats
        share = len(weight) // stats.shape[2]
        deviation = (squares / count.clamp_min(1) + eps).rsqrt()
        scale = deviation.repeat_interleave(share, 1) * weight
        shift = bias - mean.repeat_interleave(share, 1) * scale
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return scale.to(dtype), shift.to(dtype)


def _forward_kernel(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    stats: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    arguments = x, num_groups, weight, bias, eps, silu, stats
    y, own = select(_ROOM, *arguments).forward(*arguments)
    return y, own


def _fake_forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, stats: Any
) -> tuple[Tensor, Tensor | None]:
    own = _fake_statistics(x, num_groups) if stats is None else None
    return torch.empty_like(x, memory_format=torch.channels_last_3d), own


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, bias, ctx.eps, ctx.silu, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, stats = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy, x, weight, bias, stats, ctx.eps, ctx.silu)
    return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None


def _backward_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = select(_ROOM, x, stats.shape[2], weight, bias, eps, silu, None)
    dx, dweight, dbias = chosen.backward(dy, x, weight, bias, stats, eps, silu)
    return dx, dweight, dbias


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = torch.empty_like(x, memory_format=torch.channels_last_3d)
    return dx, x.new_empty(weight.shape, dtype=dtype), x.new_empty(bias.shape, dtype=dtype)


def _statistics_kernel(x: Tensor, num_groups: int) -> Tensor:
    stats: Tensor = select(_ROOM, x, num_groups).statistics(x, num_groups)
    return stats


def _fake_statistics(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((3, x.shape[0], num_groups), dtype=torch.float64)


_forward = define(
    "group_norm_silu(Tensor x, SymInt num_groups, Tensor weight, Tensor bias, float eps, "
    "bool silu, Tensor? stats) -> (Tensor, Tensor)",
    _forward_kernel,
    _fake_forward,
    save=_save,
    gradients=_gradients,
)
_backward = define(
    "group_norm_silu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor stats, float eps, "
    "bool silu) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    _fake_backward,
    gradients=refuse_second_derivative("group_norm_silu"),
)
_statistics = define(
    "group_norm_stats(Tensor x, SymInt num_groups) -> Tensor", _statistics_kernel, _fake_statistics
)


def _check_tensor(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}; cast it"
        )


def _check_maps(x: Tensor, num_groups: int) -> None:
    _check_tensor("x", x)
    if x.dim() != 5:
        raise ValueError(f"x must be (B, C, T, H, W), got shape {tuple(x.shape)}")
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise TypeError(f"num_groups must be an integer, got {type(num_groups).__name__}")
    channels = x.shape[1]
    if num_groups < 1 or channels == 0 or channels % num_groups:
        raise ValueError(
            f"num_groups must divide the channels of x, C = {channels}, got {num_groups}"
        )


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    _check_tensor(name, vector)
    if vector.shape != x.shape[1:2]:
        raise ValueError(f"{name} must be (C,) = ({x.shape[1]},), got shape {tuple(vector.shape)}")
    if (vector.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            f"{name} and x must both be float64 or neither, got {vector.dtype} and {x.dtype}"
        )
    _check_device(name, vector, x)


def _check_eps(eps: float) -> None:
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")


def _check_stats(name: str, stats: Tensor) -> None:
    if not isinstance(stats, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(stats).__name__}")
    if stats.dtype != torch.float64:
        raise TypeError(f"{name} must be float64, as group_norm_stats makes it, got {stats.dtype}")
    if stats.dim() != 3 or stats.shape[0] != 3:
        raise ValueError(f"{name} must be (3, B, G), got shape {tuple(stats.shape)}")


def _check_stats_of(stats: Tensor, x: Tensor, num_groups: int) -> None:
    if stats.shape[1:] != (x.shape[0], num_groups):
        raise ValueError(
            f"stats must be (3, B, G) = (3, {x.shape[0]}, {num_groups}), "
            f"got shape {tuple(stats.shape)}"
        )
    _check_device("stats", stats, x)


def _check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def _check_inference(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            "stats are for inference: a chunk's gradients depend on all chunks; "
            "leave them out, or use torch.no_grad()"
        )
