"""eval.hold_out: a part of the training images is measured along fine-tuning and not trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engine.training import outcome, rewound, small_run, small_run_path
from vitds.config.load import load_settings
from vitds.data.beton import open_beton
from vitds.data.manifest import Grouped
from vitds.errors import DataError, VitdsError
from vitds.jobs.data_files import hold_out, split_groups_note
from vitds.runs.backbone import read_weights
from vitds.runs.checkpoint import list_checkpoints
from vitds.runs.directory import read_json
from vitds.runs.metrics import read_metrics

CHOSEN = {
    "method": "supervised",
    "eval__every_epochs": 1,
    "eval__hold_out": 0.25,
    "eval__choose": "best",
    "checkpoint__every_steps": 1,
    "checkpoint__keep": 10,
    "epochs": 5,
    "optimizer__lr_peak": 0.1,
    "seed": 0,
}
HELD_OUT = {"method": "supervised", "eval__every_epochs": 1, "eval__hold_out": 0.25}


@pytest.fixture(scope="module")
def held_out_run(rank_pool, digit_files, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("held out") / "run"
    options = {"checkpoint__every_steps": 1, "checkpoint__keep": 9, "epochs": 3} | HELD_OUT
    rank_pool(1).run(small_run_path, str(run), digit_files, **options)
    return run


def test_a_part_of_each_class_is_held_out_and_the_rest_is_left(digit_files) -> None:
    whole = open_beton(digit_files[0])
    train, held_out = hold_out(whole, 0.25, seed=3)
    assert np.bincount(held_out.labels).tolist() == [3] * 4  # of 13
    assert sorted([*train.index, *held_out.index]) == list(range(52))
    assert hold_out(whole, 0.25, seed=3)[1].index.tolist() == held_out.index.tolist()
    assert hold_out(whole, 0.25, seed=4)[1].index.tolist() != held_out.index.tolist()


def test_the_rest_trains_and_the_accuracy_of_the_part_is_in_every_epochs_line(
    held_out_run: Path, rank_pool
) -> None:
    lines = read_metrics(held_out_run / "metrics.jsonl")
    assert len(lines) == 6  # 40 images in steps of 24
    probed = [line for line in lines if "probe/top1" in line]
    assert [line["step"] for line in probed] == [1, 3, 5]
    twelfths = [line["probe/top1"] * 12 / 100 for line in probed]
    assert twelfths == [pytest.approx(round(each)) for each in twelfths]
    assert all(line["probe/balanced_accuracy"] == pytest.approx(line["probe/top1"]) for line in probed)
    assert read_json(held_out_run / "analysis" / "top1.json")["images"] == 20, (
        "the result is of the test file"
    )


def test_a_run_with_images_held_out_goes_on_to_the_same_bytes(
    held_out_run: Path, rank_pool, digit_files, tmp_path: Path
) -> None:
    assert len(list_checkpoints(held_out_run / "checkpoints")) == 6
    copy = rewound(held_out_run, tmp_path / "copy", 3)
    options = {"checkpoint__every_steps": 1, "checkpoint__keep": 9, "epochs": 3} | HELD_OUT
    rank_pool(1).run(small_run_path, str(copy), digit_files, **options)
    assert outcome(copy) == outcome(held_out_run)


@pytest.fixture(scope="module")
def chosen_run(rank_pool, digit_files, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("chosen") / "run"
    rank_pool(1).run(small_run_path, str(run), digit_files, **CHOSEN)
    return run


def test_the_best_epochs_weights_are_the_result_where_that_is_asked_for(chosen_run: Path) -> None:
    probed = [line for line in read_metrics(chosen_run / "metrics.jsonl") if "probe/top1" in line]
    top1 = [line["probe/top1"] for line in probed]
    best = top1.index(max(top1))
    assert best < len(top1) - 1, "this run's last epoch is not its best, or the test shows nothing"
    assert read_json(chosen_run / "summary.json")["chosen"] == {"epoch": best + 1, "top1": max(top1)}
    checkpoint = chosen_run / "checkpoints" / f"step-{probed[best]['step'] + 1:08d}"
    of_epoch, result = read_weights(checkpoint), load_file(chosen_run / "backbone.safetensors")
    assert all(torch.equal(of_epoch[f"backbone.{name}"], weight) for name, weight in result.items())


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_run_that_goes_on_chooses_the_same_epoch(
    chosen_run: Path, rank_pool, digit_files, tmp_path: Path, is_gone: bool
) -> None:
    copy = rewound(chosen_run, tmp_path / "copy", 1)
    if is_gone:
        (copy / "best.safetensors").unlink()
    rank_pool(1).run(small_run_path, str(copy), digit_files, **CHOSEN)
    assert outcome(copy) == outcome(chosen_run)
    assert read_json(copy / "summary.json")["chosen"] == read_json(chosen_run / "summary.json")["chosen"]


def test_which_epochs_are_measured_may_not_change_where_one_is_chosen(
    chosen_run: Path, rank_pool, digit_files, tmp_path: Path
) -> None:
    copy = rewound(chosen_run, tmp_path / "copy", 3)
    said = rank_pool(1).run(refusal, str(copy), digit_files, **CHOSEN | {"eval__every_epochs": 2})[0]
    assert "eval.every_epochs was 1, now 2" in said


def test_the_flag_hold_out_measures_every_epoch_and_keeps_the_best() -> None:
    chosen = load_settings(recipe="finetune_digits", command="finetune", flags={"hold_out": 0.1}).eval
    assert (chosen.hold_out, chosen.every_epochs, chosen.choose) == (0.1, 1, "best")


def test_another_share_is_another_run(held_out_run: Path, rank_pool, digit_files, tmp_path: Path) -> None:
    copy = rewound(held_out_run, tmp_path / "copy", 3)
    said = rank_pool(1).run(refusal, str(copy), digit_files, **HELD_OUT | {"eval__hold_out": 0.5}, epochs=3)[
        0
    ]
    assert "eval.hold_out was 0.25, now 0.5" in said


def test_accuracy_on_the_test_file_ends_as_the_result(rank_pool, digit_files, tmp_path: Path) -> None:
    run, options = tmp_path / "run", {"method": "supervised", "eval__every_epochs": 1}
    rank_pool(1).run(small_run_path, str(run), digit_files, **options)
    summary, last = read_json(run / "summary.json"), read_metrics(run / "metrics.jsonl")[-1]
    for key in ("top1", "balanced_accuracy", "macro_f1"):
        assert last[f"probe/{key}"] == pytest.approx(summary[key])


def refusal(run: str, data: tuple[str, str | None], **options: object) -> str:
    """What a small run says that is refused."""
    try:
        small_run(run, data, **options)
    except VitdsError as error:
        return str(error)
    return "it ran"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"eval__hold_out": 0.2}, "method idmm trains no class head"),
        ({"head__class_weight": "balanced"}, "method idmm trains no class head"),
        (
            {"method": "supervised", "eval__hold_out": 0.2, "eval__every_epochs": 0},
            "every_epochs is 0, never",
        ),
        ({"method": "supervised", "eval__choose": "best"}, "choose best needs images to choose by"),
        (
            {"method": "supervised", "eval__hold_out": 0.2, "eval__choose": "best", "eval__every_epochs": 9},
            "none is measured with eval.every_epochs 9",
        ),
        ({"eval__knn_k": "[]"}, "eval.knn_k"),
    ],
)
def test_what_would_do_nothing_is_refused(digit_files, tmp_path: Path, options: dict, text: str) -> None:
    options = {"eval__every_epochs": 1} | options
    assert text in refusal(str(tmp_path / "run"), digit_files, **options)
    assert not (tmp_path / "run").exists()


def test_accuracy_along_training_needs_images(digit_files, tmp_path: Path) -> None:
    said = refusal(str(tmp_path / "run"), (digit_files[0], None), method="supervised", eval__every_epochs=1)
    assert "eval.every_epochs 1: no images to measure accuracy on. Give --test FILE.beton" in said.replace(
        "argument test", "--test"
    )


def test_holding_out_of_a_file_of_whole_groups_is_said_to_split_them(digit_files) -> None:
    file = open_beton(digit_files[0])
    assert split_groups_note(file) is None
    grouped = replace(file, manifest=replace(file.manifest, grouped=Grouped(by="patient", groups=9)))
    said = split_groups_note(grouped)
    assert "kept groups whole (by patient), and images are held out one by one" in said


def test_a_class_of_one_image_is_not_held_out(digit_files) -> None:
    single = open_beton(digit_files[0]).take(np.array([0, 20, 40]))
    with pytest.raises(DataError, match="no class has two images or more, so none can be held out"):
        hold_out(single, 0.5, seed=0)
