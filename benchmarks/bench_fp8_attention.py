"""Joint attention over e4m3 codes, coding included, against attention in the inputs' dtype."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, Case, Peer, Work
from hunyuan_fast.ops import attention, fp8_attention

_WIDE = (shapes.NUM_HEADS, shapes.HEAD_DIM)
_CUDA = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Whole sequences; a CPU has the reference alone, and shows what exactness costs there."""
    case = partial(_case, device)
    if quick:
        return [case(shapes.tokens("quick", 1, 256, 256), torch.bfloat16, (2, 64))]
    if device.type == "cuda":
        clips = (shapes.CLIP_256P_65, shapes.CLIP_720P_129)
        return [case(clip, torch.bfloat16, _WIDE) for clip in clips]
    nano = (shapes.NANO_NUM_HEADS, shapes.NANO_HEAD_DIM)
    return [
        case(shapes.IMAGE_256P, torch.bfloat16, _WIDE),
        case(shapes.NANO, torch.float32, nano, cold=False),
    ]


def _case(
    device: torch.device,
    clip: shapes.Tokens,
    dtype: torch.dtype,
    heads: tuple[int, int],
    *,
    cold: bool = True,
) -> Case:
    shape = (1, clip.joint, *heads)
    return Case(
        name=clip.name,
        function="fp8_attention",
        dtype=dtype,
        shape=dict(zip("BLND", shape, strict=True)),
        inputs=partial(_draw, shape, dtype),
        call=fp8_attention,
        arguments=lambda q, k, v: (q, k, v, None, heads[1] ** -0.5),
        work={FORWARD: work(shape, dtype)},
        peers=(
            Peer("attention", lambda: attention, same=False),
            *_sdpa_peers(device),
        ),
        cold=cold,
    )


def work(shape: tuple[int, ...], dtype: torch.dtype) -> Work:
    """Two matrix products; q, k and v read once, the output written."""
    batch, length, num_heads, head_dim = shape
    tensor = batch * length * num_heads * head_dim
    return Work(4 * tensor * dtype.itemsize, 4 * tensor * length)


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    drawn = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(3))
    return tuple(x.to(dtype) for x in drawn)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sdpa_peers(device: torch.device) -> list[Peer]:
    """Torch's kernels in the dtype of the inputs, whose results are others."""
    if device.type != "cuda":
        return [Peer("sdpa", lambda: _sdpa, same=False)]
    names = {backend: backend.name.removesuffix("_ATTENTION").lower() for backend in _CUDA}
    return [
        Peer(f"sdpa {name}", lambda: _sdpa, partial(sdpa_kernel, backend), same=False)
        for backend, name in names.items()
    ]
