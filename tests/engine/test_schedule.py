"""The learning rate at its turning points, a teacher's momentum, and how often checkpoints come."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.engine.training import small_run_path
from vitds.engine.saving import SAVING_SHARE, time_is_up
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics
from vitds.schedule import LearningRate, teacher_momentum, warmup_steps


def test_rates_at_start_end_of_warm_up_middle_and_end() -> None:
    warmup, total = warmup_steps(2.0, 800, 8), 6400
    rates = [LearningRate(5e-4, warmup, total).at(step) for step in range(total)]
    assert warmup == 16 and rates[0] == 0.0
    assert rates[8] == pytest.approx(2.5e-4) and rates[16] == pytest.approx(5e-4)
    assert rates[16 + (total - 16) // 2] == pytest.approx(2.5e-4)
    assert 0 < rates[-1] < 5e-10 * 10
    assert max(rates) == rates[16]


def test_the_warm_up_is_at_most_a_tenth_of_the_run() -> None:
    assert warmup_steps(10.0, 20, 5) == 10
    assert warmup_steps(2.0, 800, 8) == 16


def test_the_cosine_is_close_to_the_papers_code() -> None:
    """Their formula lets the warm-up slip out of a bracket; the largest deviation is 0.003 for w = 2, E =
    800."""
    steps, w, epochs = 8, 2, 800
    warmup, total = w * steps, epochs * steps
    ours = (LearningRate(1.0, warmup, total).at(step) for step in range(warmup, total))
    theirs = (
        0.5 * (1 + math.cos((math.pi * step / steps - w) / (epochs - w))) for step in range(warmup, total)
    )
    deviations = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    assert max(deviations) == pytest.approx(0.003, abs=5e-4)


def test_a_teachers_momentum_goes_from_its_start_to_one_by_a_cosine() -> None:
    assert teacher_momentum(0, start=0.99, total=100) == pytest.approx(0.99)
    assert teacher_momentum(50, start=0.99, total=100) == pytest.approx(0.995)
    assert teacher_momentum(100, start=0.99, total=100) == 1.0


def test_slow_checkpoints_come_more_rarely_than_asked_for() -> None:
    assert [time_is_up(since_s, every_minutes=10.0, last_save_s=1.0) for since_s in (599.0, 601.0)] == [
        False,
        True,
    ]
    assert [
        time_is_up(since_s, every_minutes=10.0, last_save_s=60.0) for since_s in (601.0, 2999.0, 3001.0)
    ] == [False, False, True]
    assert not time_is_up(1e9, every_minutes=0.0, last_save_s=1.0)


def test_a_run_whose_checkpoints_are_always_due_by_the_minute_spends_two_percent_on_them(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    options = {"epochs": 40, "checkpoint__every_minutes": 1e-6}
    [run] = rank_pool(1).run(small_run_path, str(tmp_path / "run"), digit_files, **options)
    saves = [
        line["time/save_s"] for line in read_metrics(Path(run) / "metrics.jsonl") if "time/save_s" in line
    ]
    summary = Run(Path(run)).summary
    assert 0 < len(saves) < 60  # of 120 steps
    assert (
        sum(saves[:-1]) <= SAVING_SHARE * summary["seconds"]
    )  # what comes after the last one may not last fifty times as long
    assert sum(saves) < summary["saving_seconds"] < summary["seconds"]  # with the one at the run's end
    assert (
        f"saving checkpoints took {summary['saving_seconds']:.2f} of {summary['seconds']:.1f} s ("
        in rank_pool(1).output
    )
