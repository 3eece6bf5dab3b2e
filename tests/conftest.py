"""Fixtures for all tests; shapes and types of public signatures are checked at run time (jaxtyping), which a run does not pay for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported anywhere

import pytest
from jaxtyping import install_import_hook

install_import_hook("vitds", "beartype.beartype")

from tests.ranks import RankPool  # noqa: E402


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """rank_pool(2) gives two real ranks, started at the first use."""
    pools: dict[int, RankPool] = {}

    def pool(ranks: int) -> RankPool:
        if ranks not in pools or not all(process.is_alive() for process in pools[ranks].processes):
            pools[ranks] = RankPool(ranks)
        return pools[ranks]

    yield pool
    for each in pools.values():
        each.close()
