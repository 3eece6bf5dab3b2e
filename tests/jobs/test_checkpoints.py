"""`vitds checkpoint list` and `verify` on the checkpoints of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.training import small_run
from vitds.cli import main


def run_with_checkpoints(run: str, data: tuple[str, str]) -> str:
    return str(small_run(run, data, epochs=2, checkpoint__every_steps=2, checkpoint__keep=3).path)


@pytest.fixture
def run(rank_pool, digit_files, tmp_path: Path) -> str:
    return rank_pool(1).run(run_with_checkpoints, str(tmp_path / "run"), digit_files)[0]


def test_checkpoints_are_listed_and_verified_and_a_damaged_one_is_named(run: str, capsys) -> None:
    assert main(["checkpoint", "list", run, "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)["rows"]] == [2, 4, 6]
    assert main(["checkpoint", "verify", run]) == 0
    assert capsys.readouterr().out.count("sound") == 3
    weights = sorted((Path(run) / "checkpoints").glob("*/model*.safetensors"))[1]
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert main(["checkpoint", "verify", run]) == 5
    printed = capsys.readouterr()
    assert (
        printed.out.count("sound") == 2
        and str(weights.parent.name) in printed.err
        and weights.name in printed.err
    )


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path, capsys) -> None:
    for command in ("list", "verify"):
        assert main(["checkpoint", command, str(tmp_path)]) == 5
        assert f"{tmp_path} has no checkpoints; is it a run directory?" in capsys.readouterr().err
