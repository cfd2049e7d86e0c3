"""Attention windows of a transformer: the file, what it refuses, and what the model makes of it."""

import json

import pytest
import torch

from hunyuan_fast.models.dit.windows import AttentionWindows
from hunyuan_fast.models.weights import CheckpointError
from hunyuan_fast.modules.attention import JointAttention
from hunyuan_fast.ops import SlidingTiles, sliding_tile_attention
from tests.kit.numerics import assert_equal
from tests.models.dit_cases import TINY, tiny_inputs, tiny_model

GRID, TILE = (3, 2, 3), (1, 1, 2)
BLOCKS = (
    *(f"double_blocks.{i}" for i in range(TINY["mm_double_blocks_depth"])),
    *(f"single_blocks.{i}" for i in range(TINY["mm_single_blocks_depth"])),
)


def windows(*heads: tuple[int, int, int], **changes) -> AttentionWindows:
    """The same for every block; for a head each."""
    values = {"model": "tiny", "grid": GRID, "tile": TILE, "blocks": dict.fromkeys(BLOCKS, heads)}
    return AttentionWindows(**values | changes)


NARROW, WIDE = windows((1, 1, 1), (1, 2, 2)), windows((3, 2, 2), (9, 9, 9))


def test_the_model_sees_less_and_then_everything_again(generator):
    model, inputs = tiny_model(generator), tiny_inputs(generator)
    names = set(model.state_dict())
    with torch.no_grad():
        dense = model(**inputs)
        model.set_attention(windows=NARROW)
        sparse = model(**inputs)
        model.set_attention(windows=WIDE)
        wide = model(**inputs)
        assert set(model.state_dict()) == names
        model.set_attention(windows="dense")
        again = model(**inputs)
    assert (sparse - dense).abs().max() > 1e-3
    # Another kernel may answer: the sums are the same, their order need not be.
    torch.testing.assert_close(wide, dense, rtol=1e-5, atol=1e-5)
    assert_equal(again, dense)


def test_every_head_of_every_block_has_its_own(generator):
    """One head of one block at a time is enough to change the outcome."""
    model, inputs = tiny_model(generator), tiny_inputs(generator)
    everything = (9, 9, 9)
    seen = []
    with torch.no_grad():
        dense = model(**inputs)
        for name in BLOCKS:
            for heads in (((1, 1, 1), everything), (everything, (1, 1, 1))):
                model.set_attention(windows=windows(everything, everything))
                blocks = dict.fromkeys(BLOCKS, (everything, everything)) | {name: heads}
                model.set_attention(windows=windows(blocks=blocks))
                seen.append(model(**inputs))
    for i, result in enumerate(seen):
        assert not torch.equal(result, dense)
        assert not any(torch.equal(result, other) for other in seen[:i])


def test_with_gradients_and_compiled(generator):
    model, inputs = tiny_model(generator), tiny_inputs(generator)
    model.set_attention(windows=NARROW)
    expected = model(**inputs)
    with torch.no_grad():
        assert_equal(model(**inputs), expected.detach())
    parameter = model.single_blocks[0].linear1.weight
    (gradient,) = torch.autograd.grad(expected.square().sum(), parameter)
    assert gradient.abs().max() > 0
    model.enable_gradient_checkpointing()
    (again,) = torch.autograd.grad(model(**inputs).square().sum(), parameter)
    torch.testing.assert_close(again, gradient)
    block = torch.compile(model.single_blocks[0].attention, fullgraph=True, backend="eager")
    q, k, v = torch.randn(3, 2, 25, 2, 24, generator=generator)
    kv_len = torch.tensor([25, 20])
    options = {"grid": GRID, "tile": TILE, "windows": [(1, 1, 1), (1, 2, 2)]}
    assert_equal(block(q, k, v, kv_len), sliding_tile_attention(q, k, v, **options, kv_len=kv_len))


def test_other_grids_are_refused(generator):
    model = tiny_model(generator)
    model.set_attention(windows=NARROW)
    with pytest.raises(ValueError, match=r"grid \(3, 2, 3\) of the attention windows, got \(4, "):
        model(**tiny_inputs(generator, size=(4, 4, 6)))
    model.set_attention(windows=NARROW.rescaled((4, 2, 3)))
    model(**tiny_inputs(generator, size=(4, 4, 6)))


