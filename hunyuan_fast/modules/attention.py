"""Self-attention as the blocks use it: packed projections or heads in, joined heads out."""

from torch import Tensor, nn

from hunyuan_fast.ops.fp8_attention import fp8_attention
from hunyuan_fast.ops.rope3d_attention import attention

# How the joint attention of a transformer may compute: "same" is the dtype of its inputs, "fp8"
# takes both of its products over e4m3 codes, for inference.
PRECISIONS = ("same", "fp8")


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
    return _dense(q, k, v, kv_len, None).flatten(2)


class JointAttention(nn.Module):
    """The attention of a transformer block over video and text, computed as the model was told.

    It has no parameters and leaves no trace in a state dict. ``set`` says how it computes;
    ``HunyuanVideoTransformer.set_attention`` does so for all blocks.

    q, k, v: (B, L, N, D), video tokens before text tokens
    kv_len: (B,), valid tokens of each sample
    out: (B, L, N, D) to write into, of any strides; inference only
    returns: (B, L, N, D), zero in the rows from kv_len on
    """

    precision: str = "same"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, out: Tensor | None = None
    ) -> Tensor:
        if self.precision == "fp8":
            return fp8_attention(q, k, v, kv_len=kv_len, out=out)
        return _dense(q, k, v, kv_len, out)

    def set(self, *, precision: str | None = None) -> None:
        """Change how it computes; what is ``None`` stays as it is.

        precision: "same" as the inputs, or "fp8", which has no gradients
        """
        if precision is not None:
            self.precision = check_precision(precision)

    def extra_repr(self) -> str:
        return f"precision={self.precision!r}"


def check_precision(precision: str) -> str:
    """The precision, if joint attention has it; else a ValueError that names the choices."""
    if precision not in PRECISIONS:
        choices = " or ".join(repr(name) for name in PRECISIONS)
        raise ValueError(f"attention precision must be {choices}, got {precision!r}")
    return precision


def _dense(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, out: Tensor | None) -> Tensor:
    attended = attention(q, k, v, kv_len=kv_len, out=out)
    assert isinstance(attended, Tensor), "the log-sum-exp was not asked for"
    return attended
