"""Linear layers whose weights lie on several processes, and the tokens that pass through them.

A column-parallel layer makes some of the features of all tokens; a row-parallel layer takes some of
the features and makes summands of its result, which are added over the processes. Between a
row-parallel layer and the next column-parallel one each process has all features, either of all
tokens or of a part of them.
Source: Shoeybi et al., "Megatron-LM", section 3; Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from hunyuan_fast.distributed.collectives import rank_in, size_of
from hunyuan_fast.distributed.cuts import Cut
from hunyuan_fast.distributed.shards import split_sizes
from hunyuan_fast.modules.fp8 import Fp8Linear
from hunyuan_fast.ops.collectives import all_reduce, gather, reduce_scatter, shared, split

Stream = Literal["video", "text", "joint"]


class Tokens:
    """How tokens lie between the linear layers of the blocks: all of them on every process.

    The group shares the weights of these layers; without one a process has all of them.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    def divide(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        """What double blocks work on, of all video and all text tokens."""
        return img, txt

    def join(self, img: Tensor, txt: Tensor) -> Tensor:
        """What single blocks work on, made of what double blocks gave."""
        return torch.cat((img, txt), dim=1)

    def whole(self, x: Tensor) -> Tensor:
        """All tokens, made of what single blocks gave."""
        return x

    def bound(self, block: nn.Module) -> Callable[..., Any]:
        """The block, as it is to be run now, and again when its backward pass needs it."""
        return block

    def enter(self, x: Tensor, stream: Stream) -> Tensor:
        """All tokens, for a layer that makes some of their features."""
        return shared(x, self.group)

    def leave(self, summand: Tensor) -> Tensor:
        """The sum over all processes, as tokens lie between layers."""
        return all_reduce(summand, self.group)

    def for_all(self, x: Tensor) -> Tensor:
        """What every token meets: a bias, the vectors of a modulation."""
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokens:
        """Copies of a model stay in its group, which cannot be copied."""
        return self


class DividedTokens(Tokens):
    """Each process has a part of the tokens between layers (sequence parallel).

    Video and text are divided apart in double blocks, as one sequence in single blocks, always by
    ``split_sizes``. Their lengths are taken from the tokens of each pass.
    """

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group)
        self.lengths = {"video": 0, "text": 0}

    def divide(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        self.lengths = {"video": img.shape[1], "text": txt.shape[1]}
        return self._split(img, "video"), self._split(txt, "text")

    def join(self, img: Tensor, txt: Tensor) -> Tensor:
        streams: tuple[tuple[Tensor, Stream], ...] = (img, "video"), (txt, "text")
        whole = [gather(x, self._sizes(name), self.group, gradient="own") for x, name in streams]
        return self._split(super().join(*whole), "joint")

    def whole(self, x: Tensor) -> Tensor:
        return gather(x, self._sizes("joint"), self.group, gradient="own")

    def bound(self, block: nn.Module) -> Callable[..., Any]:
        # another pass with other lengths may come before the backward pass of this one
        lengths = self.lengths

        def run(*inputs: Any) -> Any:
            self.lengths = lengths
            return block(*inputs)

        return run

    def enter(self, x: Tensor, stream: Stream) -> Tensor:
        return gather(x, self._sizes(stream), self.group)

    def leave(self, summand: Tensor) -> Tensor:
        sizes = split_sizes(summand.shape[1], size_of(self.group))
        return reduce_scatter(summand, sizes, self.group)

    def for_all(self, x: Tensor) -> Tensor:
        return shared(x, self.group)

    def _split(self, x: Tensor, stream: Stream) -> Tensor:
        return split(x, self._sizes(stream), self.group)

    def _sizes(self, stream: Stream) -> tuple[int, ...]:
        length = sum(self.lengths.values()) if stream == "joint" else self.lengths[stream]
        return split_sizes(length, size_of(self.group))


class ColumnLinear(nn.Linear):
    """Some of the features of all tokens.

    x: (B, tokens between layers, in)    returns: (B, all tokens, features of this process)
    """

    tokens: Tokens
    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.tokens.enter(x, self.stream))


class Fp8ColumnLinear(Fp8Linear):
    """:class:`ColumnLinear` with an e4m3 weight."""

    tokens: Tokens
    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.tokens.enter(x, self.stream))


class RowLinear(nn.Linear):
    """All features, made of some of the features of all tokens; the bias is added to the sum.

    x: (B, all tokens, features of this process)    returns: (B, tokens between layers, out)
    """

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        return _with_bias(self, F.linear(x, self.weight))


class Fp8RowLinear(Fp8Linear):
    """:class:`RowLinear` with an e4m3 weight."""

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        return _with_bias(self, F.linear(x, self.expanded().to(x.dtype)))


def _with_bias(layer: RowLinear | Fp8RowLinear, summand: Tensor) -> Tensor:
    assert layer.bias is not None, "the layers of the blocks have one"
    total = layer.tokens.leave(summand)
    return total + layer.tokens.for_all(layer.bias).to(total.dtype)


Linear = nn.Linear | Fp8Linear


def column_parallel(
    linear: Linear, parts: tuple[int, ...], tokens: Tokens, stream: Stream
) -> tuple[Linear, dict[str, Cut]]:
    """The layer with some of the rows of each part of its weight, and how it is cut."""
    cut = Cut(0, parts, size_of(tokens.group), rank_in(tokens.group))
    kind = Fp8ColumnLinear if isinstance(linear, Fp8Linear) else ColumnLinear
    layer = _empty(kind, linear, linear.in_features, cut.sizes[cut.rank])
    layer.tokens, layer.stream = tokens, stream
    return _fill(layer, linear, {"weight": cut, "bias": cut})


def row_parallel(
    linear: Linear, parts: tuple[int, ...], tokens: Tokens
) -> tuple[Linear, dict[str, Cut]]:
    """The layer with some of the columns of each part of its weight, and how it is cut."""
    cut = Cut(1, parts, size_of(tokens.group), rank_in(tokens.group))
    kind = Fp8RowLinear if isinstance(linear, Fp8Linear) else RowLinear
    layer = _empty(kind, linear, cut.sizes[cut.rank], linear.out_features)
    layer.tokens = tokens
    return _fill(layer, linear, {"weight": cut})


def _empty(kind: Any, linear: Linear, in_features: int, out_features: int) -> Any:
    with torch.device("meta"):
        layer = kind(in_features, out_features)
    layer.train(linear.training)
    return layer


def _fill(layer: Any, linear: Linear, cuts: dict[str, Cut]) -> tuple[Linear, dict[str, Cut]]:
    """Give a layer its part of the parameters of another one, and all of its buffers."""
    for name, parameter in linear.named_parameters():
        value = parameter.detach()
        value = cuts[name].take(value) if name in cuts else value
        setattr(layer, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for name, buffer in linear.named_buffers():
        setattr(layer, name, buffer)
    return layer, cuts
