"""The blocks of a transformer shared by several processes, by heads and by channels.

Each process has some heads of the attention and some channels of the network of every block, in
plain local parameters under their usual names. What is small stays whole everywhere: norms,
modulations, embedders, the refiner and the last layer; their gradients come out the same on all
processes, so that nothing is left to be done about them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hunyuan_fast.distributed.collectives import rank_in
from hunyuan_fast.distributed.cuts import Cut
from hunyuan_fast.distributed.mesh import Layout, group_of
from hunyuan_fast.distributed.shards import part, split_sizes
from hunyuan_fast.models.dit.blocks import STREAMS, DoubleStreamBlock, SingleStreamBlock
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.modules.norm import RMSNorm
from hunyuan_fast.modules.tensor_parallel import (
    DividedTokens,
    Stream,
    Tokens,
    column_parallel,
    row_parallel,
)
from hunyuan_fast.ops.collectives import shared

_TOKENS: dict[str, Stream] = {"img": "video", "txt": "text"}


def parallelize_tensors(
    transformer: HunyuanVideoTransformer, mesh: DeviceMesh, *, sequence_parallel: bool = True
) -> None:
    """Keep the part of this process of the blocks, and let them compute with those of the others.

    transformer: the same on all processes of a "tp" group, or on the meta device. Changed in place:
        its ``cuts`` say what it holds of which parameter.
    mesh: with a dim "tp"
    sequence_parallel: between the shared layers every process has a part of the tokens only, so
        that norms, modulations and residuals are computed, and kept for backward, once

    Raises ValueError when "tp" does not divide the heads, and for a model that was shared before.
    """
    if transformer.cuts:
        raise ValueError("transformer must hold all of its weights, got one that was shared before")
    group = group_of(mesh, "tp")
    if group is None:
        return
    ranks, heads = group.size(), transformer.config.heads_num
    Layout(tp=ranks).check_heads(heads)
    tokens = DividedTokens(group) if sequence_parallel else Tokens(group)
    transformer.tokens = tokens
    dim, width = transformer.config.hidden_size, transformer.config.mlp_width
    cuts: dict[str, Cut] = {}
    for name in transformer.attention_blocks():
        block = transformer.get_submodule(name)
        if isinstance(block, DoubleStreamBlock):
            found = _share_double(block, dim, width, tokens)
        else:
            assert isinstance(block, SingleStreamBlock)
            found = _share_single(block, dim, width, tokens)
        block.num_heads = heads // ranks
        block.attention.keep_heads(part(split_sizes(heads, ranks), rank_in(group)))
        cuts |= {f"{name}.{parameter}": cut for parameter, cut in found.items()}
        _share_small(block, tokens)
    transformer.cuts = cuts


def _share_double(block: DoubleStreamBlock, dim: int, width: int, tokens: Tokens) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    for stream in STREAMS:
        seen = _TOKENS[stream]
        columns = {"attn_qkv": (dim, dim, dim), "mlp.fc1": (width,)}
        for name, parts in columns.items():
            cuts |= _replace(block, f"{stream}_{name}", column_parallel, parts, tokens, seen)
        for name, parts in {"attn_proj": (dim,), "mlp.fc2": (width,)}.items():
            cuts |= _replace(block, f"{stream}_{name}", row_parallel, parts, tokens)
    return cuts


def _share_single(block: SingleStreamBlock, dim: int, width: int, tokens: Tokens) -> dict[str, Cut]:
    cuts = _replace(block, "linear1", column_parallel, (dim, dim, dim, width), tokens, "joint")
    cuts |= _replace(block, "linear2", row_parallel, (dim, width), tokens)
    cut = cuts["linear1.weight"]
    *qkv, hidden = (stop - start for start, stop in cut.ranges(cut.rank))
    block.widths = [sum(qkv), hidden]
    return cuts


def _replace(block: nn.Module, name: str, share: Any, *how: Any) -> dict[str, Cut]:
    """Put a layer's part in its place; how its parameters are cut, by their names in the block."""
    path, _, leaf = name.rpartition(".")
    parent = block.get_submodule(path)
    layer, cuts = share(getattr(parent, leaf), *how)
    setattr(parent, leaf, layer)
    return {f"{name}.{parameter}": cut for parameter, cut in cuts.items()}


def _share_small(block: nn.Module, tokens: Tokens) -> None:
    """Sum the gradients of what each process uses for heads or tokens of its own."""

    def for_heads(_module: nn.Module, _inputs: Any, weight: Tensor) -> Tensor:
        return shared(weight, tokens.group)

    def for_tokens(_module: nn.Module, _inputs: Any, vectors: Tensor) -> Tensor:
        return tokens.for_all(vectors)

    for name, module in block.named_modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(for_heads)
        elif name.endswith(("_mod.linear", "modulation.linear")):
            module.register_forward_hook(for_tokens)
