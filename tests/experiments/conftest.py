"""Stages in this process, and images without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
from PIL import Image

from vitds.cli import main
from vitds.jobs import chain


@pytest.fixture(scope="module")
def ran() -> Iterator[list[str]]:
    """The run directories of the stages that ran. They run in this process, by the same words: a process for
    each would take its start of seconds."""
    runs: list[str] = []

    def status(command: Sequence[str]) -> int:
        assert list(command[1:3]) == ["-m", "vitds"]
        runs.append(command[-1])
        return main(command[3:])

    with mock.patch.object(chain, "_status", status):
        yield runs


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A .beton of four images without labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "all").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 90, 10)).save(folder / "all" / f"{number}.png")
    words = ["--no_labels", "--workers", "1", "--out", str(folder / "all.beton")]
    assert main(["data", "build", str(folder / "all"), *words]) == 0
    return str(folder / "all.beton")
