"""Several evaluations in one table: mean and deviation over seeds, and paired differences between groups."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitds.evaluate.bootstrap import interval_of_mean
from vitds.jobs.eval_kinds import Line

# What runs that differ in their seed alone end in: a-seed0, a_seed_1, a/seed2. A mere s would take a size for
# a seed: poolformer_s12, vit-s16.
SEED = re.compile(r"[-_/.]seed[-_]?\d+$")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one model: all that its JSON says, and its table's lines."""

    score: dict[str, Any]
    lines: tuple[Line, ...]


def group_of(model: str) -> str:
    """The name of a model without the seed at its end: runs/a-seed0 -> runs/a."""
    return SEED.sub("", str(Path(model)))


def compared(kind: str, evaluations: list[Evaluation]) -> dict[str, Any]:
    """All evaluations beside each other.

    Returns: `kind`; `runs`: each one's own JSON; `groups`: for each group and line of its table the models,
        the main figure's mean, deviation over the models (None of one), 95 % interval of the mean by the
        bootstrap over images (None where their images differ) and the largest majority baseline;
        `differences`: of each group to the first one, with the 95 % interval of the paired bootstrap over
        images; `notes`.
    """
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(group_of(evaluation.score["model"]), []).append(evaluation)
    notes = list(dict.fromkeys(note for each in evaluations for note in each.score["notes"]))
    contents = {each.score["data_hash"] for each in evaluations}
    differences = _differences(groups) if len(contents) == 1 else []
    if len(contents) > 1:
        notes.append(
            f"the models were evaluated on {len(contents)} different sets of images, so there is no paired "
            "difference; name one file for all with --data"
        )
    return {
        "kind": kind,
        "runs": [each.score for each in evaluations],
        "groups": [row for name, members in groups.items() for row in _rows(name, members)],
        "differences": differences,
        "notes": notes,
    }


def _rows(group: str, members: list[Evaluation]) -> list[dict[str, Any]]:
    """One row a line of the table; lines that not every member has are left out."""
    rows = []
    for name, lines in _common_lines(members).items():
        figures = [line.numbers[line.main] for line in lines]
        is_same = len({member.score["data_hash"] for member in members}) == 1
        rows.append(
            {
                "group": group,
                "line": name,
                "models": [member.score["model"] for member in members],
                "figure": lines[0].main,
                "mean": float(np.mean(figures)),
                "deviation": float(np.std(figures, ddof=1)) if len(figures) > 1 else None,
                "interval": _interval([line.value_M for line in lines]) if is_same else None,
                **{
                    key: float(np.mean([line.numbers[key] for line in lines]))
                    for key in ("balanced_accuracy", "macro_f1", "majority")
                    if key in lines[0].numbers
                },
            }
        )
    return rows


def _interval(value_RM: list[NDArray[np.float64]]) -> list[float]:
    """Of the mean over runs and images, in percent."""
    return [100 * end for end in interval_of_mean(np.mean(value_RM, 0))]


def _common_lines(members: list[Evaluation]) -> dict[str, list[Line]]:
    """The lines that all members have, by name."""
    by_name = [{line.name: line for line in member.lines} for member in members]
    return {
        name: [lines[name] for lines in by_name] for name in by_name[0] if all(name in x for x in by_name)
    }


def _differences(groups: dict[str, list[Evaluation]]) -> list[dict[str, Any]]:
    """Each group minus the first, image by image: its members' mean against the first's."""
    (first, reference), *others = groups.items()
    found = []
    for name, members in others:
        common = _common_lines([*reference, *members])
        for line, lines in common.items():
            ours, theirs = lines[len(reference) :], lines[: len(reference)]
            difference_M = np.mean([each.value_M for each in ours], 0) - np.mean(
                [each.value_M for each in theirs], 0
            )
            found.append(
                {
                    "group": name,
                    "minus": first,
                    "line": line,
                    "figure": lines[0].main,
                    "difference": 100 * float(difference_M.mean()),
                    "interval": _interval([difference_M]),
                }
            )
    return found
