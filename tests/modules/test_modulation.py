"""Modulation vectors and the small networks."""

import torch
from torch.nn import functional as F

from hunyuan_fast.modules.mlp import MLP, EmbeddingMLP, gelu
from hunyuan_fast.modules.modulation import Modulation


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


def test_networks_name_their_layers(generator):
    x = torch.randn(3, 6, generator=generator)
    mlp = MLP(6, 10, gelu)
    assert set(mlp.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    expected = mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))
    torch.testing.assert_close(mlp(x), expected)
    with torch.no_grad():  # in place
        torch.testing.assert_close(mlp(x), expected)

    embedding = EmbeddingMLP(6, 4, "in_layer", "out_layer")
    assert {name.split(".")[0] for name in embedding.state_dict()} == {"in_layer", "out_layer"}
    expected = embedding.out_layer(F.silu(embedding.in_layer(x)))
    torch.testing.assert_close(embedding(x), expected)
