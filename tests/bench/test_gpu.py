"""`vitds bench gpu` in small sizes on this machine: every part runs, its results are kept, failures are said.

No test looks at a time or a rate.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from vitds.bench import gpu
from vitds.bench.gpu import PARTS, bench_gpu
from vitds.bench.gpu_check import RESULTS, Check
from vitds.errors import DataError, NumericsError, UsageError, VitdsError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the parts build the images, once for all of them."""
    return tmp_path_factory.mktemp("work")


def run(part: str, work: Path, out: Path) -> dict[str, Any]:
    """A part in this process; the values that it found, by name."""
    getattr(import_module(f"vitds.bench.{PARTS[part].module}"), PARTS[part].function)(
        Check(part, out, work, None, toy=True)
    )
    return {line["name"]: line["value"] for line in map(json.loads, (out / RESULTS).read_text().splitlines())}


def test_machine_finds_its_ceilings_and_builds_the_images(work: Path, tmp_path: Path) -> None:
    found = run("machine", work, tmp_path)
    assert (
        found["versions"].startswith("Python") and found["the loader's crops are in pinned memory"] == "False"
    )
    assert found["device to device, read and written"] > 0 and found["product in torch.float32"] > 0
    assert {file.name for file in work.glob("*.beton")} >= {"raw-all.beton", "jpg-all.beton"}


def test_numbers_agree_with_their_references(work: Path, tmp_path: Path) -> None:
    found = run("numbers", work, tmp_path)
    errors = {name: value for name, value in found.items() if isinstance(value, float)}
    assert len(errors) == 3 and all(error < 2e-2 for error in errors.values())
    assert {value for name, value in found.items() if name.startswith("mixing")} == {"none"}


def test_numbers_that_are_off_are_named(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("vitds.bench.gpu_numbers")
    monkeypatch.setattr(module, "first_losses", lambda check, device: [])
    right = module.normalize
    monkeypatch.setattr(module, "normalize", lambda x: 1.01 * right(x))
    with pytest.raises(NumericsError, match="'temperature': 0.1.* in fp32 is off by"):
        run("numbers", work, tmp_path)


def test_a_run_that_is_stopped_and_resumed_ends_in_equal_bytes(work: Path, tmp_path: Path) -> None:
    found = run("resume", work, tmp_path)
    (outcome,) = (value for name, value in found.items() if "straight" in name)
    assert outcome == "equal bytes" and found["a deterministic step, to that"] > 0


def test_so_does_a_compiled_one(work: Path, tmp_path: Path) -> None:
    (outcome,) = run("resume_compiled", work, tmp_path).values()
    assert outcome == "equal bytes"


def test_speed_measures_steps_loader_and_both(work: Path, tmp_path: Path) -> None:
    found = run("speed", work, tmp_path)
    for name in ("step on fixed tensors, compiled", "loader alone, raw", "crops from data"):
        assert found[name] > 0
    assert "Self CPU" in (tmp_path / "profile.txt").read_text()


def test_head_and_memory_stand_beside_what_they_are_compared_with(work: Path, tmp_path: Path) -> None:
    found = run("head", work, tmp_path)
    assert found["ours, dense, all logits kept, time"] > 0
    assert found["ours, sharded, default, to four products"] > 0
    found = run("memory", work, tmp_path)
    planned = [value for name, value in found.items() if name.endswith(", planned")]
    assert len(planned) == 2 and all(planned)


def test_train_keeps_the_curve(work: Path, tmp_path: Path) -> None:
    found = run("train", work, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "train-metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0] * 3 + [1] * 3
    for epoch, losses in ((1, lines[:3]), (2, lines[3:])):
        mean = sum(line["loss"] for line in losses) / 3
        assert found[f"loss in epoch {epoch} of 2"] == pytest.approx(mean)


def test_a_part_that_is_cut_or_fails_is_a_line_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.PARTS, "machine", PARTS["machine"]._replace(limit_s=0.1))
    monkeypatch.setitem(gpu.PARTS, "train", PARTS["train"]._replace(limit_s=300))
    (tmp_path / "notes.tar").write_text("no archive")
    out = tmp_path / "out"
    with pytest.raises(VitdsError, match="2 of 2 parts failed: machine, train; see .*log.txt"):
        bench_gpu(out=str(out), parts="train,machine", data=str(tmp_path / "notes.tar"))
    parts = json.loads((out / "summary.json").read_text())["parts"]
    assert parts["machine"]["failed"] == "cut after 0 s"
    assert parts["train"]["failed"].startswith("DataError: ")
    assert [json.loads(line)["part"] for line in (out / RESULTS).read_text().splitlines()] == [
        "machine",
        "train",
    ]
    assert "notes.tar" in (out / "log.txt").read_text() and "DataError" in capsys.readouterr().out


def test_wrong_words_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--parts haed: there are machine,.*head"):
        bench_gpu(out=str(tmp_path / "out"), parts="haed")
    with pytest.raises(DataError, match="no such folder or archive"):
        bench_gpu(out=str(tmp_path / "out"), data=str(tmp_path / "gone"))
    assert not (tmp_path / "out").exists()
