"""Self-attention as the blocks use it: packed projections or heads in, joined heads out."""

from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.ops.context_attention import SharedTokens
from hunyuan_fast.ops.fp8_attention import fp8_attention
from hunyuan_fast.ops.norm_rope_attention import norm_rope_attention
from hunyuan_fast.ops.qk_norm_rope import qk_norm_rope
from hunyuan_fast.ops.rope3d_attention import attention
from hunyuan_fast.ops.sliding_tile_attention import SlidingTiles

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
    return _attended(q, k, v, kv_len).flatten(2)


class JointAttention(nn.Module):
    """The attention of a transformer block over video and text, computed as the model was told.

    It has no parameters and leaves no trace in a state dict. ``set`` says how it computes;
    ``HunyuanVideoTransformer.set_attention`` does so for all blocks.

    q, k, v: (B, L, N, D), video tokens before text tokens
    kv_len: (B,), valid tokens of each sample; or where the tokens of several processes lie, of
        which q, k and v are those of this one
    out: (B, L, N, D) to write into, of any strides; inference only
    returns: (B, L, N, D), zero in the rows from kv_len on
    """

    precision: str = "same"
    pattern: SlidingTiles | None = None
    windows: Tensor | None  # of the pattern, (N or 1, 3): a buffer, which moves with the model
    heads: slice = slice(None)  # those of this process, of all that patterns have windows for

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("windows", None, persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor | SharedTokens,
        out: Tensor | None = None,
    ) -> Tensor:
        pattern, fp8 = self.pattern, self.precision == "fp8"
        if pattern is not None and self.windows is not None:
            windows = self.windows.expand(q.shape[2], 3)
            pattern = SlidingTiles(pattern.grid, pattern.tile, windows)
        if isinstance(kv_len, SharedTokens):
            attended = kv_len.attend(q, k, v, fp8=fp8, pattern=pattern)
            return attended if out is None else out.copy_(attended)
        if fp8:
            return fp8_attention(q, k, v, kv_len=kv_len, out=out)
        return _attended(q, k, v, kv_len, out, pattern)

    def of_packed(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor],
        kv_len: Tensor | SharedTokens,
        *,
        num_heads: int,
        text_qkv: Tensor | None = None,
        text_norms: tuple[Tensor | None, Tensor | None] = (None, None),
        out: Tensor | None = None,
    ) -> Tensor:
        """The same of packed projections, whose queries and keys are normalised and rotated first.

        qkv, text_qkv, and the weights in norms and text_norms, of queries and of keys: as
        ``qk_norm_rope`` takes them
        """
        heads: dict[str, Any] = {
            "num_heads": num_heads,
            "text_qkv": text_qkv,
            "text_q_weight": text_norms[0],
            "text_k_weight": text_norms[1],
        }
        # hooks are for queries, keys and values
        watched = self._forward_hooks or self._forward_pre_hooks
        plain = self.precision == "same" and self.pattern is None and not watched
        if plain and not torch.is_grad_enabled() and not isinstance(kv_len, SharedTokens):
            return norm_rope_attention(qkv, *norms, *rotary, kv_len=kv_len, out=out, **heads)
        return self(*qk_norm_rope(qkv, *norms, *rotary, **heads), kv_len, out)

    def set(
        self, *, precision: str | None = None, pattern: SlidingTiles | str | None = None
    ) -> None:
        """Change how it computes; what is ``None`` stays as it is.

        precision: "same" as the inputs, or "fp8", which has no gradients
        pattern: who sees whom; "dense": everybody. Its windows move with the module.
        """
        precision = self.precision if precision is None else check_precision(precision)
        if isinstance(pattern, str) and pattern != "dense":
            raise ValueError(f"attention pattern must be 'dense' or tiles, got {pattern!r}")
        pattern = self.pattern if pattern is None else pattern
        if isinstance(pattern, SlidingTiles) and precision != "same":
            raise ValueError(
                f"attention pattern must be 'dense' with precision {precision!r}, which has no "
                f"other, got {pattern}"
            )
        self.precision = precision
        if not isinstance(pattern, SlidingTiles):
            self.pattern, self.windows = None, None
        elif pattern is not self.pattern:
            windows = torch.as_tensor(pattern.windows, dtype=torch.int32).view(-1, 3)
            self.windows = windows if len(windows) == 1 else windows[self.heads]
            self.pattern = pattern

    def keep_heads(self, heads: slice) -> None:
        """Compute these heads alone; patterns are given for all of them as before."""
        self.heads = heads
        if self.windows is not None and len(self.windows) > 1:
            self.windows = self.windows[heads]

    def extra_repr(self) -> str:
        return f"precision={self.precision!r}, pattern={self.pattern or 'dense'}"


def check_precision(precision: str) -> str:
    """The precision, if joint attention has it; else a ValueError that names the choices."""
    if precision not in PRECISIONS:
        choices = " or ".join(repr(name) for name in PRECISIONS)
        raise ValueError(f"attention precision must be {choices}, got {precision!r}")
    return precision


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor,
    out: Tensor | None = None,
    pattern: SlidingTiles | None = None,
) -> Tensor:
    attended = attention(q, k, v, kv_len=kv_len, out=out, pattern=pattern)
    assert isinstance(attended, Tensor), "the log-sum-exp was not asked for"
    return attended
