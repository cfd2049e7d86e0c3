"""Rotary positions on the video tokens, alone and in front of attention."""

import pytest
import torch
from torch import Tensor

from hunyuan_fast.ops.rope3d_attention import apply_rope3d, rope3d_attention
from tests.kit.emulation import plain_attention
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.numerics import assert_equal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def angles(num_tokens: int, head_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tables of random angles, each repeated for the two features of its pair."""
    theta = 6.28 * torch.rand(num_tokens, head_dim // 2, generator=generator)
    theta = theta.repeat_interleave(2, dim=-1)
    return theta.cos(), theta.sin()


def rotation_matrices(cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation of every token as a matrix (num_tokens, D, D), in float64."""
    matrices = torch.zeros(*cos.shape, cos.shape[1], dtype=torch.float64)
    for i in range(0, cos.shape[1], 2):
        matrices[:, i, i] = matrices[:, i + 1, i + 1] = cos[:, i].double()
        matrices[:, i, i + 1] = -sin[:, i].double()
        matrices[:, i + 1, i] = sin[:, i].double()
    return matrices


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_video_tokens", [0, 1, 7, 11])
def test_rope_rotates_pairs_of_video_tokens_only(dtype, num_video_tokens, generator):
    x = torch.randn(2, 11, 3, 8, generator=generator).to(dtype)
    cos, sin = angles(num_video_tokens, 8, generator)
    result = apply_rope3d(x, cos, sin)
    video = x[:, :num_video_tokens].double()
    expected = torch.einsum("lij,blnj->blni", rotation_matrices(cos, sin), video)
    assert result.dtype == dtype
    # fp32 inside and one rounding at the end
    error = (result[:, :num_video_tokens].double() - expected).abs()
    bound = expected.abs() * 0.501 * torch.finfo(dtype).eps + 1e-6
    assert (error <= bound).all()
    assert_equal(result[:, num_video_tokens:], x[:, num_video_tokens:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_takes_any_strides(layout, generator):
    x = with_layout(torch.randn(2, 9, 3, 8, generator=generator), layout)
    cos, sin = angles(5, 8, generator)
    assert_equal(apply_rope3d(x, cos, sin), apply_rope3d(x.contiguous(), cos, sin))


def test_rope_gradcheck(generator):
    x = torch.randn(2, 5, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(3, 6, generator)
    assert torch.autograd.gradcheck(lambda x: apply_rope3d(x, cos.double(), sin.double()), x)


def test_rope3d_attention_is_rotation_then_attention(generator):
    q, k, v, dout = (torch.randn(2, 14, 2, 8, generator=generator) for _ in range(4))
    cos, sin = angles(9, 8, generator)
    kv_len = torch.tensor([14, 10])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = rope3d_attention(
        *leaves, cos, sin, num_video_tokens=9, kv_len=kv_len, return_lse=True
    )
    matrices = rotation_matrices(cos, sin)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    rotated = [
        torch.cat((torch.einsum("lij,blnj->blni", matrices, x[:, :9]), x[:, 9:]), dim=1)
        for x in exact[:2]
    ]
    wanted, wanted_lse = plain_attention(*rotated, exact[2], [14, 10], 8**-0.5)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(out, leaves, dout)
    theirs = torch.autograd.grad(wanted, exact, dout.double())
    for result, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-6)


Q = torch.zeros(2, 5, 3, 4)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        (torch.zeros(5, 3, 4), torch.zeros(2, 4), torch.zeros(2, 4), r"x must be \(B, L, N, D\)"),
        (torch.zeros(2, 5, 3, 5), torch.zeros(2, 5), torch.zeros(2, 5), "D even"),
        (Q, torch.zeros(2, 2), torch.zeros(2, 2), "cos must be"),
        (Q, torch.zeros(6, 4), torch.zeros(6, 4), "at most 5 rows"),
        (Q, torch.zeros(2, 4), torch.zeros(2, 1, 4), "sin must be"),
        (Q, torch.zeros(2, 4), torch.zeros(3, 4), "one shape"),
    ],
)
def test_bad_tables_are_refused(x, cos, sin, message):
    with pytest.raises(ValueError, match=message):
        apply_rope3d(x, cos, sin)


def test_tables_must_fit_the_video_tokens():
    with pytest.raises(ValueError, match="num_video_tokens is 3"):
        rope3d_attention(Q, Q, Q, torch.zeros(2, 4), torch.zeros(2, 4), num_video_tokens=3)


def test_compiles_to_one_graph(generator):
    cos, sin = angles(6, 8, generator)

    def block(q, k, v, kv_len):
        return rope3d_attention(q, k * 2, v, cos, sin, num_video_tokens=6, kv_len=kv_len).square()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    leaves = [torch.randn(2, 12, 2, 8, generator=generator).requires_grad_() for _ in range(3)]
    for lengths in ([12, 9], [3, 12]):
        kv_len = torch.tensor(lengths)
        eager = torch.autograd.grad(block(*leaves, kv_len).sum(), leaves)
        ours = torch.autograd.grad(compiled(*leaves, kv_len).sum(), leaves)
        for result, expected in zip(ours, eager, strict=True):
            torch.testing.assert_close(result, expected)
