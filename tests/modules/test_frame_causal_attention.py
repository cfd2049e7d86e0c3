"""The VAE's mid attention as a module, against its layers and an explicit mask."""

import torch
import torch.nn.functional as F

from hunyuan_fast.modules.frame_causal_attention import FrameCausalAttention


def masked(q, k, v, tokens_per_frame):
    frame = torch.arange(q.shape[1]) // tokens_per_frame
    allowed = frame[:, None] >= frame[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def test_module(generator):
    attention = FrameCausalAttention(8, 4)
    x = torch.randn(2, 8, 3, 2, 4, generator=generator)
    tokens = attention.group_norm(x).flatten(2).transpose(1, 2)
    q, k, v = (layer(tokens) for layer in (attention.to_q, attention.to_k, attention.to_v))
    out = attention.to_out[0](masked(q, k, v, 8))
    expected = x + out.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)
