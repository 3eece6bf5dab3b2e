"""The curve of a run, whatever its metrics hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitds.report.curve import draw_curve
from vitds.runs.directory import Run


def drawn(folder: Path, lines: list[dict[str, Any]]) -> np.ndarray:
    """The picture of a run with these lines, (H, W, 3) uint8."""
    run = Run(folder)
    folder.mkdir(exist_ok=True)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(run)
    return np.asarray(Image.open(folder / "curve.png").convert("RGB"))


def line(step: int, **more: float | None) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 - step / 10, "lr": 0.1} | more


def test_one_term_has_one_panel_and_several_have_one_beside_their_sum(tmp_path: Path) -> None:
    one = drawn(tmp_path / "one", [line(step, **{"loss/train": 2.0}) for step in range(5)])
    two = drawn(tmp_path / "two", [line(step, **{"loss/a": 1.0, "loss/b": 1.0}) for step in range(5)])
    assert two.shape[0] > 1.5 * one.shape[0] and two.shape[1] == one.shape[1]


def test_steps_without_a_finite_number_leave_a_gap(tmp_path: Path) -> None:
    lines = [line(step) for step in range(9)]
    whole = drawn(tmp_path / "whole", lines)
    gap = drawn(tmp_path / "gap", [*lines[:4], line(4, loss=None), line(5, lr=None), *lines[6:]])
    assert gap.shape == whole.shape and (gap != whole).any()
    drawn(tmp_path / "none", [line(step, loss=None, lr=None) for step in range(3)])


def test_a_run_without_steps_has_no_curve(tmp_path: Path) -> None:
    draw_curve(Run(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_curve_that_cannot_be_written_fails_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "curve.png").mkdir()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(0)) + "\n")
    draw_curve(Run(tmp_path))
    assert "curve.png was not drawn" in capsys.readouterr().out
