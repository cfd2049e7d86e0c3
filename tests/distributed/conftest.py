"""Processes for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.kit.ranks import RankPool, rank_pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks.run(3, function, *args)`` runs a function by three processes of one world."""
    with rank_pool() as pool:
        yield pool
