"""Where codes lie: the order of values, the rotation, the sizes."""

import itertools

import pytest
import torch

from hunyuan_fast.kernels.fp8_attention import reference

SIXTEEN = torch.arange(16)


def test_sums_of_one_product_are_the_operand_of_the_next():
    """By the layouts of wgmma in the PTX ISA: m64nN in fp32, and A of m64k32 in eight bits."""
    for lane, half in itertools.product(range(32), range(2)):
        quad, t = lane // 4, lane % 4
        # registers 4j + 2 half and 4j + 2 half + 1 of the sums: row, and columns 8j + 2t + {0, 1}
        sums = [(quad + 8 * half, 8 * j + 2 * t + i) for j in range(4) for i in range(2)]
        # bytes of the operand's registers half and half + 2: row, and columns 4t to 4t + 3
        operand = [(quad + 8 * half, 16 * part + 4 * t + i) for part in range(2) for i in range(4)]
        tokens = reference.token_at(torch.tensor([column for _, column in operand]))
        assert [row for row, _ in operand] == [row for row, _ in sums]
        assert tokens.tolist() == [column for _, column in sums]


def test_the_order_is_a_permutation_of_each_sixteen():
    order = reference.token_at(torch.arange(64)).view(4, 16)
    assert torch.equal(order.sort().values, torch.arange(64).view(4, 16))
    assert torch.equal(order - order[:, :1], order[:1].expand(4, 16))
    assert order[0].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@pytest.mark.parametrize("head_dim", [1, 6, 48, 64, 96, 128])
def test_rotation_keeps_products_up_to_its_size(head_dim, generator):
    size = reference.rotated(head_dim)
    assert head_dim % size == 0 and (head_dim // size) % 2
    x, y = torch.randn(2, 5, head_dim, generator=generator, dtype=torch.float64)
    products = reference.rotate(x) @ reference.rotate(y).T
    torch.testing.assert_close(products, size * (x @ y.T), rtol=1e-12, atol=1e-12)


def test_rotation_is_a_hadamard_matrix():
    ones = torch.tensor([[bin(i & j).count("1") for j in range(16)] for i in range(16)])
    assert torch.equal(reference.rotate(torch.eye(16)), (1 - 2 * (ones % 2)).float())
    assert torch.equal(reference.rotate(torch.eye(48))[:16, 16:], torch.zeros(16, 32))


def test_rotation_spreads_what_stands_out(generator):
    x = torch.randn(1000, 128, generator=generator)
    x[:, 7] *= 30
    loudest = x.square().mean(0).max() / x.square().mean()
    assert loudest > 50
    rotated = reference.rotate(x)
    assert rotated.square().mean(0).max() < 1.5 * rotated.square().mean()


@pytest.mark.parametrize(("length", "padded"), [(0, 0), (1, 128), (128, 128), (129, 256)])
def test_codes_have_whole_blocks(length, padded):
    assert reference.padded_length(length) == padded
    assert padded % reference.QUERY_BLOCK == padded % reference.KEY_BLOCK == 0
    x = torch.zeros(1, length, 2, 64)
    if length:
        codes = reference.quantize(x, x, x, None, 0.1, reference.statistics(x, x, None))
        assert codes.q.shape == codes.k.shape == (1, 2, padded, 64)
        assert codes.v.shape == (1, 2, 64, padded)
        assert codes.q_scale.shape == (1, 2, padded // 64)
        assert codes.k_scale.shape == (1, 2, padded // 128)
        # no product of two scales is below the normal numbers
        assert float(codes.q_scale.min() * codes.k_scale.min()) >= 2.0**-126


def test_tokens_past_the_valid_ones_are_coded_as_zeros(generator):
    q, k, v = torch.randn(3, 1, 20, 1, 64, generator=generator) + 1
    q, k, v = (x.index_fill(1, torch.arange(13, 20), torch.nan) for x in (q, k, v))
    kv_len = torch.tensor([13])
    known = reference.statistics(k, v, kv_len)
    codes = reference.quantize(q, k, v, kv_len, 0.1, known)
    position = torch.arange(128)
    assert not codes.q[0, 0, 13:].float().any() and not codes.k[0, 0, 13:].float().any()
    assert not codes.v[0, 0][:, reference.token_at(position) >= 13].float().any()
    assert codes.v.float().any()
