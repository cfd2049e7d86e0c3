"""What the blocks keep for backward: nothing that is cheap to compute again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hunyuan_fast.models.dit.blocks import DoubleStreamBlock, SingleStreamBlock
from hunyuan_fast.modules.rotary import rotary_tables

GRID, TEXT, DIM, HEADS = (4, 4, 8), 32, 256, 2
VIDEO = GRID[0] * GRID[1] * GRID[2]


def kept_per_token(block: nn.Module, run: Callable[[], object], constants: list[Tensor]) -> float:
    """Distinct memory saved for backward, per token, in bf16 vectors of DIM features."""
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *constants)}
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(t)  # so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive.append(run())
    return sum(kept.values()) / ((VIDEO + TEXT) * DIM * 2)


# In units of E. Double: input, what is modulated (2), packed projections (3), q, k, v (3), what
# attention gives, both branches (2), residual, network before and after its activation (8): 21.
# Single: input, what is modulated, first layer (7), q, k, v (3), what attention gives, joined (5),
# branch: 19. Statistics and vectors come on top.
@pytest.mark.parametrize(("kind", "most"), [("double", 22.0), ("single", 19.5)])
def test_what_a_block_keeps(kind: str, most: float, generator: torch.Generator) -> None:
    rotary = rotary_tables(GRID, (16, 56, 56), 256.0, torch.device("cpu"))
    vec = torch.randn(1, DIM, generator=generator).bfloat16()
    img, txt = (
        torch.randn(1, length, DIM, generator=generator).bfloat16().requires_grad_()
        for length in (VIDEO, TEXT)
    )
    kv_len = torch.tensor([VIDEO + TEXT])
    if kind == "double":
        double = DoubleStreamBlock(DIM, HEADS, 4 * DIM).bfloat16()
        kept = kept_per_token(double, lambda: double(img, txt, vec, rotary, kv_len), [*rotary])
    else:
        single = SingleStreamBlock(DIM, HEADS, 4 * DIM).bfloat16()
        joint = torch.cat((img, txt), dim=1).detach().requires_grad_()
        kept = kept_per_token(single, lambda: single(joint, vec, rotary, kv_len), [*rotary])
    assert 15 < kept < most
