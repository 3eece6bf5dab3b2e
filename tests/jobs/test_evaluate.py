"""`vitds eval`: the numbers of a finished run again, from the run, a checkpoint, or on other data; and what
it refuses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.training import small_run
from vitds.cli import main
from vitds.data.build import build_beton
from vitds.errors import UsageError
from vitds.jobs.evaluate import evaluate
from vitds.runs.directory import read_json


def trained(run: str, data: tuple[str, str], method: str) -> str:
    return str(small_run(run, data, method=method, epochs=2).path)


@pytest.fixture(scope="module")
def runs(rank_pool, digit_files, tmp_path_factory) -> tuple[str, str]:
    """A pretrained and a fine-tuned run."""
    folder = tmp_path_factory.mktemp("runs")
    return tuple(
        rank_pool(1).run(trained, str(folder / method), digit_files, method)[0]
        for method in ("idmm", "supervised")
    )


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that fails."""
    assert main(list(words)) != 0
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


def test_knn_of_a_run_is_what_its_pretraining_wrote(runs, capsys) -> None:
    assert main(["eval", "knn", runs[0], "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["knn"] == read_json(Path(runs[0]) / "summary.json")["knn"] and score["images"] == 20


def test_top1_of_a_run_is_what_its_fine_tuning_wrote(runs) -> None:
    summary, score = read_json(Path(runs[1]) / "summary.json"), evaluate("top1", runs[1])
    assert (score["top1"], score["top5"]) == (summary["top1"], summary["top5"])


def test_a_checkpoint_of_the_last_step_evaluates_as_its_run(runs) -> None:
    newest = max((Path(runs[0]) / "checkpoints").glob("*/manifest.json")).parent
    assert evaluate("knn", str(newest))["knn"] == evaluate("knn", runs[0])["knn"]


def test_a_checkpoint_is_evaluated_with_the_class_head_of_its_own_step(
    runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = max((Path(runs[1]) / "checkpoints").glob("*/manifest.json")).parent
    score = evaluate("top1", runs[1])
    monkeypatch.chdir(newest.parent)
    assert evaluate("top1", newest.name)["top1"] == score["top1"]
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    for name in ("head.safetensors", "backbone.safetensors", "summary.json"):  # as a run that was stopped
        (run / name).unlink()
    assert evaluate("top1", str(run / "checkpoints" / newest.name))["top1"] == score["top1"]


def test_linear_prints_the_accuracy_that_it_returns(runs, capsys) -> None:
    assert main(["eval", "linear", runs[0]]) == 0
    printed = capsys.readouterr().out
    score = evaluate("linear", runs[0])
    assert "top-1 %" in printed and f"{score['top1']:.2f}" in printed and score["regularisation"] > 0


def test_other_images_are_asked_for_by_data(runs, digit_files) -> None:
    score = evaluate("knn", runs[0], data=digit_files[0])
    assert score["images"] == 52 and score["data"] == digit_files[0]


@pytest.fixture
def moved(runs, digit_files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to call from, with a fine-tuned and a pretrained run whose files are not where they say."""
    for name, run in zip(("pre", "fine"), runs, strict=True):
        shutil.copytree(run, tmp_path / name)
        settings = tmp_path / name / "settings.yaml"
        settings.write_text(
            settings.read_text()
            .replace(digit_files[0], "gone/train.beton")
            .replace(digit_files[1], "gone/test.beton")
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_top1_needs_only_the_run_and_the_images(moved: Path, runs, digit_files) -> None:
    score, before = evaluate("top1", "fine", data=digit_files[1]), evaluate("top1", runs[1])
    assert (score["top1"], score["top5"]) == (before["top1"], before["top5"])


def test_a_file_that_a_run_names_and_that_moved_is_asked_for(moved: Path, digit_files, capsys) -> None:
    for words, flag, file in (
        (["eval", "top1", "fine"], "--data", "gone/test.beton"),
        (["eval", "knn", "pre"], "--data", "gone/test.beton"),
        (["eval", "knn", "pre", "--data", digit_files[1]], "--bank", "gone/train.beton"),
        (["eval", "linear", "pre", "--data", digit_files[1]], "--bank", "gone/train.beton"),
    ):
        said = refusal(capsys, *words)
        assert (
            f"{file}, which the run names, is not there, seen from {moved}, the folder you call from" in said
        )
        assert f"Say where it is now with {flag} FILE.beton" in said


def test_top1_on_other_classes_is_refused(moved: Path, digit_files, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.beton"
    images = tmp_path / "images"
    for name in ("digit 0", "digit 7"):
        shutil.copytree(Path(digit_files[0]).parent / "test" / "digit 0", images / name)
    build_beton([images], other, workers=1)
    said = refusal(capsys, "eval", "top1", "fine", "--data", str(other))
    assert (
        f"{other}: its 2 classes are not the 4 of fine: class 1 is 'digit 7' there, 'digit 1' in the run"
        in said
    )


def test_an_argument_that_does_nothing_is_refused(runs) -> None:
    with pytest.raises(UsageError, match="`bank` does nothing for top1"):
        evaluate("top1", runs[1], bank="x.beton")


def test_an_unknown_evaluation_is_refused(runs) -> None:
    with pytest.raises(
        Exception, match="eval topp1: there is no such evaluation; take one of top1, knn, linear"
    ):
        evaluate("topp1", runs[0])


def test_top1_needs_a_class_head(runs, capsys) -> None:
    text = refusal(capsys, "eval", "top1", runs[0])
    assert f"{runs[0]} has no class head; top1 is for fine-tuned runs. Take knn or linear." in text


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys) -> None:
    assert f"{tmp_path} is no run directory: it has no settings.yaml" in refusal(
        capsys, "eval", "knn", str(tmp_path)
    )


def test_a_run_that_does_not_exist_is_named(capsys) -> None:
    text = refusal(capsys, "eval", "knn", "runs/absent-1")
    assert (
        "runs/absent-1 does not exist; name a run directory, one of its checkpoints, or a timm model" in text
    )


def test_an_unknown_model_gets_its_near_names(capsys) -> None:
    text = refusal(capsys, "eval", "knn", "vit_tinny_patch16_224")
    assert "'vit_tinny_patch16_224' is no timm model; near names: vit_tiny_patch16_224" in text


def test_published_weights_that_cannot_be_fetched_are_named(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "the published weights of vit_tiny_patch16_224 cannot be had: " in refusal(
        capsys, "eval", "knn", "vit_tiny_patch16_224"
    )


def test_images_without_labels_cannot_be_evaluated_or_fine_tuned_on(
    runs, digit_files, tmp_path: Path, capsys
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted(Path(digit_files[0]).parent.glob("train/*/*.png"))[:8]):
        shutil.copy(image, flat / f"{number}.png")
    unlabelled = str(tmp_path / "flat.beton")
    build_beton([flat], Path(unlabelled), workers=1)
    assert f"{unlabelled} has no labels" in refusal(
        capsys, "eval", "knn", runs[0], "--data", unlabelled, "--bank", unlabelled
    )
    text = refusal(
        capsys,
        "finetune",
        "--recipe",
        "finetune_digits",
        "--data",
        unlabelled,
        "--run",
        str(tmp_path / "run"),
        "--set",
        "engine.precision=fp32",
    )
    assert f"{unlabelled} has no labels; training on labels needs two classes or more" in text


def test_a_run_without_test_file_needs_data(runs, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    settings = run / "settings.yaml"
    settings.write_text(
        "\n".join(
            "  test: null" if line.startswith("  test:") else line
            for line in settings.read_text().splitlines()
        )
    )
    assert "no images to evaluate: give --data FILE.beton, for the run names none" in refusal(
        capsys, "eval", "knn", str(run)
    )


def test_a_recipe_without_data_asks_for_it(tmp_path: Path, capsys) -> None:
    text = refusal(
        capsys,
        "pretrain",
        "--recipe",
        "idmm_deit_tiny",
        "--run",
        str(tmp_path / "run"),
        "--set",
        "engine.precision=fp32",
    )
    assert "data.train is not set: give --data FILE.beton" in text
