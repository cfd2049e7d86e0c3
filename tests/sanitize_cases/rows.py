"""Kernels that pass over rows or places: elementwise, norms, merges."""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor

from hunyuan_fast.kernels.fused_modulation import reference as modulation
from hunyuan_fast.kernels.group_norm_silu import reference as group_norm
from tests.sanitize_cases.case import HALF, WIDE, Arguments, Case, interpreted, normal, sliced

HERE = interpreted()
EPS = 1e-6


# ---- gelu_tanh


def _gelu(generator: Generator, *, beside: bool = False) -> Arguments:
    x = sliced(normal(generator, 2, 5, 264))
    return (x, normal(generator, 2, 5, 40)) if beside else (x,)


def _gelu_backward(generator: Generator) -> Arguments:
    return sliced(normal(generator, 2, 5, 264)), normal(generator, 2, 5, 264)


GELU = [
    Case(room="gelu_tanh", impl="triton_impl", what="forward", make=_gelu, here=HERE),
    Case(
        room="gelu_tanh",
        impl="triton_impl",
        what="forward beside another tensor",
        make=partial(_gelu, beside=True),
        here=HERE,
    ),
    Case(
        room="gelu_tanh",
        impl="triton_impl",
        what="backward",
        part="backward",
        make=_gelu_backward,
        here=HERE,
    ),
]


# ---- ring_attention


def _merge(generator: Generator) -> Arguments:
    shape = (2, 37, 2, 24)
    lse, part_lse = (normal(generator, 2, 2, 37, dtype=WIDE) for _ in range(2))
    lse[0, :, 3:9] = -torch.inf
    part_lse[0, :, 6:12] = -torch.inf
    return normal(generator, *shape, dtype=WIDE), lse, normal(generator, *shape), part_lse


def _merge_backward(generator: Generator, *, of_lse: bool) -> Arguments:
    out, lse, part, part_lse = _merge(generator)
    dlse = torch.randn(lse.shape, generator=generator) if of_lse else None
    return sliced(torch.randn(out.shape, generator=generator)), dlse, out, lse, part, part_lse


RING = [
    Case(room="ring_attention", impl="triton_impl", what="merge", make=_merge, here=HERE),
    *(
        Case(
            room="ring_attention",
            impl="triton_impl",
            what=f"merge backward{', log-sum-exps too' if of_lse else ''}",
            part="backward",
            make=partial(_merge_backward, of_lse=of_lse),
            here=HERE,
        )
        for of_lse in (False, True)
    ),
]


# ---- fused_modulation


def _modulation(
    generator: Generator,
    *,
    width: int,
    dtype: torch.dtype = HALF,
    norm: bool = True,
    gate: bool = False,
    vectors: int | None = None,
) -> Arguments:
    """x, shift, scale, eps, y, gate, index."""
    shape = (2, 21, width)
    of_vectors = (2, width) if vectors is None else (2, vectors, width)
    x = normal(generator, *shape, dtype=dtype) + 3
    shift, scale = (normal(generator, *of_vectors, dtype=dtype) if norm else None for _ in range(2))
    y = normal(generator, *shape, dtype=dtype) if gate else None
    gates = normal(generator, *of_vectors, dtype=dtype) if gate else None
    index = None if vectors is None else torch.arange(21).expand(2, 21).clone() // 5 % vectors
    if not gate and index is None:
        return x, shift, scale, EPS
    return x, shift, scale, EPS, y, gates, index


def _modulation_backward(generator: Generator, **options: object) -> Arguments:
    """dmodulated, residual, scale, stats, dresidual, y, gate, index, y_dtype."""
    x, shift, scale, eps, *rest = _modulation(generator, **options)  # type: ignore[arg-type]
    y, gates, index = rest if rest else (None, None, None)
    residual, _, stats = modulation.forward(x, shift, scale, eps, y, gates, index)
    new = partial(torch.randn, x.shape, generator=generator)
    dmodulated = None if scale is None else new().to(x.dtype)
    if gates is None:
        return dmodulated, x, scale, stats
    kept = None if scale is None else residual
    return dmodulated, kept, scale, stats, new().to(x.dtype), y, gates, index, x.dtype


