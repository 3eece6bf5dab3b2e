"""metrics.jsonl as charts: thinned, each metric by itself, gaps left as gaps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vitds.report.curves import MOST_POINTS, charts
from vitds.report.lines import Line, chart, number
from vitds.runs.directory import Run


def run_of(folder: Path, lines: list[dict[str, Any]]) -> Run:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run(folder)


def line(step: int, **more: float | None) -> dict[str, Any]:
    return {"step": step, "epoch": step // 10, "loss": float(step), "lr": 0.1} | more


def drawn(svg: str) -> list[tuple[float, float]]:
    """The corners of the first line."""
    path = re.search(r'class="line l0" d="([^"]*)"', svg)[1]
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]


def titles(run: Run) -> dict[str, list[str]]:
    return {group: [each.title for each in found] for group, found in charts([run], ["a"]).items()}


def test_a_long_run_is_thinned_and_keeps_its_course(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [line(step) for step in range(5000)])
    found = charts([run], ["a"])["Losses and rate"][0]
    points = drawn(found.svg)
    assert found.title == "Loss" and len(points) == MOST_POINTS
    heights = [y for _, y in points]
    assert heights == sorted(heights, reverse=True)  # up is less in SVG, and the loss grows here
    assert float(found.rows[0][1]) < 20 and float(found.rows[-1][1].replace(",", "")) > 4980


def test_epochs_are_counted_from_the_steps_of_the_first_one(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [line(step) for step in range(20)])
    assert charts([run], ["a"])["Losses and rate"][0].rows[-1][0] == "2"


def test_every_metric_has_a_chart_and_one_term_alone_is_the_loss(tmp_path: Path) -> None:
    probes = {"probe/knn10_top1": 50.0, "probe/knn200_top1": 40.0, "probe/rankme": 3.0}
    times = {"time/images_per_s": 9.0, "time/data_s": 0.1}
    one = run_of(tmp_path / "one", [line(0, **{"loss/train": 1.0}, **probes, **times)])
    assert titles(one) == {
        "Losses and rate": ["Loss", "Learning rate"],
        "Accuracy along training": ["kNN, k = 10 (%)", "kNN, k = 200 (%)"],
        "Features": ["RankMe"],
        "Speed": ["Images a second", "Waiting for data (s)"],
    }
    two = run_of(tmp_path / "two", [line(0, **{"loss/global": 1.0, "loss/local": 1.0})])
    assert "Loss term: local" in titles(two)["Losses and rate"]


def test_a_probe_keeps_each_of_its_points_whatever_lies_between(tmp_path: Path) -> None:
    lines = [
        line(step, **({"probe/rankme": float(step)} if step % 100 == 99 else {})) for step in range(1000)
    ]
    run = run_of(tmp_path / "run", lines)
    assert len(drawn(charts([run], ["a"])["Features"][0].svg)) == 10


def test_a_step_without_a_finite_number_is_a_gap(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [line(step, loss=None if step == 3 else 1.0) for step in range(8)])
    svg = str(charts([run], ["a"])["Losses and rate"][0].svg)
    path = re.search(r'class="line l0" d="([^"]*)"', svg)[1]
    assert path.count("M") == 2 and path.count("L") == 5


def test_a_run_without_metrics_has_no_charts(tmp_path: Path) -> None:
    assert charts([run_of(tmp_path / "run", [])], ["a"]) == {}


def test_a_chart_says_its_line_in_words_and_escapes_its_name() -> None:
    svg = str(
        chart("Loss", "epochs", [Line("<a>", [1.0, 2.0, 3.0], [4.0, None, 2.0]), Line("b", [1.0], [3.0])])
    )
    assert 'aria-label="Loss: &lt;a&gt;: 4 to 2, lowest 2, highest 4; b: 3 to 3, lowest 3, highest 3"' in svg


def test_all_that_is_drawn_lies_within_the_picture() -> None:
    for values in ([0.0], [5.0, 5.0], [-1e-9, 1e-9], [1e12, -1e12], [0.31, 0.32, 0.33]):
        x = [float(place) for place in range(len(values))]
        points = drawn(str(chart("a", "b", [Line("a", x, values)])))
        assert len(points) == len(values)
        assert all(54 <= x <= 348 and 10 <= y <= 170 for x, y in points)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234567.0, "1,234,567"), (0.5, "0.5"), (1e-5, "1e-5"), (12.3456, "12.35")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
