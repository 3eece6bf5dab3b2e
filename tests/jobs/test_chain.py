"""`vitds chain`: stages in order, finished ones skipped, a failed one ends the chain with its status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vitds.cli import main

# A command that finishes its run as a training does, and notes that it ran.
DONE = """
import pathlib, sys
run = pathlib.Path(sys.argv[2])
run.mkdir()
(run / "summary.json").write_text("{}")
with open("ran", "a") as ran:
    ran.write(run.name)
"""


def stages_file(folder: Path, *commands: tuple[str, str]) -> str:
    lines = [f"- {{run: {run}, command: '{command}'}}" for run, command in commands]
    (folder / "stages.yaml").write_text("\n".join(lines) + "\n")
    return str(folder / "stages.yaml")


def python(folder: Path, name: str, code: str) -> str:
    (folder / name).write_text(code)
    return f"{sys.executable} {folder / name}"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_stages_run_in_order_and_a_finished_one_is_skipped(tmp_path: Path, capsys) -> None:
    done = python(tmp_path, "done.py", DONE)
    file = stages_file(tmp_path, ("a", done), ("b", done))
    assert main(["chain", file]) == 0 and (tmp_path / "ran").read_text() == "ab"
    assert main(["chain", file]) == 0 and (tmp_path / "ran").read_text() == "ab"
    assert "stage 2/2: b is finished, skipped" in capsys.readouterr().out


def test_a_failed_stage_ends_the_chain_with_its_status(tmp_path: Path, capsys) -> None:
    done, fails = python(tmp_path, "done.py", DONE), python(tmp_path, "fails.py", "raise SystemExit(75)")
    assert main(["chain", stages_file(tmp_path, ("a", done), ("b", fails), ("c", done))]) == 75
    assert "stage 2 (b) ended with status 75; its log is b/log.txt" in capsys.readouterr().err
    assert (tmp_path / "ran").read_text() == "a"


def test_a_stage_that_leaves_its_run_unfinished_fails(tmp_path: Path, capsys) -> None:
    assert main(["chain", stages_file(tmp_path, ("a", python(tmp_path, "idle.py", "pass")))]) == 1
    assert "stage 1 (a) ended with status 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "absent.yaml does not exist; chain takes a YAML list of {run: DIRECTORY, command: COMMAND}"),
        ("run: a", "absent.yaml: must be a list of stages, each with the keys run and command"),
        (
            "- {run: a, comand: b}",
            "absent.yaml: stage 1 must have just the keys run and command, both text; got {'run': 'a', 'comand': ",
        ),
    ],
)
def test_a_file_that_lists_no_stages_is_refused(tmp_path: Path, capsys, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "absent.yaml").write_text(text)
    assert main(["chain", "absent.yaml"]) == 2
    assert said in capsys.readouterr().err
