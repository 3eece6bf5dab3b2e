"""What a training command does before its first step: which files, which run directory, which backbone; what
it refuses.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.training import SMALL, small_run, small_run_path, stopped_run
from vitds.cli import main
from vitds.config.load import backbone_note, load_settings
from vitds.data.beton import open_beton
from vitds.data.build import build_beton
from vitds.errors import DataError, RunError, VitdsError
from vitds.jobs.data_files import open_file, training_files
from vitds.runs.checkpoint import list_checkpoints
from vitds.runs.directory import Run, read_json


def statuses(folder: str, *commands: list[str]) -> list[int]:
    """The exit status of each command, called in a folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return [main(words) for words in commands]
    finally:
        os.chdir(before)


def error_of(run: str, data: tuple[str, str], **options) -> str:
    with pytest.raises(VitdsError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def flat_file(digit_files, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A .beton without labels."""
    folder = tmp_path_factory.mktemp("flat")
    (folder / "images").mkdir()
    for number, image in enumerate(sorted(Path(digit_files[0]).parent.glob("train/*/*.png"))[:24]):
        shutil.copy(image, folder / "images" / f"{number}.png")
    build_beton([folder / "images"], folder / "flat.beton", workers=1)
    return str(folder / "flat.beton")


@pytest.fixture(scope="module")
def partly_labelled(digit_files, flat_file, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The 52 labelled training images, and the 24 without a label."""
    out = tmp_path_factory.mktemp("partly") / "partly.beton"
    source, more = Path(digit_files[0]).parent / "train", Path(flat_file).parent / "images"
    build_beton([source], out, unlabelled=more, workers=1)
    return str(out)


def test_finetuning_takes_the_labelled_images_and_says_so(digit_files, partly_labelled, tmp_path, capsys):
    small_run(str(tmp_path / "fine"), (partly_labelled, digit_files[1]), method="supervised", epochs=1)
    assert " on the 52 labelled of 76 images, " in capsys.readouterr().out


def test_pretraining_takes_all_images(partly_labelled):
    flags = {"data": partly_labelled, "test": partly_labelled}
    settings = load_settings(recipe="idmm_digits", command="pretrain", flags=flags)
    assert [file.images for file in training_files(settings)] == [76, 52]


def test_a_file_with_classes_and_no_label_cannot_be_trained_on(partly_labelled, tmp_path):
    beton = open_beton(partly_labelled)
    settings = load_settings(recipe="finetune_digits", command="finetune", flags={"data": partly_labelled})
    train, _ = training_files(settings)
    assert train.images == 52
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DataError, match=r"none of its 24 images has a label, so nothing can be trained on"),
    ):
        patch.setattr("vitds.jobs.data_files.open_beton", lambda path: beton.take(np.arange(52, 76)))
        training_files(settings)


def moved(data: tuple[str, str], folder: Path) -> tuple[str, str]:
    """The same files in another folder."""
    folder.mkdir()
    for file in data:
        for name in (file, f"{file}.json"):
            shutil.copy(name, folder)
    return str(folder / Path(data[0]).name), str(folder / Path(data[1]).name)


# A refused start


def test_a_refused_start_leaves_no_run_and_uses_no_number(rank_pool, digit_files, tmp_path: Path) -> None:
    commands = [
        ["pretrain", "--recipe", "idmm_digits", "--data", "absent.beton"],
        ["pretrain", "--data", digit_files[0]],
        ["pretrain", "--set", "backbone.name=nothing"],
        ["pretrain", "--set", "batch.micro_images=7"],
        ["finetune", "--init", "absent", "--run", "deep/run"],
        ["finetune", "--init", digit_files[0]],
        ["pretrain", "--run", "no\udce9 text"],
        ["pretrain", "--recipe", "idmm_digits", "--data", "no\udce9 text.beton"],
    ]
    said = rank_pool(1).run(statuses, str(tmp_path), *commands)
    assert said == [[3, 2, 2, 2, 3, 3, 2, 2]], rank_pool(1).output
    assert rank_pool(1).output.count("is no UTF-8 text, which the files of a run cannot hold; rename") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_ranks_that_are_refused_alike_leave_no_run(rank_pool, digit_files, tmp_path: Path) -> None:
    said = rank_pool(2).run(error_of, str(tmp_path / "run"), digit_files, batch__chunk_images=24)
    assert "2 ranks cannot share the 1 chunks" in said[0] and said[0] == said[1]
    assert list(tmp_path.iterdir()) == []


def test_the_digits_are_built_elsewhere_where_nothing_can_be_written_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data").write_text("a file in the folder's place")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    file = open_file("digits", "--data", "train")
    assert file.images == 896 and file.path.is_relative_to(tmp_path / "temporary")


# Recipes and labels


