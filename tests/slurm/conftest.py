"""Clusters for the tests whose names begin with test_slurm; they skip, saying why, where Slurm is missing and cannot be installed.

They install packages and start daemons, so they run only when asked for: VITDS_SLURM_TESTS=1 bash tests/run.sh tests/slurm
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("VITDS_SLURM_TESTS") != "1":
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason="a real Slurm is started only with VITDS_SLURM_TESTS=1"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for the session."""
    with started(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def own_slurm(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster for a test that breaks it."""
    with started(tmp_path / "cluster") as cluster:
        yield cluster
