"""`vitds eval KIND RUN RUN …`: mean and deviation over seeds, and the paired difference between groups."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.engine.training import small_run_path
from vitds.cli import main
from vitds.errors import UsageError
from vitds.evaluate.bootstrap import interval_of_mean
from vitds.jobs.compare import group_of
from vitds.jobs.evaluate import evaluate


@pytest.fixture(scope="module")
def runs(rank_pool, digit_files, tmp_path_factory) -> list[str]:
    """Two seeds of a short fine-tuning, and two of one that is as good as none."""
    root, names = tmp_path_factory.mktemp("groups"), []
    for group, rate in (("long", 1e-2), ("none", 1e-9)):
        for seed in (0, 1):
            options = {"method": "supervised", "seed": seed, "optimizer__lr_peak": rate, "epochs": 3}
            names.append(str(root / f"{group}-seed{seed}"))
            rank_pool(1).run(small_run_path, names[-1], digit_files, **options)
    return names


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("runs/a-seed0", "runs/a"),
        ("runs/a_seed_12/", "runs/a"),
        ("runs/a/seed3", "runs/a"),
        ("runs/a-s1", "runs/a-s1"),
        ("poolformer_s12", "poolformer_s12"),
        ("runs/a-1", "runs/a-1"),
        ("runs/seeds", "runs/seeds"),
    ],
)
def test_a_group_is_the_name_without_the_seed(name: str, group: str) -> None:
    assert group_of(name) == group


def test_seeds_give_mean_and_deviation_and_groups_a_paired_difference(runs) -> None:
    result = evaluate("top1", *runs)
    top1 = [run["top1"] for run in result["runs"]]
    first, second = result["groups"]
    assert (first["mean"], second["mean"]) == pytest.approx((np.mean(top1[:2]), np.mean(top1[2:])))
    assert first["deviation"] == pytest.approx(abs(top1[0] - top1[1]) / np.sqrt(2))
    assert first["models"] == runs[:2] and first["majority"] == 25

    images = [load_file(Path(run) / "analysis" / "top1-images.safetensors") for run in runs]
    right = np.array([each["label"] == each["predicted"] for each in images], float)
    by_image = right[2:].mean(0) - right[:2].mean(0)
    (difference,) = result["differences"]
    assert difference["difference"] == pytest.approx(100 * by_image.mean())
    assert difference["interval"] == pytest.approx([100 * end for end in interval_of_mean(by_image)])
    assert difference["group"].endswith("none") and difference["minus"].endswith("long")


def test_a_table_with_several_lines_is_compared_line_by_line(runs, capsys) -> None:
    assert main(["eval", "fewshot", *runs]) == 0
    printed = capsys.readouterr().out
    assert main(["eval", "fewshot", *runs, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["line"] for row in result["groups"]] == [f"{shots} a class" for shots in (1, 2, 5, 10)] * 2
    assert len(result["differences"]) == 4 and printed.count("paired over images") == 4
    assert f"{result['groups'][0]['mean']:.2f}" in printed


def test_retrieval_is_compared_by_its_mean_precision(runs) -> None:
    result = evaluate("retrieval", runs[0], runs[2])
    assert [row["figure"] for row in result["groups"]] == ["map", "map"]
    assert result["groups"][0]["mean"] == result["runs"][0]["map"]
    assert result["groups"][0]["deviation"] is None, "one run has none"


def test_runs_on_different_images_have_no_paired_difference(runs, digit_files, tmp_path: Path) -> None:
    other = shutil.copytree(runs[2], tmp_path / "other-seed0")
    settings = other / "settings.yaml"
    settings.write_text(settings.read_text().replace(digit_files[1], digit_files[0]))
    result = evaluate("top1", runs[0], str(other))
    assert result["differences"] == [] and len(result["groups"]) == 2
    assert "evaluated on 2 different sets of images" in result["notes"][-1]


def test_a_run_that_is_given_twice_is_refused(runs) -> None:
    with pytest.raises(UsageError, match="is given 2 times; leave one"):
        evaluate("top1", runs[0], f"{runs[0]}/")
