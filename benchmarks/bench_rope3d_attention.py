"""Joint attention, with and without rotation, against torch's own kernels and diffusers' form."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import attention_peers, shapes
from benchmarks.kit.case import (
    BACKWARD,
    FORWARD,
    TRAINING,
    Call,
    Case,
    Peer,
    Unavailable,
    Work,
    compiled,
)
from benchmarks.kit.pairing import Rounds
from hunyuan_fast.modules.rotary import build_rotary_tables
from hunyuan_fast.ops import attention, rope3d_attention

# Above this the scores of eager attention, (B, N, L, L), would not fit in memory.
_LONGEST_EAGER = {"cpu": 4096, "cuda": 8192}
_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
        *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    ),
}
# Enough for medians of calls that take seconds.
_FEW = Rounds(budget=15.0, least=3, most=40)
_WIDE = (shapes.NUM_HEADS, shapes.HEAD_DIM)


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Whole sequences, a batch with prompts of different lengths, and rotation before attention."""
    fp32, bf16 = torch.float32, torch.bfloat16
    full = partial(_attention_case, device)
    if quick:
        small = shapes.tokens("quick", 1, 256, 256)
        return [full(small, bf16, _WIDE, text=[256]), _rotated_case(device, small, bf16)]
    if device.type == "cuda":
        clips = (shapes.CLIP_256P_65, shapes.CLIP_1024P_29, shapes.CLIP_720P_129)
        whole = [full(clip, bf16, _WIDE, text=[256]) for clip in clips]
        padded = [full(clip, bf16, _WIDE, text=[40, 256]) for clip in clips[:2]]
        return [*whole, *padded, _rotated_case(device, shapes.CLIP_720P_129, bf16)]
    clip = shapes.CLIP_256P_33
    nano = (shapes.NANO_NUM_HEADS, shapes.NANO_HEAD_DIM)
    return [
        *(
            full(clip, dtype, _WIDE, text=[256], alternating=True, rounds=_FEW)
            for dtype in (fp32, bf16)
        ),
        full(shapes.IMAGE_256P, bf16, _WIDE, text=[40, 256]),
        # a third of the heads: the time of a head is the same
        full(shapes.CLIP_256P_65, bf16, (8, 128), text=[40, 256], large=True, rounds=_FEW),
        _rotated_case(device, clip, bf16),
        full(shapes.NANO, fp32, nano, text=[32], cold=False),
    ]


def _attention_case(
    device: torch.device,
    clip: shapes.Tokens,
    dtype: torch.dtype,
    heads: tuple[int, int],
    *,
    text: Sequence[int],
    cold: bool = True,
    alternating: bool = False,
    large: bool = False,
    rounds: Rounds | None = None,
) -> Case:
    """``attention`` over samples with ``text`` valid text tokens each."""
    batch, length, (num_heads, head_dim) = len(text), clip.joint, heads
    lengths = [clip.video + n for n in text]
    whole = all(n == length for n in lengths)
    kv_len = valid = mask = None
    if not whole:
        kv_len = torch.tensor(lengths, device=device)
        valid = torch.arange(length, device=device) < kv_len[:, None]
        mask = valid[:, None, None, :]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = attention(q, k, v, kv_len=kv_len)
        assert isinstance(result, Tensor)
        return result

    def meaningful(x: Tensor) -> Tensor:
        return x if valid is None else torch.where(valid[:, :, None, None], x, 0)

    eager, masked = partial(_eager, mask=mask), partial(_sdpa, mask=mask)
    return Case(
        name=clip.name if whole else f"{clip.name}-padded",
        function="attention",
        dtype=dtype,
        shape={"B": batch, "L": length, "N": num_heads, "D": head_dim},
        inputs=partial(_draw, (batch, length, num_heads, head_dim), dtype),
        call=ours,
        arguments=lambda q, k, v: (q, k, v, kv_len, head_dim**-0.5),
        work=_work(lengths, num_heads, head_dim, dtype, alone=device.type == "cuda"),
        peers=(
            Peer("eager", lambda: _short_enough(eager, clip, device)),
            Peer("torch.compile", lambda: compiled(_short_enough(eager, clip, device))()),
            *_sdpa_peers(device, masked)[:-1],
            Peer(
                "sdpa math",
                lambda: _short_enough(masked, clip, device),
                partial(sdpa_kernel, SDPBackend.MATH),
            ),
            *attention_peers.peers(batch, None if whole else lengths, length, device),
            Peer("diffusers", lambda: partial(_diffusers_attention(), attn_mask=mask)),
        ),
        meaningful=meaningful,
        cold=cold,
        alternating=alternating,
        large=large,
        rounds=rounds,
    )


