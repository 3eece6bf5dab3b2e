"""A run that was killed or stopped goes on: to the same bytes on the same ranks, to rounding on others."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.engine.training import small_losses, small_run, stopped_run, untimed
from vitds.errors import RunError
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
EPOCHS = 4  # of three steps
SMALL_RUN = """
import json, sys
from tests.engine.training import small_run
small_run(sys.argv[1], json.loads(sys.argv[2]), **json.loads(sys.argv[3]))
"""


def start_process(run: Path, data: tuple[str, str], options: dict) -> subprocess.Popen:
    words = [sys.executable, "-c", SMALL_RUN, str(run), json.dumps(data), json.dumps(options)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"LOCAL_SIZE": "1"})


def outcome(run: Path) -> tuple[bytes, list[str]]:
    return (run / "backbone.safetensors").read_bytes(), untimed(run)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {"head__kind": "dense"}),
        (2, {"head__kind": "sharded", "batch__micro_images": 8}),
        (3, {"head__kind": "dense"}),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(rank_pool, digit_files, tmp_path: Path, stage: int, options: dict) -> None:
    options |= {"stage": stage, "epochs": EPOCHS, "checkpoint__every_steps": 1}
    rank_pool(1).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    killed = tmp_path / "killed"
    process = start_process(killed, digit_files, options)
    lines = random.Random(stage).randint(2, 9)
    while len(read_metrics(killed / "metrics.jsonl")) < lines:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.001)
    time.sleep(random.Random(stage).random() * 0.05)
    process.kill()
    process.wait()
    assert not Run(killed).is_finished
    rank_pool(1).run(small_run_path, str(killed), digit_files, **options)
    assert outcome(killed) == outcome(tmp_path / "whole")


def small_run_path(run: str, data: tuple[str, str], **options) -> str:
    return str(small_run(run, data, **options).path)


@pytest.mark.parametrize(
    ("before", "after", "head"),
    [
        ((2, 2), (1, 3), "dense"),
        ((2, 3), (3, 0), "dense"),
        ((3, 0), (2, 1), "sharded"),
        ((1, 1), (3, 3), "sharded"),
        ((3, 3), (2, 2), "sharded"),
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_with_other_ranks_and_stage(rank_pool, digit_files, tmp_path: Path, before, after, head: str) -> None:
    options = {"epochs": EPOCHS, "head__kind": head}
    expected = rank_pool(1).run(small_losses, str(tmp_path / "whole"), digit_files, **options)[0]
    (ranks, stage), (ranks_after, stage_after) = before, after
    said = rank_pool(ranks).run(stopped_run, str(tmp_path / "run"), digit_files, after_lines=5, stage=stage, **options)
    assert all("stopped by a signal after step" in text for text in said)
    losses = rank_pool(ranks_after).run(small_losses, str(tmp_path / "run"), digit_files, stage=stage_after, **options)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(rank_pool, digit_files, tmp_path: Path) -> None:
    options = {"epochs": EPOCHS, "checkpoint__every_steps": 2}
    rank_pool(1).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    rank_pool(1).run(stopped_run, str(tmp_path / "run"), digit_files, after_lines=5, **options)
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    file = newest / "model-0-of-1.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    rank_pool(1).run(small_run_path, str(tmp_path / "run"), digit_files, **options)
    said = rank_pool(1).output
    assert "passed over a damaged checkpoint" in said and "does not have the SHA-256 of its manifest" in said
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def resume_error(run: str, data: tuple[str, str], **options) -> str:
    with pytest.raises(RunError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


def test_other_settings_or_another_file_are_refused_on_resume(rank_pool, digit_files, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    rank_pool(1).run(stopped_run, run, digit_files, after_lines=2, epochs=EPOCHS)
    said = rank_pool(1).run(resume_error, run, digit_files, epochs=EPOCHS + 1, optimizer__weight_decay=0.5)[0]
    assert f"epochs was {EPOCHS}, now {EPOCHS + 1}" in said and "optimizer.weight_decay was 0.001, now 0.5" in said and "--init" in said
    moved = Path(digit_files[0])
    other = tmp_path / moved.name
    for name, source in ((other, digit_files[1]), (other.with_name(other.name + ".json"), digit_files[1] + ".json")):
        name.write_bytes(Path(source).read_bytes())
    kept = [Path(path).read_bytes() for path in (digit_files[0], digit_files[0] + ".json")]
    try:
        moved.write_bytes(other.read_bytes())
        Path(digit_files[0] + ".json").write_bytes(Path(f"{other}.json").read_bytes())
        said = rank_pool(1).run(resume_error, run, digit_files, epochs=EPOCHS)[0]
    finally:
        moved.write_bytes(kept[0])
        Path(digit_files[0] + ".json").write_bytes(kept[1])
    assert "was trained on 52 rows" in said and "has 20 with" in said


def test_a_second_writer_is_refused(rank_pool, digit_files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_process(run, digit_files, {"epochs": 200})
    while len(read_metrics(run / "metrics.jsonl")) < 1:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    said = rank_pool(1).run(resume_error, str(run), digit_files, epochs=200)[0]
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert f"is in use by process {process.pid}" in said
    assert b"stopped by a signal after step" in process.stderr.read()
