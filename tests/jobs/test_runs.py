"""`vitds runs`: every run below a folder, its state and its result; one that is damaged hides no other."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.engine.training import rewound, small_run_path
from vitds.cli import main
from vitds.jobs.runs import list_runs
from vitds.runs.directory import read_json
from vitds.runs.lock import RunLock, is_held
from vitds.runs.metrics import last_line, read_metrics


@pytest.fixture(scope="module")
def folder(rank_pool, digit_files, tmp_path_factory) -> Path:
    """A pretrained and a fine-tuned run, one that was stopped, one that has not begun, a damaged one."""
    root = tmp_path_factory.mktemp("r") / "runs"
    for method in ("idmm", "supervised"):
        options = {"method": method, "checkpoint__every_steps": 2, "checkpoint__keep": 9}
        rank_pool(1).run(small_run_path, str(root / "group" / method), digit_files, **options)
    rewound(root / "group" / "supervised", root / "stopped", 4)
    for name in ("empty", "damaged"):
        (root / name).mkdir()
        shutil.copy(root / "stopped" / "settings.yaml", root / name)
    (root / "damaged" / "settings.yaml").write_text("epochs: many\n")
    return root


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {Path(row["run"]).name: row for row in rows}


def test_every_run_has_its_state(folder: Path) -> None:
    rows = by_name(list_runs(str(folder)))
    assert {name: row["state"] for name, row in rows.items()} == {
        "idmm": "finished",
        "supervised": "finished",
        "stopped": "stopped",
        "empty": "not begun",
        "damaged": "unreadable",
    }
    assert "epochs: must be a whole number" in rows["damaged"]["problem"]
    assert (rows["stopped"]["step"], rows["stopped"]["top1"]) == (6, None)


def test_a_finished_run_has_the_figures_of_its_summary(folder: Path) -> None:
    rows = by_name(list_runs(str(folder)))
    tuned = read_json(folder / "group" / "supervised" / "summary.json")
    for key in ("top1", "balanced_accuracy", "macro_f1", "majority", "top1_interval", "seconds"):
        assert rows["supervised"][key] == tuned[key]
    knn = read_json(folder / "group" / "idmm" / "summary.json")["knn"]["5"]
    assert (rows["idmm"]["result"], rows["idmm"]["top1"]) == ("kNN (k = 5)", knn["top1"])
    assert (rows["idmm"]["method"], rows["idmm"]["backbone"]) == ("idmm", "vit_tiny_patch16_224")


def test_a_run_that_is_held_is_running(folder: Path) -> None:
    before = (folder / "stopped" / "lock").read_bytes()
    lock = RunLock(folder / "stopped")
    try:
        assert by_name(list_runs(str(folder)))["stopped"]["state"] == "running"
    finally:
        lock.release()
    assert by_name(list_runs(str(folder)))["stopped"]["state"] == "stopped"
    (folder / "stopped" / "lock").write_bytes(before)


def test_a_holder_elsewhere_counts_until_it_is_silent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder / "empty"
    (run / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "ticks": 1, "counter": 3}))
    assert is_held(run)
    monkeypatch.setattr("vitds.runs.lock.STALE_AFTER_S", -1.0)
    assert not is_held(run)
    for text in ("", "no json", "[]", '{"counter": 3}'):
        (run / "lock").write_text(text)
        assert not is_held(run)
    (run / "lock").unlink()
    assert not is_held(run)


def test_the_table_the_csv_and_the_json_say_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "runs.csv"
    assert main(["runs", str(folder), "--csv", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "stopped at step 6" in printed and f"{file}: 5 runs" in printed
    assert main(["runs", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    with open(file, newline="") as text:
        written = list(csv.DictReader(text))
    assert [row["run"] for row in written] == [row["run"] for row in rows]
    tuned = next(row for row in rows if row["run"].endswith("supervised"))
    own = next(row for row in written if row["run"].endswith("supervised"))
    assert [float(own["top1"]), float(own["top1_low"]), float(own["top1_high"])] == [
        tuned["top1"],
        *tuned["top1_interval"],
    ]
    assert f"{tuned['top1']:.1f} %" in printed
    lines = printed.splitlines()
    assert all(any(row["run"] in line for line in lines) for row in rows), (
        "without a terminal, names stay whole"
    )


def test_a_csv_holds_whatever_name_a_folder_has(tmp_path: Path) -> None:
    run = os.fsencode(tmp_path) + b"/r\xff"
    os.mkdir(run)
    with open(run + b"/settings.yaml", "w") as file:
        file.write("epochs: many\n")
    assert main(["runs", str(tmp_path), "--csv", str(tmp_path / "runs.csv")]) == 0
    assert r"r\udcff" in (tmp_path / "runs.csv").read_text("utf-8")


def test_a_folder_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, text in (
        ([str(tmp_path / "absent")], "absent is no folder, seen from"),
        ([str(tmp_path)], "holds no run directory, at any depth: none has a settings.yaml"),
    ):
        assert main(["runs", *words]) == 5
        assert text in capsys.readouterr().err


def test_a_csv_that_cannot_be_written_is_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["runs", str(folder), "--csv", str(folder / "absent" / "x.csv")]) == 6
    assert "x.csv cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("end", [b"", b'{"step": 9', b"\xff\xfe"])
def test_the_last_line_is_the_last_whole_one(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_line(path) is None
    path.write_bytes(b"".join(b'{"step": %d, "x": "%s"}\n' % (i, b"y" * 1000) for i in range(200)) + end)
    assert last_line(path)["step"] == 199 == read_metrics(path)[-1]["step"]
