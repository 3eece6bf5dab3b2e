"""Clusters for the tests whose names begin with test_slurm; they skip, saying why, where Slurm is missing and
cannot be installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, started


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
