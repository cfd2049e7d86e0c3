"""Frame-causal attention against torch's kernels with a mask and frame by frame."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Call, Case, Peer, Unavailable, Work
from benchmarks.kit.pairing import Rounds
from hunyuan_fast.ops import frame_causal_attention

# Beyond this a mask, of a byte for every pair of tokens, and what kernels make of it, is too large.
_LONGEST_MASKED = 32768
_FEW = Rounds(budget=10.0, least=2, most=10)


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The attention in the middle of the autoencoder, whole clips of one sample."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [_case(shapes.Clip("quick", 9, 64, 64), 64, fp32, device)]
    if device.type == "cuda":
        small, *large = shapes.PIXELS_256P_17, shapes.PIXELS_480P_65, shapes.PIXELS_720P_129
        found = [_case(clip, shapes.VAE_HEAD_DIM, bf16, device) for clip in large]
        # 239 TFLOP forward at 720p: a clip of that length is decoded, and not trained on
        forward = (replace(c, work={FORWARD: c.work[FORWARD]}, rounds=_FEW) for c in found)
        return [_case(small, shapes.VAE_HEAD_DIM, bf16, device), *forward]
    return [
        *(_case(shapes.PIXELS_256P_17, shapes.VAE_HEAD_DIM, x, device) for x in (fp32, bf16)),
        _case(shapes.PIXELS_NANO, shapes.NANO_VAE_HEAD_DIM, fp32, device, cold=False),
    ]


def _case(
    clip: shapes.Clip,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    cold: bool = True,
) -> Case:
    frames, height, width = clip.latent
    tokens = height * width
    ours = partial(frame_causal_attention, tokens_per_frame=tokens)
    shape = (1, frames * tokens, 1, head_dim)
    return Case(
        name=clip.name,
        function="frame_causal_attention",
        dtype=dtype,
        shape=dict(zip("BLND", shape, strict=True)),
        inputs=partial(_draw, shape, dtype),
        call=ours,
        arguments=lambda q, k, v: (q, k, v, tokens, head_dim**-0.5),
        work=work(frames, tokens, head_dim, dtype),
        peers=(
            Peer("sdpa with a mask", partial(_masked, frames, tokens, device)),
            Peer("sdpa per frame", lambda: partial(_per_frame, tokens)),
        ),
        cold=cold,
    )


def work(frames: int, tokens: int, head_dim: int, dtype: torch.dtype) -> dict[str, Work]:
    """Two matrix products forward, five backward, over the pairs of tokens that see each other."""
    pairs = tokens * tokens * frames * (frames + 1) // 2
    product = 2 * pairs * head_dim
    tensor = frames * tokens * head_dim * dtype.itemsize
    return {
        FORWARD: Work(4 * tensor, 2 * product),
        TRAINING: Work((4 + 8) * tensor, (2 + 5) * product),
    }


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    drawn = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(3))
    return tuple(x.to(dtype).requires_grad_() for x in drawn)


def _masked(frames: int, tokens: int, device: torch.device) -> Call:
    """The mask is made once, before: a model makes it once for each clip."""
    if frames * tokens > _LONGEST_MASKED:
        raise Unavailable(f"stores a mask; not tried beyond {_LONGEST_MASKED} tokens")
    frame = torch.arange(frames * tokens, device=device) // tokens
    mask = frame <= frame[:, None]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return call


def _per_frame(tokens: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    frames = [
        F.scaled_dot_product_attention(q[:, :, end - tokens : end], k[:, :, :end], v[:, :, :end])
        for end in range(tokens, q.shape[2] + 1, tokens)
    ]
    return torch.cat(frames, dim=2).transpose(1, 2)