def _modulations(impl: str, ways: dict[str, dict[str, object]], here: object) -> list[Case]:
    return [
        Case(
            room="fused_modulation",
            impl=impl,
            what=f"{part}, {what}",
            part=part,
            make=partial(make, **options),
            here=here,  # type: ignore[arg-type]
        )
        for what, options in ways.items()
        for part, make in (("forward", _modulation), ("backward", _modulation_backward))
    ]


MODULATION = [
    *_modulations(
        "triton_impl",
        {
            "norm": {"width": 200},
            "gate": {"width": 200, "norm": False, "gate": True},
            "both": {"width": 200, "gate": True},
            "both by an index": {"width": 200, "gate": True, "vectors": 3},
            "norm in fp32": {"width": 96, "dtype": WIDE},
        },
        HERE,
    ),
    # a thread keeps one vector of 16 bytes, or up to four
    *_modulations(
        "cuda_impl",
        {
            "narrow": {"width": 264},
            "as in the model": {"width": 3072},
            "widest": {"width": 8192},
            "fp16": {"width": 1024, "dtype": torch.float16},
            "fp32": {"width": 1536, "dtype": WIDE},
            "widest in fp32": {"width": 6144, "dtype": WIDE},
        },
        None,
    ),
]


# ---- qk_norm_rope


def _tables(generator: Generator, rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, head_dim // 2, generator=generator).mul(6).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def _heads(generator: Generator, *, streams: int, head_dim: int = 64) -> Arguments:
    heads, video, text = 2, 19, 7
    width = 3 * heads * head_dim
    weights = [1 + normal(generator, head_dim, dtype=WIDE) / 4 for _ in range(4)]
    tables = _tables(generator, video, head_dim)
    if streams == 1:
        qkv = sliced(normal(generator, 2, video + text, width), gap=8)
        return qkv, *weights[:2], *tables, heads, None, None, None, EPS
    qkv, text_qkv = (normal(generator, 2, rows, width) for rows in (video, text))
    return qkv, *weights[:2], *tables, heads, text_qkv, *weights[2:], EPS


def _heads_backward(generator: Generator, *, streams: int) -> Arguments:
    arguments = _heads(generator, streams=streams)
    return *(normal(generator, 2, 26, 2, 64) for _ in range(3)), *arguments


HEADS = [
    Case(
        room="qk_norm_rope",
        impl="triton_impl",
        what=f"{part}, {streams} stream{'s' if streams > 1 else ''}",
        part=part,
        make=partial(make, streams=streams),
        here=HERE,
    )
    for streams in (1, 2)
    for part, make in (("forward", _heads), ("backward", _heads_backward))
] + [
    Case(
        room="qk_norm_rope",
        impl="triton_impl",
        what="forward, head size 96",
        make=partial(_heads, streams=1, head_dim=96),
        here=HERE,
    )
]


# ---- group_norm_silu


def _map(generator: Generator, dtype: torch.dtype = HALF) -> Tensor:
    x = normal(generator, 2, 24, 3, 9, 11, dtype=dtype) + 2
    return x.contiguous(memory_format=torch.channels_last_3d)


def _group_norm(
    generator: Generator, *, silu: bool = True, given: bool = False, dtype: torch.dtype = HALF
) -> Arguments:
    x = _map(generator, dtype)
    weight, bias = (normal(generator, 24, dtype=WIDE) for _ in range(2))
    stats = group_norm.statistics(x, 4) if given else None
    return x, 4, weight, bias, EPS, silu, stats


def _group_norm_backward(generator: Generator, *, silu: bool = True) -> Arguments:
    x, groups, weight, bias, eps, silu, _ = _group_norm(generator, silu=silu)
    dy = torch.randn(x.shape, generator=generator).to(x.dtype)
    return dy, x, weight, bias, group_norm.statistics(x, groups), eps, silu


GROUP_NORM = [
    Case(
        room="group_norm_silu",
        impl="triton_impl",
        what=what,
        part=part,
        make=make,
        here=HERE,
    )
    for what, part, make in (
        ("forward", "forward", _group_norm),
        ("forward, norm alone", "forward", partial(_group_norm, silu=False)),
        ("forward, statistics given", "forward", partial(_group_norm, given=True)),
        ("forward, fp32", "forward", partial(_group_norm, dtype=WIDE)),
        ("backward", "backward", _group_norm_backward),
        ("backward, norm alone", "backward", partial(_group_norm_backward, silu=False)),
    )
]

CASES = [*GELU, *RING, *MODULATION, *HEADS, *GROUP_NORM]
