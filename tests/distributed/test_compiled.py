"""A block shared by several processes, and what is around it, compiled as one graph."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_fast.distributed.mesh import Layout, build_mesh
from hunyuan_fast.distributed.traffic import Traffic, count_traffic
from hunyuan_fast.models.dit.context_parallel import HeldTokens
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.dit.parallel import parallelize
from tests.kit.ranks import RankPool
from tests.models.dit_cases import tiny_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "ulysses": {"cp": 2, "ulysses": 2},
    "tensors": {"tp": 2},
}
VIDEO, TEXT = 7, 4


def through_a_block(
    model: HunyuanVideoTransformer, x: Tensor, vec: Tensor, rotary: Tensor, text_len: Tensor
) -> Tensor:
    """As the model goes: what this process has of the tokens, a block, and all video tokens."""
    if model.context is None:
        held = HeldTokens.all_of_them(VIDEO, text_len)
    else:
        held = model.context.hold(VIDEO, TEXT, text_len)
    img, txt = x[:, :VIDEO][:, held.video], x[:, VIDEO:][:, held.text]
    joint = model.tokens.join(*model.tokens.divide(img, txt))
    tables = rotary[0][held.video], rotary[1][held.video]
    joint = model.tokens.whole(model.single_blocks[0](joint, vec, tables, held.valid))
    return held.whole(joint[:, : held.num_video])


def compiled_and_not(layout: dict[str, Any]) -> list[tuple[list[Tensor], Traffic]]:
    """The tokens, the gradients of the inputs and of the block's parameters, and what was sent."""
    generator = torch.Generator().manual_seed(0)
    depths = {"mm_double_blocks_depth": 0, "mm_single_blocks_depth": 1}
    heads = 2 if "tp" in layout else 3
    model = tiny_model(generator, hidden_size=24 * heads, heads_num=heads, **depths)
    parallelize(model, build_mesh(Layout(**layout), "cpu"), Layout(**layout))
    x, vec, rotary = (
        torch.randn(shape, generator=generator)
        for shape in ((2, VIDEO + TEXT, 24 * heads), (2, 24 * heads), (2, VIDEO, 24))
    )
    leaves = [x.requires_grad_(), vec.requires_grad_(), *model.single_blocks.parameters()]
    results = []
    for function in (
        through_a_block,
        torch.compile(through_a_block, fullgraph=True, backend="aot_eager"),
    ):
        with count_traffic() as traffic:
            out = function(model, x, vec, rotary, torch.tensor([TEXT, 1]))
            grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append(([out.detach(), *grads], traffic))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_break(ranks: RankPool, layout: str) -> None:
    """Exchanged heads, gathered tokens, sums and parts of them: operators, with gradients."""
    for (plain, sent), (compiled, counted) in ranks.run(2, compiled_and_not, LAYOUTS[layout]):
        for wanted, found in zip(plain, compiled, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert counted == sent and sent.total
