"""Frame-causal attention against an explicit mask, without ever holding one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_fast.modules.frame_causal_attention import (
    FrameCausalAttention,
    frame_causal_attention,
)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of values of the largest tensor any operation returned."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return out


def masked(q, k, v, tokens_per_frame):
    frame = torch.arange(q.shape[1]) // tokens_per_frame
    allowed = frame[:, None] >= frame[None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


def inputs(generator, frames, tokens, *, batch=2, heads=1, dim=8, dtype=torch.float64):
    shape = (3, batch, frames * tokens, heads, dim)
    return torch.randn(shape, generator=generator, dtype=dtype).unbind()


@pytest.mark.parametrize(
    ("frames", "tokens", "heads"), [(1, 6, 1), (4, 1, 1), (5, 6, 1), (3, 4, 2)]
)
def test_forward_and_backward_equal_a_mask(generator, frames, tokens, heads):
    values = [x.requires_grad_() for x in inputs(generator, frames, tokens, heads=heads)]
    upstream = torch.randn(values[0].shape, generator=generator, dtype=torch.float64)
    actual = frame_causal_attention(*values, tokens_per_frame=tokens)
    expected = masked(*values, tokens)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(
        torch.autograd.grad((actual * upstream).sum(), values),
        torch.autograd.grad((expected * upstream).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_later_frames_are_never_read(generator):
    q, k, v = inputs(generator, 4, 3)
    expected = frame_causal_attention(q, k, v, tokens_per_frame=3)[:, :6]
    k[:, 6:] = v[:, 6:] = torch.nan
    assert torch.equal(frame_causal_attention(q, k, v, tokens_per_frame=3)[:, :6], expected)


def test_no_mask_and_no_table_of_scores(generator):
    """With 1088 tokens a mask would have 1183744 values; nothing is larger than the inputs."""
    q, k, v = (
        x.requires_grad_() for x in inputs(generator, 17, 64, batch=1, dim=16, dtype=torch.float32)
    )
    with LargestTensor() as largest:
        frame_causal_attention(q, k, v, tokens_per_frame=64).square().sum().backward()
    assert largest.values == q.numel()


@pytest.mark.parametrize("tokens_per_frame", [0, -4, 5])
def test_frames_must_be_whole(generator, tokens_per_frame):
    q, k, v = inputs(generator, 3, 4)
    with pytest.raises(ValueError, match=f"tokens_per_frame = {tokens_per_frame}, got 12"):
        frame_causal_attention(q, k, v, tokens_per_frame=tokens_per_frame)


def test_module(generator):
    attention = FrameCausalAttention(8, 4)
    x = torch.randn(2, 8, 3, 2, 4, generator=generator)
    tokens = attention.group_norm(x).flatten(2).transpose(1, 2)
    q, k, v = (
        layer(tokens).unsqueeze(2) for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    out = attention.to_out[0](masked(q, k, v, 8).squeeze(2))
    expected = x + out.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)
