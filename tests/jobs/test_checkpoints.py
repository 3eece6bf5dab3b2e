"""`vitds checkpoint list`, `verify` and `prune`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.engine.training import small_run
from vitds.cli import main
from vitds.runs.checkpoint import write_checkpoint
from vitds.runs.lock import RunLock


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


def test_a_manifest_that_cannot_be_read_is_a_line_of_the_list(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    for step in range(1, 5):
        write_checkpoint(run / "checkpoints", step, {"model": {"a": torch.ones(9)}}, {}, keep=9)
    for step, text in ((1, "{"), (2, '{"files": {}}'), (3, '{"step": 3, "files": {"a": 1}}')):
        (run / f"checkpoints/step-{step:08}/manifest.json").write_text(text)
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["step"] for row in rows] == [None, None, None, 4] and rows[3]["problem"] == ""
    assert "cannot be read" in rows[0]["problem"] and "lacks the step" in rows[1]["problem"]
    assert main(["checkpoint", "list", str(run)]) == 0 and "lacks" in capsys.readouterr().out


def names(run: str) -> list[str]:
    return sorted(path.name for path in (Path(run) / "checkpoints").iterdir())


def test_pruning_keeps_the_newest_sound_ones(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    for step in range(1, 6):
        write_checkpoint(run / "checkpoints", step, {"model": {"a": torch.ones(9)}}, {}, keep=9)
    (run / "checkpoints/step-00000005/manifest.json").write_text("{")
    assert main(["checkpoint", "prune", str(run), "--keep", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["state"] for row in rows] == ["removed", "removed", "kept", "kept", "removed"]
    assert names(run) == ["step-00000003", "step-00000004"]
    assert main(["checkpoint", "prune", str(run)]) == 0 and names(run) == ["step-00000004"]
    assert "kept" in capsys.readouterr().out


def test_pruning_spares_a_run_that_trains_and_one_without_a_sound_checkpoint(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        write_checkpoint(run / "checkpoints", step, {"model": {"a": torch.ones(9)}}, {}, keep=9)
    lock = RunLock(run)
    assert main(["checkpoint", "prune", str(run)]) == 5 and "is in use by process" in capsys.readouterr().err
    lock.release()
    assert main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2
    assert "--keep 0: must be 1 or more" in capsys.readouterr().err
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    assert main(["checkpoint", "prune", str(run)]) == 5
    assert "is sound, so all stay; the newest: " in capsys.readouterr().err
    assert len(names(run)) == 2


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path, capsys) -> None:
    for command in ("list", "verify", "prune"):
        assert main(["checkpoint", command, str(tmp_path)]) == 5
        assert f"{tmp_path} has no checkpoints; is it a run directory?" in capsys.readouterr().err
