"""Modulation vectors, gated residuals and the small networks."""

import torch
from torch import nn
from torch.nn import functional as F

from hunyuan_fast.modules.mlp import MLP, EmbeddingMLP
from hunyuan_fast.modules.modulation import Modulation, gate_residual


def test_modulation_cuts_its_features_in_order(generator):
    modulation = Modulation(8, 6)
    vec = torch.randn(3, 8, generator=generator)
    linear = modulation.linear
    vectors = modulation(vec)
    assert len(vectors) == 6
    for i, vector in enumerate(vectors):
        rows = slice(8 * i, 8 * i + 8)
        expected = F.linear(F.silu(vec), linear.weight[rows], linear.bias[rows])
        torch.testing.assert_close(vector, expected)


def test_gate_residual_uses_the_gate_of_each_sample(generator):
    x, y = torch.randn(2, 2, 5, 4, generator=generator)
    gate = torch.randn(2, 4, generator=generator)
    expected = torch.stack([x[i] + y[i] * gate[i] for i in range(2)])
    torch.testing.assert_close(gate_residual(x, y, gate), expected)


def test_networks_name_their_layers(generator):
    x = torch.randn(3, 6, generator=generator)
    mlp = MLP(6, 10, nn.GELU(approximate="tanh"))
    assert set(mlp.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))

    embedding = EmbeddingMLP(6, 4, "in_layer", "out_layer")
    assert {name.split(".")[0] for name in embedding.state_dict()} == {"in_layer", "out_layer"}
    expected = embedding.out_layer(F.silu(embedding.in_layer(x)))
    torch.testing.assert_close(embedding(x), expected)
