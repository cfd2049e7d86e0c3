"""Rotary tables against published values and diffusers, and the life of their cache."""

import pytest
import torch

from hunyuan_fast.modules.rotary import build_rotary_tables, rotary_tables
from hunyuan_fast.ops.rope3d_attention import apply_rope3d

CPU = torch.device("cpu")
DIMS = (16, 56, 56)


@pytest.mark.parametrize("grid", [(33, 6, 10), (1, 5, 4), (2, 1, 1)])
def test_equal_to_diffusers(grid):
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

    t, h, w = grid
    expected = HunyuanVideoRotaryPosEmbed(2, 1, DIMS, 256.0)(torch.empty(1, 1, t, 2 * h, 2 * w))
    for table, reference in zip(rotary_tables(grid, DIMS, 256.0, CPU), expected, strict=True):
        assert torch.equal(table, reference)


def test_frequencies_per_axis():
    # Position 1 on one axis only: the angles are the frequencies of that axis, and zero elsewhere.
    cos, sin = build_rotary_tables((2, 2, 2), DIMS, 256.0, CPU)
    angles = torch.atan2(sin, cos)
    frequencies = {
        "t": 256 ** (-torch.arange(8) / 8),
        "h": 256 ** (-torch.arange(28) / 28),
        "w": 256 ** (-torch.arange(28) / 28),
    }
    columns = {"t": slice(0, 16), "h": slice(16, 72), "w": slice(72, 128)}
    for row, axis in ((4, "t"), (2, "h"), (1, "w")):  # width is fastest
        expected = torch.zeros(128)
        expected[columns[axis]] = frequencies[axis].repeat_interleave(2)
        torch.testing.assert_close(angles[row], expected, rtol=0, atol=1e-6)
    assert not angles[0].any()


def test_scores_depend_on_the_distance_only(generator):
    grid, dims = (3, 4, 5), (4, 6, 6)
    tables = build_rotary_tables(grid, dims, 256.0, CPU)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 60, 1, 16)
    q, k = (apply_rope3d(x, *tables)[0, :, 0] for x in (q, k))
    scores = (q @ k.T).view(*grid, *grid)
    torch.testing.assert_close(scores[0, 0, 0, 1, 2, 1], scores[1, 1, 3, 2, 3, 4])
    torch.testing.assert_close(scores[2, 3, 4, 0, 1, 4], scores[2, 2, 0, 0, 0, 0])
    assert (scores[0, 0, 0, 1, 2, 1] - scores[0, 0, 0, 2, 2, 1]).abs() > 1e-3


def test_tables_are_cached_by_grid_and_fp32():
    first = rotary_tables((2, 3, 4), DIMS, 256.0, CPU)
    assert rotary_tables((2, 3, 4), DIMS, 256.0, CPU)[0] is first[0]
    assert rotary_tables((2, 4, 3), DIMS, 256.0, CPU)[0] is not first[0]
    assert rotary_tables((2, 3, 4), DIMS, 256.0, torch.device("meta"))[0].is_meta
    assert {table.dtype for table in first} == {torch.float32}
    assert {table.shape for table in first} == {(24, 128)}


def test_tables_made_in_inference_mode_serve_training(generator):
    grid = (2, 3, 7)
    with torch.inference_mode():
        rotary_tables(grid, DIMS, 256.0, CPU)
    x = torch.randn(1, 42, 1, 128, generator=generator, requires_grad=True)
    apply_rope3d(x, *rotary_tables(grid, DIMS, 256.0, CPU)).square().sum().backward()
    torch.testing.assert_close(
        x.grad, 2 * x.detach(), rtol=1e-4, atol=1e-5
    )  # a rotation keeps length