def test_windows_of_other_models_are_refused(generator):
    model = tiny_model(generator)
    with pytest.raises(ValueError, match=r"5 blocks of this model, got 1, 'double_blocks\.1'"):
        model.set_attention(windows=windows(blocks={"double_blocks.0": ((1, 1, 1),) * 2}))
    with pytest.raises(ValueError, match=r"'double_blocks\.0' must be for 2 heads, got 1"):
        model.set_attention(windows=windows((1, 1, 1)))
    assert model.attention_grid is None


def test_joint_attention_takes_tiles_or_dense():
    attention = JointAttention()
    attention.set(pattern=SlidingTiles(GRID, TILE, (1, 1, 1)))
    assert "SlidingTiles" in repr(attention) and not attention.state_dict()
    q = torch.randn(1, 20, 3, 8)
    lengths = torch.tensor([20])
    expected = sliding_tile_attention(q, q, q, grid=GRID, tile=TILE, windows=(1, 1, 1))
    assert_equal(attention(q, q, q, lengths), expected)
    with pytest.raises(ValueError, match="must be 'dense' or tiles, got 'sparse'"):
        attention.set(pattern="sparse")
    attention.set(pattern="dense")
    assert attention.pattern is None and attention.windows is None


def test_windows_on_another_device_move_with_the_model():
    attention = JointAttention()
    attention.set(pattern=SlidingTiles(GRID, TILE, (1, 1, 1)))
    assert attention.to("meta").windows.is_meta


def test_the_file_keeps_everything(tmp_path):
    path = tmp_path / "windows.json"
    chosen = windows((1, 1, 1), (1, 2, 2))
    chosen.save(path)
    assert AttentionWindows.load(path) == chosen
    assert json.loads(path.read_text())["format_version"] == 1


FAULTS = {
    "no version": (lambda values: values.pop("format_version"), "format_version must be 1, got No"),
    "a later version": (lambda values: values.update(format_version=2), "must be 1, got 2"),
    "a field too many": (lambda values: values.update(heads=2), "unknown field 'heads'"),
    "a field too few": (lambda values: values.pop("tile"), "the field 'tile' is missing"),
    "no name": (lambda values: values.update(model=3), "model must be a name, got 3"),
    "no blocks": (lambda values: values.update(blocks={}), "blocks must map names"),
    "no heads": (lambda values: values["blocks"].update(a=[]), "must list a window for each"),
    "two sizes": (lambda values: values.update(grid=[3, 2]), "grid must be three ints"),
    "a fraction": (lambda values: values.update(tile=[1, 1, 1.5]), "tile must be three ints"),
    "nothing seen": (lambda values: values["blocks"].update(a=[[1, 0, 1]]), "must be positive"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_refused_by_name(fault, tmp_path):
    path = tmp_path / "windows.json"
    NARROW.save(path)
    values = json.loads(path.read_text())
    spoil, message = FAULTS[fault]
    spoil(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as caught:
        AttentionWindows.load(path)
    assert str(path) in str(caught.value)


def test_shares_of_another_grid():
    found = windows((1, 1, 1), (3, 2, 2)).rescaled((6, 3, 10))
    assert found.grid == (6, 3, 10) and found.tile == TILE
    # tiles were (3, 2, 2) and are (6, 3, 5)
    assert found.blocks["double_blocks.0"] == ((2, 2, 3), (6, 3, 5))
    assert WIDE.rescaled((1, 1, 1)).blocks["double_blocks.0"] == ((1, 1, 1),) * 2


def test_fraction_of_the_flops():
    assert WIDE.fraction(text=7) == 1
    assert windows((1, 1, 1), (9, 9, 9)).fraction() == pytest.approx(
        (1 + (3 * 2 * (2 * 2 + 1)) / 18**2) / 2
    )


def test_windows_and_fp8_exclude_each_other(generator):
    """Neither way round, and what was refused changes nothing."""
    model, inputs = tiny_model(generator), tiny_inputs(generator)
    model.set_attention(windows=NARROW)
    with torch.no_grad():
        expected = model(**inputs)
        with pytest.raises(ValueError, match="must be 'dense' with precision 'fp8'"):
            model.set_attention(precision="fp8")
        assert_equal(model(**inputs), expected)
    model.set_attention(precision="fp8", windows="dense")
    with pytest.raises(ValueError, match="must be 'dense' with precision 'fp8'"):
        model.set_attention(windows=NARROW)
    assert model.attention_grid is None
    model.set_attention(precision="same", windows=NARROW)
    with torch.no_grad():
        assert_equal(model(**inputs), expected)
