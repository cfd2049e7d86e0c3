"""Sliding-tile attention for windows of several sizes, beside dense attention of the same tokens.

Random tokens have no locality: how far the sparse result is from the dense one is a matter of the
model, and ``hunyuan-fast calibrate-attention`` tells it.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Call, Case, Peer, Unavailable, Work
from benchmarks.kit.pairing import Rounds
from hunyuan_fast.kernels.sliding_tile_attention.windows import fraction, pairs, tiles
from hunyuan_fast.ops import attention, sliding_tile_attention

Sizes = tuple[int, int, int]
# Beyond this a mask, of a byte for every pair of tokens, and what kernels make of it, is too large.
_LONGEST_MASKED = 4096
_FEW = Rounds(budget=10.0, least=2, most=10)
_WIDE = (shapes.NUM_HEADS, shapes.HEAD_DIM)


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """From a tile around each token to everything."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [_case(shapes.tokens("quick", 9, 96, 96, 16), (2, 2, 2), (1, 1, 1), (2, 64), fp32)]
    if device.type == "cuda":
        long = partial(_case, shapes.CLIP_720P_129, (6, 8, 8), heads=_WIDE, dtype=bf16)
        windows = ((1, 1, 1), (3, 3, 3), (3, 3, 5), (6, 1, 10), (3, 6, 10), (6, 6, 10))
        short = partial(_case, shapes.CLIP_256P_65, (6, 8, 8), heads=_WIDE, dtype=bf16)
        return [
            *(long(window, rounds=_FEW, forward_only=True) for window in windows),
            *(short(window) for window in ((1, 1, 1), (3, 1, 1), (3, 2, 2))),
        ]
    clip = partial(_case, shapes.CLIP_256P_33, (3, 4, 4), heads=_WIDE)
    windows = ((1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3), (3, 4, 4))
    nano = (shapes.NANO_NUM_HEADS, shapes.NANO_HEAD_DIM)
    return [
        *(clip(window, dtype=fp32) for window in windows),
        *(clip(window, dtype=bf16) for window in ((1, 1, 1), (3, 3, 3))),
        _case(shapes.NANO, (2, 2, 2), (1, 1, 3), nano, fp32, cold=False),
    ]


def _case(
    clip: shapes.Tokens,
    tile: Sizes,
    window: Sizes,
    heads: tuple[int, int],
    dtype: torch.dtype,
    *,
    cold: bool = True,
    rounds: Rounds | None = None,
    forward_only: bool = False,
) -> Case:
    """All heads with one window; the name tells it, and its share of the FLOPs of dense."""
    shape = (1, clip.joint, *heads)
    work = _work(clip, tile, window, heads, dtype)
    share = fraction(clip.grid, tile, window, clip.text)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = sliding_tile_attention(q, k, v, grid=clip.grid, tile=tile, windows=window)
        assert isinstance(result, Tensor)
        return result

    def arguments(q: Tensor, k: Tensor, v: Tensor) -> tuple[object, ...]:
        windows = torch.tensor([window] * heads[0], dtype=torch.int32, device=q.device)
        return q, k, v, windows, clip.grid, tile, None, heads[1] ** -0.5

    sizes = "x".join(map(str, window)), "x".join(map(str, tiles(clip.grid, tile)))
    return Case(
        name=f"{clip.name} {sizes[0]} of {sizes[1]}, {share:.0%}",
        function="sliding_tile_attention",
        dtype=dtype,
        shape=dict(zip("BLND", shape, strict=True)),
        inputs=partial(_draw, shape, dtype),
        call=ours,
        arguments=arguments,
        work={FORWARD: work[FORWARD]} if forward_only else work,
        peers=(
            Peer("dense", lambda: _dense, same=share == 1),
            Peer("sdpa with a mask", partial(_masked, clip, tile, window)),
            Peer("flex_attention", partial(_flex, clip, tile, window)),
        ),
        cold=cold,
        rounds=rounds,
    )


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    drawn = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(3))
    return tuple(x.to(dtype).requires_grad_() for x in drawn)


def _work(
    clip: shapes.Tokens, tile: Sizes, window: Sizes, heads: tuple[int, int], dtype: torch.dtype
) -> dict[str, Work]:
    """Two matrix products forward, five backward, over the pairs of tokens that see each other."""
    num_heads, head_dim = heads
    product = 2 * num_heads * head_dim * pairs(clip.grid, tile, window, clip.text)
    tensor = clip.joint * num_heads * head_dim * dtype.itemsize
    return {
        FORWARD: Work(4 * tensor, 2 * product),
        TRAINING: Work((4 + 8) * tensor, (2 + 5) * product),
    }


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result = attention(q, k, v)
    assert isinstance(result, Tensor)
    return result


def _first_tiles(clip: shapes.Tokens, tile: Sizes, window: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """For each video token: its tile, the first that it sees, one past the last; (video, 3)."""
    counts = torch.tensor(tiles(clip.grid, tile))
    size = torch.minimum(torch.tensor(window), counts)
    places = torch.cartesian_prod(*(torch.arange(n) for n in clip.grid)) // torch.tensor(tile)
    first = torch.minimum((places - size // 2).clamp(min=0), counts - size)
    return places, first, first + size


def _masked(clip: shapes.Tokens, tile: Sizes, window: Sizes) -> Call:
    """The mask is made once, before: a model makes it once for each clip."""
    if clip.joint > _LONGEST_MASKED:
        raise Unavailable(f"stores a mask; not tried beyond {_LONGEST_MASKED} tokens")
    places, first, after = _first_tiles(clip, tile, window)
    mask = torch.ones(clip.joint, clip.joint, dtype=torch.bool)
    near = (places >= first[:, None]) & (places < after[:, None])
    mask[: clip.video, : clip.video] = near.all(-1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = mask.to(q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    return call


def _flex(clip: shapes.Tokens, tile: Sizes, window: Sizes) -> Call:
    """torch's own block-sparse attention, on tokens in the order of tiles so that blocks are empty.

    The order, and the table of blocks, are made once; the rows are moved in every call.
    """
    if not torch.cuda.is_available():
        raise Unavailable("measured on a GPU, where it skips what nobody sees")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    counts = tiles(clip.grid, tile)
    places, first, after = _first_tiles(clip, tile, window)
    index = (places[:, 0] * counts[1] + places[:, 1]) * counts[2] + places[:, 2]
    order = torch.cat((index.argsort(stable=True), torch.arange(clip.video, clip.joint))).cuda()
    padding = (0, 0, 0, clip.text)
    at, low, high = (F.pad(x, padding).cuda()[order] for x in (places, first, after))

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = [(at[j, a] >= low[i, a]) & (at[j, a] < high[i, a]) for a in range(3)]
        return (near[0] & near[1] & near[2]) | (i >= clip.video) | (j >= clip.video)

    tabulate = torch.compile(create_block_mask)  # without a compiler it would hold every pair
    blocks = tabulate(sees, None, None, clip.joint, clip.joint, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[:, order].transpose(1, 2) for x in (q, k, v))
        out = attend(q, k, v, block_mask=blocks).transpose(1, 2)
        return torch.empty_like(out).index_copy(1, order, out)

    return call
