"""Every attention: dense, from packed projections, in eight bits, windowed, by frames."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from hunyuan_fast.kernels.frame_causal_attention import reference as frames
from hunyuan_fast.kernels.qk_norm_rope import reference as heads
from hunyuan_fast.kernels.rope3d_attention import reference as dense
from hunyuan_fast.kernels.sliding_tile_attention import reference as tiles
from tests.sanitize_cases import stands
from tests.sanitize_cases.case import Arguments, Case, Stand, interpreted, normal, sliced

# sums of a few hundred rounded probabilities
BOUND = 0.02
# errors of codes, which do not cancel in noise
BOUND_OF_CODES = 0.12
ON_HOPPER = interpreted(_arch=lambda _: 90)


def _padded(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """With NaN in place of what nobody may read."""
    for item, valid in enumerate(lengths):
        x[item, valid:] = torch.nan
    return x


# ---- rope3d_attention


def _dense(
    generator: Generator,
    *,
    head_dim: int,
    length: int = 200,
    lengths: tuple[int, ...] | None = (200, 77),
    keys: tuple[int, tuple[int, ...]] | None = None,
    aligned: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Arguments:
    """q, k, v, kv_len, scale, and q_len behind an absent ``out`` where keys are others' tokens."""
    batch = 1 if lengths is None else len(lengths)
    key_length, key_lengths = keys or (length, lengths)

    def rows(count: int, valid: tuple[int, ...] | None) -> Tensor:
        x = normal(generator, batch, count, 1, head_dim, dtype=dtype)
        x = x if valid is None else _padded(x, valid)
        return x if aligned else sliced(x)

    q, k, v = rows(length, lengths), rows(key_length, key_lengths), rows(key_length, key_lengths)
    kv_len = None if key_lengths is None else torch.tensor(key_lengths)
    call = q, k, v, kv_len, head_dim**-0.5
    return call if keys is None else (*call, None, torch.tensor(lengths))


def _dense_backward(generator: Generator, **options: Any) -> Arguments:
    q, k, v, kv_len, scale, *own = _dense(generator, **options)
    out, lse = dense.forward(q, k, v, kv_len, scale, *own)
    dout = normal(generator, *q.shape, dtype=q.dtype)
    return dout, out, lse, q, k, v, kv_len, scale, *own[1:]


OWN = {"length": 70, "lengths": (70, 40), "keys": (200, (0, 190))}
DENSE_WAYS: dict[str, dict[str, Any]] = {
    "D = 64": {"head_dim": 64},
    "D = 96": {"head_dim": 96},
    "D = 128": {"head_dim": 128},
    "D = 256": {"head_dim": 256, "length": 130, "lengths": (130,)},
    "D = 128, rows not aligned": {"head_dim": 128, "aligned": False},
    "D = 256, rows not aligned": {"head_dim": 256, "length": 130, "lengths": (130,)}
    | {"aligned": False},
    "D = 128, no lengths": {"head_dim": 128, "lengths": None},
    "D = 64, own queries": {"head_dim": 64, **OWN},
    "D = 64, fp16": {"head_dim": 64, "dtype": torch.float16, "lengths": (1, 200)},
}
CUDA_WAYS = {
    what: options for what, options in DENSE_WAYS.items() if options["head_dim"] in (64, 128)
}


def _dense_case(impl: str, what: str, options: dict[str, Any], here: Stand, **more: Any) -> Case:
    make = _dense_backward if more.get("part") == "backward" else _dense
    return Case(
        room="rope3d_attention",
        impl=impl,
        what=what,
        make=partial(make, **options),
        bound=BOUND,
        here=here,
        **more,
    )


def _raw(generator: Generator, *, streams: int, head_dim: int) -> Arguments:
    """qkv, q_weight, cos, sin, text_qkv, text_q_weight, eps, k, v, kv_len, scale."""
    video, text, lengths, eps = 150, 50, (200, 160), 1e-6
    width, batch = 3 * head_dim, len(lengths)
    weights = [1 + torch.randn(head_dim, generator=generator) / 4 for _ in range(4)]
    angles = torch.rand(video, head_dim // 2, generator=generator).mul(6)
    tables = [f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin)]
    apart = (video, text) if streams == 2 else (video + text,)
    qkv, *others = (normal(generator, batch, rows, width) for rows in apart)
    text_qkv = others[0] if others else None
    texts = (text_qkv, *weights[2:]) if others else (None, None, None)
    _, k, v = heads.forward(qkv, *weights[:2], *tables, 1, *texts, eps, with_q=False)
    raw = qkv, weights[0], *tables, text_qkv, texts[1], eps
    return *raw, k, v, torch.tensor(lengths), head_dim**-0.5


def _raw_truth(*arguments: Any) -> tuple[Tensor, Tensor]:
    qkv, weight, cos, sin, text_qkv, text_weight, eps, k, v, kv_len, scale = arguments
    texts = text_qkv, text_weight, text_weight
    q, _, _ = heads.forward(qkv, weight, weight, cos, sin, 1, *texts, eps)
    assert q is not None
    return dense.forward(q, k, v, kv_len, scale)


