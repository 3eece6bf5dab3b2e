"""The line an epoch that a log shows: figures of the whole epoch, the probes where they were measured, the
time left.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.engine.training import small_run_path
from vitds.config.tree import Settings
from vitds.engine.live import Live
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

LINE = re.compile(
    r"epoch (\d)/3  step (\d+)  loss [\d.]+  lr [\d.e+-]+  ([\d,]+) images/s  "
    r"([\d.]+) s(.*)  (\d:\d\d:\d\d) left"
)


@pytest.fixture(scope="module")
def logged(rank_pool, digit_files, tmp_path_factory) -> tuple[list[re.Match[str]], Path, str]:
    run = tmp_path_factory.mktemp("logged") / "run"
    rank_pool(1).run(small_run_path, str(run), digit_files, epochs=3, eval__every_epochs=2)
    return list(LINE.finditer(rank_pool(1).output)), run, rank_pool(1).output


def test_speed_is_of_the_whole_epoch_not_of_its_padded_last_step(logged) -> None:
    lines, run, _ = logged
    steps = read_metrics(run / "metrics.jsonl")
    assert [(line[1], line[2]) for line in lines] == [("1", "3"), ("2", "6"), ("3", "9")]
    for epoch, line in enumerate(lines):
        seconds = sum(step["time/step_s"] for step in steps[3 * epoch : 3 * epoch + 3])
        assert float(line[4]) == pytest.approx(seconds, abs=0.06)
        assert float(line[3].replace(",", "")) == pytest.approx(52 / seconds, abs=0.6)


def test_probes_stand_in_the_line_of_the_epoch_they_were_measured_in(logged) -> None:
    lines, run, _ = logged
    found = read_metrics(run / "metrics.jsonl")[5]
    assert [bool(line[5]) for line in lines] == [False, True, False]
    for name in ("alignment", "rankme", "instance_top1", "knn5_top1"):
        assert f"{name.replace('_', ' ')} {found[f'probe/{name}']:.4g}" in lines[1][5]


def test_the_time_left_falls_to_nothing_and_the_result_comes_last(logged) -> None:
    lines, _, said = logged
    assert lines[-1][6] == "0:00:00"
    assert re.fullmatch(
        r"kNN, k = 5: top-1 [\d.]+ % \([\d.]+ to [\d.]+\), top-5 [\d.]+ %, balanced [\d.]+ %, "
        r"macro-F1 [\d.]+ %; always the most frequent class: 25.0 %",
        said.strip().splitlines()[-1],
    )


def test_tensorboard_has_every_number_of_every_step_and_the_bar_moves_ten_times_a_second(
    tmp_path: Path,
) -> None:
    live = Live(Run(tmp_path), Settings(), steps_done=0, total_steps=2, steps_per_epoch=2)
    line = {"epoch": 0, "lr": 0.5, "skipped": 0, "time/step_s": 0.25, "time/images_per_s": 8.0}
    for step in range(2):
        live.step(line | {"step": step, "loss": 3.0 - step})
    assert live.progress.live.refresh_per_second <= 10
    live.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(0, 3.0), (1, 2.0)]
    assert set(board.Tags()["scalars"]) == {"loss", "lr", "skipped", "time/step_s", "time/images_per_s"}
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
