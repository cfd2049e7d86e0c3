"""Parts of anything over any number of ranks."""

import pytest
import torch

from hunyuan_fast.distributed.shards import TokenShards, part, split_sizes, starts


@pytest.mark.parametrize("length", (0, 1, 2, 7, 12, 256))
@pytest.mark.parametrize("parts", (1, 2, 3, 4, 7))
def test_parts_are_adjacent_and_balanced(length: int, parts: int) -> None:
    sizes = split_sizes(length, parts)
    assert sum(sizes) == length and len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)
    rows = [row for index in range(parts) for row in range(length)[part(sizes, index)]]
    assert rows == list(range(length))
    assert starts(sizes) == tuple(part(sizes, index).start for index in range(parts))


@pytest.mark.parametrize(("length", "parts"), ((-1, 2), (3, 0)))
def test_what_has_no_parts(length: int, parts: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        split_sizes(length, parts)


@pytest.mark.parametrize("ranks", (1, 2, 3, 4, 5))
def test_valid_rows_of_each_rank(ranks: int) -> None:
    shards = TokenShards.split(11, 6, ranks)
    lengths = torch.tensor([0, 1, 4, 6])
    kv_len = shards.kv_len(lengths)
    assert kv_len.shape == (ranks, 4) and kv_len.dtype == torch.int32
    assert kv_len.sum(0).tolist() == (11 + lengths).tolist()
    for rank in range(ranks):
        text = range(6)[part(shards.text, rank)]
        valid = [sum(token < length for token in text) for length in lengths.tolist()]
        assert kv_len[rank].tolist() == [shards.video[rank] + count for count in valid]


def test_adjacent_ranks_taken_as_one() -> None:
    shards = TokenShards.split(11, 6, 6)
    merged = shards.merged(2)
    assert merged == TokenShards((4, 4, 3), (2, 2, 2))
    text_len = torch.tensor([0, 3, 5])
    pairs = shards.kv_len(text_len).view(3, 2, 3).sum(1)
    assert torch.equal(merged.kv_len(text_len), pairs.to(torch.int32))
    with pytest.raises(ValueError, match="must divide the 6 ranks, got 4"):
        shards.merged(4)


def test_sizes_for_different_ranks() -> None:
    with pytest.raises(ValueError, match="a size for each rank, got 2 and 1"):
        TokenShards((1, 1), (1,))
