"""Packed projections to joint heads, in one stream and in two, against the ways of other models."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Call, Case, Peer, Unavailable, Work, compiled
from hunyuan_fast.modules.attention import split_heads
from hunyuan_fast.modules.rotary import Tables, build_rotary_tables
from hunyuan_fast.ops import apply_rope3d, qk_norm_rope

_EPS = 1e-6
_WIDE = (shapes.NUM_HEADS, shapes.HEAD_DIM)
_NANO = (shapes.NANO_NUM_HEADS, shapes.NANO_HEAD_DIM)
Heads = tuple[Tensor, Tensor, Tensor]
Normalise = Callable[[Tensor, Tensor], Tensor]
Rotate = Callable[[Tensor, Tables], Tensor]


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The single block and the double block, at sizes that a device is used for."""
    fp32, bf16 = torch.float32, torch.bfloat16
    one, two = partial(_case, device, streams=1), partial(_case, device, streams=2)
    if quick:
        small = shapes.tokens("quick", 1, 256, 256, text=64)
        return [one(small, fp32, _WIDE, alternating=True), two(small, bf16, _WIDE)]
    if device.type == "cuda":
        clips = (shapes.CLIP_256P_65, shapes.CLIP_720P_129)
        return [each(clip, bf16, _WIDE) for clip in clips for each in (one, two)]
    clip = shapes.CLIP_256P_33
    return [
        *(one(clip, dtype, _WIDE, alternating=True) for dtype in (fp32, bf16)),
        *(two(clip, dtype, _WIDE) for dtype in (fp32, bf16)),
        *(each(shapes.NANO, fp32, _NANO, cold=False) for each in (one, two)),
    ]


def _case(
    device: torch.device,
    clip: shapes.Tokens,
    dtype: torch.dtype,
    heads: tuple[int, int],
    *,
    streams: int,
    cold: bool = True,
    alternating: bool = False,
) -> Case:
    num_heads, head_dim = heads
    width = 3 * num_heads * head_dim
    dims = shapes.ROPE_DIMS if head_dim == shapes.HEAD_DIM else shapes.NANO_ROPE_DIMS
    tables = build_rotary_tables(clip.grid, dims, shapes.ROPE_THETA, device)
    rows = [clip.joint] if streams == 1 else [clip.video, clip.text]

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn = []
        for length in rows:
            sizes = ((1, length, width), (head_dim,), (head_dim,))
            drawn += [torch.randn(s, generator=generator, device=generator.device) for s in sizes]
        return tuple(t.to(dtype).requires_grad_() for t in drawn)

    def ours(qkv: Tensor, q: Tensor, k: Tensor, *text: Tensor) -> Heads:
        given = dict(zip(("text_qkv", "text_q_weight", "text_k_weight"), text, strict=False))
        return qk_norm_rope(qkv, q, k, *tables, num_heads=num_heads, eps=_EPS, **given)

    def arguments(qkv: Tensor, q: Tensor, k: Tensor, *text: Tensor) -> tuple[object, ...]:
        return (qkv, q, k, *tables, num_heads, *(text or (None, None, None)), _EPS)

    eager = partial(_compose, _rms_norm, _rotate, tables, num_heads)
    # torch.compile leaves complex numbers, which are faster when eager, to kernels of their own
    in_pairs = partial(_compose, _rms_norm, _rotate_pairs, tables, num_heads)
    tensor = clip.joint * num_heads * head_dim * dtype.itemsize
    table = 2 * clip.video * head_dim * 4
    return Case(
        name=f"{clip.name}-{'one-stream' if streams == 1 else 'two-streams'}",
        function="qk_norm_rope",
        dtype=dtype,
        shape={"B": 1, "L": rows[0], "3ND": width},
        inputs=inputs,
        call=ours,
        arguments=arguments,
        work={
            # q, k and v read and written; then their gradients and q and k read, dqkv written.
            FORWARD: Work(6 * tensor + table),
            TRAINING: Work(14 * tensor + 2 * table),
        },
        peers=(
            Peer("eager", lambda: eager),
            Peer("torch.compile", compiled(in_pairs)),
            Peer("diffusers", lambda: _diffusers(head_dim, tables, num_heads)),
        ),
        cold=cold,
        alternating=alternating,
    )


def _compose(
    normalise: Normalise, rotate: Rotate, tables: Tables, num_heads: int, *given: Tensor
) -> Heads:
    """Split, norm, rotate and join, operation by operation; v of one stream stays a view."""
    video = tables[0].shape[0]
    q, k, v = _split_and_normalise(normalise, num_heads, *given[:3])
    if len(given) == 3:
        q, k = (torch.cat((rotate(x[:, :video], tables), x[:, video:]), dim=1) for x in (q, k))
        return q, k, v
    text = _split_and_normalise(normalise, num_heads, *given[3:])
    turned = (rotate(q, tables), rotate(k, tables), v)
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(turned, text, strict=True))
    return q, k, v


def _split_and_normalise(
    normalise: Normalise, num_heads: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor
) -> Heads:
    q, k, v = split_heads(qkv, num_heads)
    return normalise(q, q_weight), normalise(k, k_weight), v


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)
    return normed.to(x.dtype) * weight


def _rotate(x: Tensor, tables: Tables) -> Tensor:
    return apply_rope3d(x, *tables)


def _rotate_pairs(x: Tensor, tables: Tables) -> Tensor:
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = (table[:, None, 0::2] for table in tables)
    pairs = torch.stack((real * c - imaginary * s, real * s + imaginary * c), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def _diffusers(head_dim: int, tables: Tables, num_heads: int) -> Call:
    """Their norm and their rotation, joined as their attention processor does."""
    if find_spec("diffusers") is None:
        raise Unavailable("diffusers is not installed")
    module = import_module("diffusers.models.normalization").RMSNorm(head_dim, _EPS)
    turn = import_module("diffusers.models.embeddings").apply_rotary_emb
    del module.weight  # no parameter, so that the tensor of the call can stand in its place

    def normalise(x: Tensor, weight: Tensor) -> Tensor:
        module.weight = weight
        result: Tensor = module(x)
        return result

    def rotate(x: Tensor, tables: Tables) -> Tensor:
        result: Tensor = turn(x, tables, sequence_dim=1)
        return result

    return partial(_compose, normalise, rotate, tables, num_heads)
