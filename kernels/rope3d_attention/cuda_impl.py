"""Attention in 16 bits on Hopper: its tensor cores and its copy engine.

Lengths stay on the device, and padding is not read. Gradients are deterministic: shares of dq are
added up in the order of the keys.
"""

import torch
from torch import Tensor

from hunyuan_fast import _C

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128)
# Keys of a step. The more of them, the fewer steps; both fit the shared memory.
_KEY_TILE = 176
# Two thread blocks may share what they fetch of the keys and values. They take neighbouring tiles
# of queries: where their number is odd, one block has nothing to do at the end of every head.
_FEW_TILES = 32
_QUERY_TILE = 128  # kQueryRows in csrc/rope3d_attention/sm90_layout.h
_MOST_TILES = 2**31 - 2**10  # of queries: they are counted in 31 bits
_CONTIGUOUS = torch.contiguous_format
_CHUNK = 8  # values in 16 bytes, which rows begin at a multiple of
_FAR = 2**31 - 2**10  # elements, counted in 31 bits


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> str | None:
    """None, or why the CUDA kernel cannot answer this call."""
    if q.dtype not in _DTYPES:
        return f"q must be bfloat16 or float16, it is {q.dtype}"
    batch, length, num_heads, head_dim = q.shape
    if head_dim not in _HEAD_DIMS:
        return f"the head dimension must be 64 or 128, it is {head_dim}"
    if not q.numel() or (q_len is not None and not k.numel()):
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        return f"the tensors must not be empty, the shapes of q and k are {shapes}"
    tiles = batch * num_heads * -(-length // _QUERY_TILE)
    if tiles > _MOST_TILES:
        return f"there must be at most {_MOST_TILES} tiles of queries, there are {tiles}"
    if not scale > 0:
        return f"scale must be positive, it is {scale}"
    if q.device.type != "cuda":
        return f"q must be on a CUDA device, it is on {q.device}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if (major, minor) != (9, 0):
        return f"the GPU must be sm_90, it is sm_{major}{minor}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
    *,
    key_tile: int = _KEY_TILE,
    cluster: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, L, N, D), written into ``out`` if given, and log-sum-exp (B, N, L).

    key_tile: keys of a step, 128 or 176.
    cluster: thread blocks that share what they fetch, 1 or 2; None: by the shape.
    """
    if cluster is None:
        cluster = _blocks_of_cluster(q)
    q, k, v = (x if _is_aligned(x) else x.clone(memory_format=_CONTIGUOUS) for x in (q, k, v))
    written, lse = _results(q, out)
    with torch.cuda.device(q.device):
        stream = torch.cuda.current_stream(q.device).cuda_stream
        _C.rope3d_attention_forward_hopper(
            q, k, v, kv_len, scale, written, lse, key_tile, cluster, stream, q_len
        )
    return _delivered(written, out), lse


def supports_raw(qkv: Tensor, cos: Tensor, text_qkv: Tensor | None) -> str | None:
    """None, or why ``forward_raw`` cannot take what ``forward`` could take once it is prepared."""
    for name, x in (("qkv", qkv), ("text_qkv", text_qkv)):
        if x is None:
            continue
        aligned = x.data_ptr() % 16 == 0 and x.stride(2) == 1
        if not aligned or any(step % _CHUNK or not 0 <= step <= _FAR for step in x.stride()[:2]):
            return (
                f"rows of {name} must begin at multiples of 16 bytes, its strides are {x.stride()}"
            )
    if cos.shape[0] * max(cos.shape[1], cos.stride(0)) > _FAR:
        return f"the tables must lie within {_FAR} elements, the shape is {tuple(cos.shape)}"
    return None


def forward_raw(
    qkv: Tensor,
    q_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    text_qkv: Tensor | None,
    text_q_weight: Tensor | None,
    eps: float,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    *,
    cluster: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``forward`` with q still in the packed projection: its norm and rotation come with it.

    qkv to eps: as for ``qk_norm_rope``. k, v: ready, (B, L, N, D) of the joint sequence.
    """
    if cluster is None:
        cluster = _blocks_of_cluster(k)
    k, v = (x if _is_aligned(x) else x.clone(memory_format=_CONTIGUOUS) for x in (k, v))
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    written, lse = _results(k, out)
    weights = (None if w is None else w.float().contiguous() for w in (q_weight, text_q_weight))
    weight, text_weight = weights
    raw = qkv, weight, cos, sin, text_qkv, text_weight, eps
    with torch.cuda.device(k.device):
        stream = torch.cuda.current_stream(k.device).cuda_stream
        _C.rope3d_attention_forward_raw_hopper(
            *raw, k, v, kv_len, scale, written, lse, cluster, stream
        )
    return _delivered(written, out), lse


def _results(like: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the kernel writes: ``out``, or a tensor in its place, and the log-sum-exp."""
    batch, length, num_heads, _ = like.shape
    lse = torch.empty((batch, num_heads, length), dtype=torch.float32, device=like.device)
    if out is not None and _is_aligned(out):
        return out, lse
    return torch.empty(like.shape, dtype=like.dtype, device=like.device), lse


def _delivered(written: Tensor, out: Tensor | None) -> Tensor:
    if out is None or written is out:
        return written
    return out.copy_(written)


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    q_len: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients like q, k and v."""
    rows = [x if _is_aligned(x) else x.clone(memory_format=_CONTIGUOUS) for x in (dout, out)]
    inputs = [x if _is_aligned(x) else x.clone(memory_format=_CONTIGUOUS) for x in (q, k, v)]
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v))
    size = _C.rope3d_attention_backward_workspace_hopper(inputs[0])
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    with torch.cuda.device(q.device):
        stream = torch.cuda.current_stream(q.device).cuda_stream
        _C.rope3d_attention_backward_hopper(
            *(*rows, lse.contiguous(), *inputs, kv_len, scale, dq, dk, dv, workspace, stream, q_len)
        )
    return dq, dk, dv


def _blocks_of_cluster(q: Tensor) -> int:
    """Two where the tensor cores would else wait for the second-level cache."""
    tiles = -(-q.shape[1] // _QUERY_TILE)
    return 2 if q.shape[-1] == 128 and (tiles % 2 == 0 or tiles >= _FEW_TILES) else 1


def _is_aligned(t: Tensor) -> bool:
    """Whether features are adjacent, every row at a multiple of 16 bytes, no two in one place."""
    steps = [t.stride(axis) for axis in range(3) if t.shape[axis] > 1]
    return (
        t.stride(3) == 1
        and t.data_ptr() % 16 == 0
        and all(step > 0 and step % _CHUNK == 0 for step in steps)
    )
