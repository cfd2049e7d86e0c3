"""Self-attention as the blocks use it: packed projections or heads in, joined heads out."""

from torch import Tensor

from hunyuan_fast.ops.rope3d_attention import attention


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, as views of one packed projection.

    qkv: (B, L, 3 * N * D), features ordered (q, k or v; head; feature)
    returns: q, k, v, each (B, L, N, D)
    """
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor) -> Tensor:
    """Attention of each sample over its valid prefix.

    q, k, v: (B, L, N, D), video tokens before text tokens
    kv_len: (B,), valid tokens of each sample
    returns: (B, L, N * D), zero in the rows from kv_len on
    """
    joined = attention(q, k, v, kv_len=kv_len)
    assert isinstance(joined, Tensor), "the log-sum-exp was not asked for"
    return joined.flatten(2)