def _rotated_case(device: torch.device, clip: shapes.Tokens, dtype: torch.dtype) -> Case:
    """``rope3d_attention``: the floor is that of attention, for rotation adds no traffic to it."""
    num_heads, head_dim = _WIDE
    tables = build_rotary_tables(clip.grid, shapes.ROPE_DIMS, shapes.ROPE_THETA, device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = rope3d_attention(q, k, v, *tables, num_video_tokens=clip.video)
        assert isinstance(result, Tensor)
        return result

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(_rotate(q, *tables), _rotate(k, *tables), v)

    def diffusers() -> Call:
        attend, rotate = _diffusers_attention(), _diffusers_rotation()

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            video = (rotate(x[:, : clip.video], tables, sequence_dim=1) for x in (q, k))
            joint = [
                torch.cat((turned, x[:, clip.video :]), dim=1)
                for turned, x in zip(video, (q, k), strict=True)
            ]
            return attend(*joint, v)

        return call

    return Case(
        name=clip.name,
        function="rope3d_attention",
        dtype=dtype,
        shape={"B": 1, "L": clip.joint, "N": num_heads, "D": head_dim},
        inputs=partial(_draw, (1, clip.joint, num_heads, head_dim), dtype),
        call=ours,
        arguments=lambda q, k, v: (q, k, v, None, head_dim**-0.5),
        work=_work([clip.joint], num_heads, head_dim, dtype),
        peers=(
            *_sdpa_peers(device, eager)[:-1],
            Peer("torch.compile", compiled(eager)),
            Peer("diffusers", diffusers),
        ),
    )


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    drawn = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(3))
    return tuple(x.to(dtype).requires_grad_() for x in drawn)


def _work(
    lengths: Sequence[int],
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    alone: bool = False,
) -> dict[str, Work]:
    """Two matrix products forward, five backward; every tensor read or written once.

    alone: backward is measured by itself, too
    """
    product = 2 * num_heads * head_dim * sum(n * n for n in lengths)
    tensor = num_heads * head_dim * sum(lengths) * dtype.itemsize
    backward = {BACKWARD: Work(8 * tensor, 5 * product)} if alone else {}
    return {
        FORWARD: Work(4 * tensor, 2 * product),
        **backward,
        TRAINING: Work((4 + 8) * tensor, (2 + 5) * product),
    }


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The video tokens rotated in fp32, pair by pair, the text tokens as they are."""
    video, text = x.split((cos.shape[0], x.shape[1] - cos.shape[0]), dim=1)
    real, imaginary = video.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = (table[None, :, None, 0::2] for table in (cos, sin))
    pairs = torch.stack((real * c - imaginary * s, real * s + imaginary * c), dim=-1)
    return torch.cat((pairs.flatten(-2).to(x.dtype), text), dim=1)


def _short_enough(call: Call, clip: shapes.Tokens, device: torch.device) -> Call:
    longest = _LONGEST_EAGER[device.type]
    if clip.joint > longest:
        raise Unavailable(f"stores every score; not tried beyond {longest} tokens")
    return call


def _sdpa_peers(device: torch.device, call: Call) -> list[Peer]:
    """One peer for each kernel behind torch's SDPA, in their order of speed, the plain one last."""
    names = {b: f"sdpa {b.name.removesuffix('_ATTENTION').lower()}" for b in _BACKENDS[device.type]}
    return [Peer(name, lambda: call, partial(sdpa_kernel, b)) for b, name in names.items()]


def _diffusers_attention() -> Call:
    _need_diffusers()
    dispatch: Call = import_module("diffusers.models.attention_dispatch").dispatch_attention_fn
    return dispatch


def _diffusers_rotation() -> Call:
    _need_diffusers()
    rotate: Call = import_module("diffusers.models.embeddings").apply_rotary_emb
    return rotate


def _need_diffusers() -> None:
    if find_spec("diffusers") is None:
        raise Unavailable("diffusers is not installed")