@pytest.mark.parametrize(
    ("command", "default", "fitting"),
    [
        ("pretrain", "idmm_digits", "idmm_deit_tiny"),
        ("finetune", "finetune_digits", "finetune_deit_tiny_224"),
    ],
)
def test_the_digits_recipe_is_for_the_digits_alone(
    rank_pool, digit_files, tmp_path: Path, command: str, default: str, fitting: str
) -> None:
    assert rank_pool(1).run(statuses, str(tmp_path), [command, "--data", digit_files[0]]) == [[2]]
    said = rank_pool(1).output
    assert (
        f"vitds {command}: {digit_files[0]}: --recipe is missing. Without it `vitds {command}` takes "
        f"{default}" in said
    )
    assert f"For photographs take --recipe {fitting}; there are also " in said


def test_labels_that_are_missing_are_said_with_what_then(
    rank_pool, digit_files, flat_file: str, tmp_path: Path
) -> None:
    def said(*data: str, method: str = "idmm") -> str:
        return rank_pool(1).run(error_of, str(tmp_path / "run"), data, method=method)[0]

    for data in ((flat_file, digit_files[1]), (digit_files[0], flat_file), (flat_file, flat_file)):
        text = said(*data)
        assert f"{flat_file} has no labels, so nearest neighbours cannot be counted on {data[1]}" in text
        assert (
            "Leave argument test (data.test) out: training does not need it" in text
            and "classes_from" not in text
        )
    text = said(digit_files[0], flat_file, method="supervised")
    assert f"{flat_file} has no labels, so top-1 cannot be measured on {flat_file}" in text
    text = said(flat_file, digit_files[1], method="supervised")
    assert f"{flat_file} has no labels; training on labels needs two classes or more. Build it" in text


def test_pretraining_needs_no_labels(rank_pool, flat_file: str, tmp_path: Path) -> None:
    words = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    command = [
        "pretrain",
        "--recipe",
        "idmm_digits",
        "--data",
        flat_file,
        "--epochs",
        "1",
        "--run",
        "run",
        *words,
    ]
    assert rank_pool(1).run(statuses, str(tmp_path), command) == [[0]], rank_pool(1).output
    assert "knn" not in Run(tmp_path / "run").summary


# A resume