DENSE = [
    *(
        _dense_case("triton_impl", f"{part}, {what}", options, ON_HOPPER, part=part)
        for part in ("forward", "backward")
        for what, options in DENSE_WAYS.items()
    ),
    *(
        _dense_case(
            *("cuda_impl", f"forward, {what}, {key_tile} keys, cluster of {cluster}", options),
            here=stands.FORWARD,
            ways={"key_tile": key_tile, "cluster": cluster},
        )
        for what, options in CUDA_WAYS.items()
        for key_tile in (128, 176)
        for cluster in (1, 2)
    ),
    *(
        _dense_case("cuda_impl", f"backward, {what}", options, stands.BACKWARD, part="backward")
        for what, options in CUDA_WAYS.items()
    ),
    *(
        Case(
            room="rope3d_attention",
            impl="cuda_impl",
            what=f"raw queries, D = {head_dim}, {streams} streams, cluster of {cluster}",
            part="forward_raw",
            make=partial(_raw, streams=streams, head_dim=head_dim),
            truth=_raw_truth,
            bound=BOUND,
            here=stands.RAW,
            ways={"cluster": cluster},
        )
        for head_dim in (64, 128)
        for streams in (1, 2)
        for cluster in (1, 2)
    ),
]


# ---- fp8_attention


def _codes(generator: Generator, *, head_dim: int, dtype: torch.dtype) -> Arguments:
    lengths = (200, 129)
    shape = (len(lengths), 200, 1, head_dim)
    q, k, v = (_padded(normal(generator, *shape, dtype=dtype), lengths) for _ in range(3))
    return q, k, v + 1, torch.tensor(lengths, dtype=torch.int32), head_dim**-0.5


def _out_alone(*arguments: Any) -> Tensor:
    return dense.forward(*arguments)[0]


def _codes_case(impl: str, what: str, head_dim: int, here: Stand, **more: Any) -> Case:
    dtype = more.pop("dtype", torch.bfloat16)
    return Case(
        room="fp8_attention",
        impl=impl,
        what=what,
        make=partial(_codes, head_dim=head_dim, dtype=dtype),
        truth=_out_alone,
        bound=BOUND_OF_CODES,
        here=here,
        **more,
    )


CODES = [
    *(
        _codes_case("triton_impl", f"D = {head_dim}", head_dim, interpreted())
        for head_dim in (64, 112, 128)
    ),
    *(
        _codes_case(
            *("cuda_impl", f"{str(dtype).removeprefix('torch.')}, cluster of {cluster}", 128),
            here=stands.CODES,
            set={"_blocks_of_cluster": lambda _, cluster=cluster: cluster},
            dtype=dtype,
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for cluster in (1, 2)
    ),
]


# ---- sliding_tile_attention


def _tiles(
    generator: Generator,
    *,
    head_dim: int,
    tile: tuple[int, int, int] = (2, 4, 4),
    lengths: tuple[int, ...] | None = None,
) -> Arguments:
    """q, k, v, windows, grid, tile, kv_len, scale; one window covers the grid."""
    grid, text = (3, 6, 5), 9
    windows = torch.tensor([[1, 1, 1], [9, 9, 9]], dtype=torch.int32)
    batch, length = 1 if lengths is None else len(lengths), 99
    assert length == grid[0] * grid[1] * grid[2] + text
    q, k, v = (normal(generator, batch, length, 2, head_dim) for _ in range(3))
    kv_len = None if lengths is None else torch.tensor(lengths)
    return q, k, v, windows, grid, tile, kv_len, head_dim**-0.5


def _tiles_backward(generator: Generator, **options: Any) -> Arguments:
    q, k, v, *pattern = _tiles(generator, **options)
    out, lse = tiles.forward(q, k, v, *pattern)
    return normal(generator, *q.shape), out, lse, q, k, v, *pattern


TILES = [
    Case(
        room="sliding_tile_attention",
        impl="triton_impl",
        what=f"{part}, {what}",
        part=part,
        make=partial(make, **options),
        bound=BOUND,
        here=interpreted(_hopper=lambda _: True),
        slow=part == "backward" and options["head_dim"] > 64,
    )
    for what, options in (
        ("D = 64", {"head_dim": 64, "lengths": (93,)}),
        ("D = 128", {"head_dim": 128}),
        ("D = 256, large tiles", {"head_dim": 256, "tile": (3, 6, 5)}),
    )
    for part, make in (("forward", _tiles), ("backward", _tiles_backward))
]


# ---- frame_causal_attention


def _frames(
    generator: Generator, *, head_dim: int, tokens: int, past: int = 0, asking: int | None = None
) -> Arguments:
    """q, k, v, tokens_per_frame, scale, query_tokens; of two frames, after those of the past."""
    keys = normal(generator, 1, (2 + past) * tokens, 1, head_dim)
    values = normal(generator, *keys.shape)
    q = normal(generator, 1, 2 * (asking or tokens), 1, head_dim)
    return q, keys, values, tokens, head_dim**-0.5, asking


def _frames_backward(generator: Generator, **options: Any) -> Arguments:
    q, k, v, *how = _frames(generator, **options)
    out, lse = frames.forward(q, k, v, *how)
    return normal(generator, *q.shape), out, lse, q, k, v, *how


FRAMES = [
    Case(
        room="frame_causal_attention",
        impl="triton_impl",
        what=f"{part}, {what}",
        part=part,
        make=partial(make, **options),
        bound=BOUND,
        here=interpreted(),
    )
    for what, options in (
        ("D = 64", {"head_dim": 64, "tokens": 37, "past": 1}),
        ("D = 256, some rows of every frame", {"head_dim": 256, "tokens": 24, "asking": 8}),
        ("D = 512, as in the autoencoder", {"head_dim": 512, "tokens": 140}),
    )
    for part, make in (("forward", _frames), ("backward", _frames_backward))
]

CASES = [*DENSE, *CODES, *TILES, *FRAMES]