def test_a_run_goes_on_where_its_data_moved_and_not_with_others(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    run, first = tmp_path / "run", moved(digit_files, tmp_path / "first")
    rank_pool(1).run(stopped_run, str(run), first, after_lines=2, epochs=3)
    second = moved(digit_files, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    said = rank_pool(1).run(error_of, str(run), (second[0], second[0]), epochs=3)[0]
    assert f"data.test was {first[1]!r}, now {second[0]!r} (sha256:" in said and "data.train" not in said
    rank_pool(1).run(small_run_path, str(run), second, epochs=3)
    assert Run(run).is_finished and Run(run).settings.data.train == second[0]
    relative = os.path.relpath(second[0], os.getcwd()), os.path.relpath(second[1], os.getcwd())
    rank_pool(1).run(small_run_path, str(run), relative, epochs=3)
    assert "is finished; nothing to do" in rank_pool(1).output


def test_several_files_are_one_training_set_for_a_run_and_its_resume(
    rank_pool, digit_files, flat_file: str, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", ((digit_files[0], flat_file), None)
    rank_pool(1).run(stopped_run, str(run), data, after_lines=2)
    said = rank_pool(1).run(error_of, str(run), ((flat_file, digit_files[0]), None))[0]
    assert "data.train was" in said, "the instances would have other numbers"
    rank_pool(1).run(small_run_path, str(run), data)
    assert Run(run).settings.data.train == data[0]
    images = open_beton(digit_files[0]).images + open_beton(flat_file).images
    assert read_json(run / "data.json")["images"] == images


def test_weights_to_begin_from_may_move_or_be_gone_once_a_run_was_saved(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    first, second, run = tmp_path / "first", tmp_path / "second", tmp_path / "run"
    rank_pool(1).run(small_run_path, str(first), digit_files, epochs=1)
    options = {"method": "supervised", "epochs": 3, "init": str(first)}
    rank_pool(1).run(stopped_run, str(run), digit_files, after_lines=2, **options)
    first.rename(second)
    rank_pool(1).run(stopped_run, str(run), digit_files, after_lines=5, **options | {"init": str(second)})
    shutil.rmtree(second)
    rank_pool(1).run(small_run_path, str(run), digit_files, **options | {"init": str(second)})
    assert Run(run).is_finished and "weights from" not in rank_pool(1).output
    assert len(list_checkpoints(run / "checkpoints")) == 2


# A caller's own process


def state_of_process() -> dict[str, object]:
    """What a run might leave changed for the code that comes after it."""
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        "hook": sys.excepthook,
        "warnings": (warnings.filters[:], warnings.showwarning),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "stdout": sys.stdout,
        "variables": {name: os.environ.get(name) for name in names},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "threads": torch.get_num_threads(),
        "draws": torch.get_rng_state().tolist(),
        "linear": torch.nn.functional.linear,
        "loggers": [logging.getLogger(name).handlers[:] for name in ("", "torch", "vitds", "DeepSpeed")],
    }


def changed_by_a_run(run: str, data: tuple[str, str]) -> list[str]:
    small_run(f"{run}-first", data, epochs=1)  # imports have their own effects, once
    torch.manual_seed(3)
    before = state_of_process()
    small_run(run, data, epochs=1, stage=3, engine__deterministic="true")
    return [name for name, value in state_of_process().items() if value != before[name]]


def test_a_class_head_of_another_form_is_left_out_and_that_is_said(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    options = {"method": "supervised", "epochs": 1}
    rank_pool(1).run(small_run_path, str(tmp_path / "first"), digit_files, **options)
    for bias, text in (
        ("true", "the same 4 classes"),
        ("false", "left out, as it has a bias and head.bias is"),
    ):
        more = {"init": str(tmp_path / "first"), "head__bias": bias}
        rank_pool(1).run(small_run_path, str(tmp_path / bias), digit_files, **options | more)
        assert f"class head from {tmp_path / 'first'}: {text}" in rank_pool(1).output


def test_a_run_leaves_its_process_as_it_was(rank_pool, digit_files, tmp_path: Path) -> None:
    assert rank_pool(1).run(changed_by_a_run, str(tmp_path / "run"), digit_files) == [[]]


# The backbone of the run to begin from


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """A run directory's settings, of a backbone that no recipe has."""
    run = tmp_path / "pretrained"
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    (run / "settings.yaml").write_text(
        "method: idmm\nviews: {crop_px: 32}\nbackbone: {name: deit3_small_patch16_224, options: {depth: "
        "2}, drop_path: 0.3}\n"
    )
    return str(run)


def loaded(init: str | None, *words: str, **extra):
    return load_settings(
        recipe="finetune_digits", command="finetune", assignments=words, flags={"init": init}, extra=extra
    )


def test_the_backbone_of_the_run_to_begin_from_comes_with_it(pretrained: str) -> None:
    for init in (pretrained, f"{pretrained}/checkpoints/step-00000001"):
        settings = loaded(init)
        assert (settings.backbone.name, settings.backbone.options) == (
            "deit3_small_patch16_224",
            {"depth": 2},
        )
        assert settings.backbone.drop_path == 0.0  # of the stage, and so of the recipe
        note = backbone_note("finetune_digits", "finetune", settings)
        assert note.startswith(
            f"the backbone is that of {init}, deit3_small_patch16_224 with options {{'depth': 2}}, in"
        )
        assert "in place of the recipe's vit_tiny_patch16_224 with options {'patch_size': 4" in note


def test_a_backbone_that_a_person_gives_wins_over_the_one_to_begin_from(pretrained: str) -> None:
    recipe = loaded(None).backbone
    for settings in (
        loaded(pretrained, "backbone.name=deit_tiny_patch16_224"),
        loaded(pretrained, backbone={"name": "deit_tiny_patch16_224"}),
    ):
        assert (settings.backbone.name, settings.backbone.options) == (
            "deit_tiny_patch16_224",
            recipe.options,
        )
        assert backbone_note("finetune_digits", "finetune", settings) is None
    settings = loaded(pretrained, "backbone.options={depth: 3}", "backbone.drop_path=0.2")
    assert (settings.backbone.name, settings.backbone.options) == ("deit3_small_patch16_224", {"depth": 3})


def test_a_file_of_weights_or_an_equal_backbone_changes_nothing(pretrained: str, tmp_path: Path) -> None:
    assert loaded(str(tmp_path / "weights.pth")).backbone == loaded(None).backbone
    text = loaded(None).backbone.options
    Path(pretrained, "settings.yaml").write_text(
        f"method: idmm\nbackbone: {{name: vit_tiny_patch16_224, options: {text}}}\n".replace("'", "")
    )
    assert backbone_note("finetune_digits", "finetune", loaded(pretrained)) is None


def test_a_resume_knows_the_backbone_of_weights_that_are_gone(pretrained: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(Path(pretrained, "settings.yaml"), run)
    (run / "settings.yaml").write_text((run / "settings.yaml").read_text() + f"init: {pretrained}\n")
    shutil.rmtree(pretrained)
    settings = load_settings(
        recipe="finetune_digits", command="finetune", flags={"init": pretrained}, run=str(run)
    )
    assert settings.backbone.name == "deit3_small_patch16_224"


def test_paths_below_home_are_read_with_their_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("method: idmm\ndata: {train: ~/a.beton}\n")
    settings = load_settings(
        recipe="~/r.yaml", command="pretrain", assignments=["data.test=~/b.beton"], flags={"init": "~/run"}
    )
    assert (settings.data.train, settings.data.test) == (f"{tmp_path}/a.beton", f"{tmp_path}/b.beton")
    assert settings.init == f"{tmp_path}/run"


def test_a_run_below_home_is_named_with_its_sign(rank_pool, digit_files, tmp_path: Path) -> None:
    rank_pool(1).run(small_run_below_home, str(tmp_path), digit_files)
    assert (tmp_path / "run/summary.json").exists() and not Path("~").exists()


def small_run_below_home(home: str, data: tuple[str, str]) -> None:
    before = os.environ.get("HOME")
    os.environ["HOME"] = home
    try:
        small_run("~/run", data, epochs=1)
        with pytest.raises(RunError, match="was started with other settings: epochs was 1, now 2"):
            small_run("~/run", data, epochs=2)
    finally:
        os.environ["HOME"] = before or "/"
