"""`vitds fit`: what is trained in so many minutes, and that a folder of pictures becomes a model in use."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.data.test_catalogue import make_cifar10
from vitds.cli import main
from vitds.config.flags import FitFlags
from vitds.data.beton import BetonFile, open_beton
from vitds.data.catalogue import CATALOGUE
from vitds.errors import RunError, UsageError, VitdsError
from vitds.jobs.chain import Stage
from vitds.jobs.evaluate import evaluate
from vitds.jobs.fit import _Record, _run, _train, fit
from vitds.jobs.fit_plan import (
    LARGE_PX,
    MANY_EPOCHS,
    Choice,
    Speed,
    choose,
    fill,
    with_larger_crops,
)

FAST, SLOW = Speed(epoch_s=1.0, around_s=20.0), Speed(epoch_s=30.0, around_s=20.0)


def of_size(file: BetonFile, side_px: int, classes: tuple[str, ...]) -> BetonFile:
    """The file, as if its images were of another size."""
    sides = np.full(file.images, side_px, np.int32)
    return replace(file, heights=sides, widths=2 * sides, manifest=replace(file.manifest, classes=classes))


@pytest.fixture
def file(digit_files: tuple[str, str]) -> BetonFile:
    return open_beton(digit_files[0])


@pytest.mark.parametrize(
    ("classes", "on_gpu", "stages"),
    [
        (("a", "b"), False, ["finetune"]),
        (("a", "b"), True, ["pretrain", "finetune"]),
        (("a",), False, ["pretrain"]),
        ((), False, ["pretrain"]),
        ((), True, ["pretrain"]),
    ],
)
def test_labels_and_machine_decide_what_is_trained(
    file: BetonFile, classes: tuple[str, ...], on_gpu: bool, stages: list[str]
) -> None:
    choice = choose(of_size(file, 200, classes), on_gpu=on_gpu)
    assert list(choice.stages) == stages
    assert sum(share for _, share in choice.stages.values()) == 1 and choice.settings == ()


def test_images_that_the_plan_leaves_out_are_said(file: BetonFile) -> None:
    some = replace(file, manifest=replace(file.manifest, unlabelled=1200))
    assert "the 1,200 images without a label are left out" in choose(some, on_gpu=False).reason
    assert "left out" not in choose(some, on_gpu=True).reason


@pytest.mark.parametrize(
    ("side_px", "on_gpu", "crop_px"),
    [(8, False, 32), (33, False, 32), (47, False, 40), (48, False, 48), (47, True, 32), (48, True, 48)],
)
def test_small_pictures_are_seen_whole(file: BetonFile, side_px: int, on_gpu: bool, crop_px: int) -> None:
    assert choose(of_size(file, side_px, ("a", "b")), on_gpu=on_gpu).settings == (f"views.crop_px={crop_px}",)


def test_one_small_picture_does_not_set_the_crop_of_all(file: BetonFile) -> None:
    photographs = of_size(file, 200, ("a", "b"))
    one_small = np.where(np.arange(file.images) == 3, 40, photographs.heights).astype(np.int32)
    assert choose(replace(photographs, heights=one_small), on_gpu=False).settings == ()


@pytest.mark.parametrize(
    ("side_px", "on_gpu", "classes", "epochs", "settings"),
    [
        (128, False, ("a", "b"), MANY_EPOCHS, (f"views.crop_px={LARGE_PX}",)),
        (128, False, ("a", "b"), MANY_EPOCHS - 1, ()),
        (LARGE_PX - 1, False, ("a", "b"), MANY_EPOCHS, ()),
        (40, False, ("a", "b"), MANY_EPOCHS, ("views.crop_px=40",)),
        (128, False, (), MANY_EPOCHS, ()),
        (128, True, ("a", "b"), MANY_EPOCHS, ()),
    ],
)
def test_crops_are_larger_where_there_is_time_and_the_images_have_the_pixels(
    file: BetonFile,
    side_px: int,
    on_gpu: bool,
    classes: tuple[str, ...],
    epochs: int,
    settings: tuple[str, ...],
) -> None:
    images = of_size(file, side_px, classes)
    assert with_larger_crops(choose(images, on_gpu=on_gpu), images, epochs).settings == settings


def test_a_fit_goes_on_at_the_side_that_it_began_with(
    file: BetonFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sides(minutes: float) -> list[str]:
        _train(record, choose(images, on_gpu=False), images, None, FitFlags(minutes=minutes))
        return [stage["words"][-1] for stage in record.stages]

    images = of_size(file, 128, ("a", "b"))
    measured: list[tuple[str, ...]] = []
    monkeypatch.setattr("vitds.jobs.fit._run", lambda *_: None)
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *words: measured.append(words[2]) or FAST)
    record = _Record(tmp_path / "out", ["photos"], FitFlags(minutes=10.0))
    assert sides(10.0) == ["views.crop_px=96"] and measured == [(), ("views.crop_px=96",)]
    assert "crops of 96 px are worth more" in capsys.readouterr().out
    assert sides(11.0) == ["views.crop_px=96"] * 2, "though a minute has no time for 100 epochs"


def test_epochs_fill_the_time_that_is_left() -> None:
    assert fill({"finetune": 1.0}, {"finetune": FAST}, 120.0) == {"finetune": 97}
    both = fill({"pretrain": 0.5, "finetune": 0.5}, {"pretrain": SLOW, "finetune": FAST}, 240.0)
    assert both == {"pretrain": 3, "finetune": 97}


def test_too_few_minutes_are_refused_with_what_is_needed() -> None:
    with pytest.raises(
        UsageError, match=r"0\.5 of them are left.* takes 0\.8 here\. Give at least 0\.4 more"
    ):
        fill({"finetune": 1.0}, {"finetune": SLOW}, 30.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scanned digits as a person's folder: two classes of 24 pictures."""
    folder = tmp_path_factory.mktemp("my photos")
    digits = load_digits()
    for label, name in ((0, "zero"), (1, "one")):
        (folder / name).mkdir()
        for number, image in enumerate(digits.images[digits.target == label][:24]):
            Image.fromarray((image * 15.9).astype(np.uint8)).resize((40, 40)).save(
                folder / name / f"{number}.png"
            )
    return folder


def test_a_plan_trains_nothing_and_says_what_it_would(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(photos), "--minutes", "30", "--plan", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "finetune: finetune_photos_cpu, " in said and "nothing was trained" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data", "fit.json"}


def page_fails(*_: object, **__: object) -> None:
    raise ValueError("of a library that draws")


def test_a_folder_becomes_a_model_in_use_and_more_minutes_train_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: Speed(epoch_s=20.0, around_s=0.0))  # any machine
    out = tmp_path / "out"
    result = fit(photos, minutes=1.5, out=out)
    # Of so few steps any may come out; it has to be what the run gives on the test images.
    assert result.accuracy == evaluate("top1", str(result.run.path))["top1"]
    assert [each.classes[0] in ("zero", "one") for each in result.predict([photos / "zero"])] == [True] * 24
    assert result.embed([photos / "one" / "3.png"]).shape == (1, 256)
    assert result.report.exists()
    with pytest.raises(RunError, match="was begun with other words: seed was None, now 3"):
        fit(photos, minutes=1.5, out=out, seed=3)
    assert fit(photos, minutes=1.5, out=out).runs.keys() == {"finetune"}  # nothing is left to do
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="of a library that draws"):
        patch.setattr("vitds.jobs.fit.report", page_fails)
        fit(photos, minutes=1.5, out=out)
    assert "classify:   vitds predict" in capsys.readouterr().out.rpartition("as they were at")[2]
    with pytest.raises(UsageError, match=r"0\.2 of them are left"):
        fit(photos, minutes=1.7, out=out)
    fit(photos, minutes=3.5, out=out, plan=True)  # neither a refusal nor a plan uses up what it asks for
    longer = fit(photos, minutes=3.5, out=out)
    assert list(longer.runs) == ["finetune", "finetune-2"] and longer.run.path.name == "finetune-2"
    assert longer.run.settings.init == str(out / "finetune")
    assert 3 <= longer.run.settings.epochs <= 10


def test_a_fit_that_was_stopped_while_it_built_goes_on_or_takes_other_words(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_images: object, path: Path, *_: object, **__: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: Speed(epoch_s=20.0, around_s=0.0))
    for other in ({}, {"seed": 3}):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("vitds.jobs.fit.build_set", stopped)
            fit(photos, minutes=3.0, out=tmp_path, **other)
    fit(photos, minutes=3.0, out=tmp_path, plan=True)
    assert (tmp_path / "data" / "photos-train.beton").exists()
    with pytest.raises(RunError, match="begun with other words: seed was None, now 3"):
        fit(photos, minutes=3.0, out=tmp_path, seed=3)


def test_a_comparison_is_added_to_a_fit_whatever_was_done_before(
    file: BetonFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(_record: _Record, stage: dict[str, str]) -> None:
        done.append(stage["name"])

    done: list[str] = []
    choice = Choice("idmm_deit_tiny", "finetune_deit_tiny_224", 0.5, (), "")
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: FAST)
    monkeypatch.setattr("vitds.jobs.fit._run", trained)
    record = _Record(tmp_path / "out", ["photos"], FitFlags(minutes=4.0))
    _train(record, choice, file, None, FitFlags(minutes=4.0))
    _train(record, choice, file, None, FitFlags(minutes=4.0, compare=True))
    _train(record, choice, file, None, FitFlags(minutes=4.0, compare=True))
    _train(record, choice, file, None, FitFlags(minutes=6.0, compare=True))
    names = [stage["name"] for stage in record.stages]
    assert names == ["pretrain", "finetune", "scratch", "finetune"]
    expected = [stage["expected_s"] for stage in record.stages]
    assert expected[2] == pytest.approx(sum(expected[:2]), abs=1)
    assert "--init" not in record.stages[2]["words"]
    assert record.stages[3]["words"][-2:] == ["--init", record.stages[1]["run"]]


def test_one_class_alone_is_pretrained_on_and_one_image_a_class_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: FAST)
    shutil.copytree(photos / "one", tmp_path / "one class" / "one")
    fit(tmp_path / "one class", minutes=3.0, out=tmp_path / "one", plan=True)
    said = capsys.readouterr().out
    assert "one class alone: pretraining alone" in said and "pretrain: diet_photos_cpu, " in said
    for name in ("one", "zero"):
        (tmp_path / "single" / name).mkdir(parents=True)
        shutil.copy(photos / name / "3.png", tmp_path / "single" / name)
    assert main(["fit", str(tmp_path / "single"), "--minutes", "3", "--out", str(tmp_path / "two")]) != 0
    said = capsys.readouterr().err
    assert "no class has two images" in said and "train without labels (--no_labels)" in said
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("name", ["runs/p", "."])
def test_a_fit_goes_on_when_its_folder_has_moved_or_is_named_from_another_one(
    file: BetonFile, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitds.jobs.fit._run", lambda *_: None)
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: FAST)
    (tmp_path / "home/runs/p").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / ("runs/p" if name == "." else ""))
    out, flags = Path(name), FitFlags(minutes=3.0)
    record = _Record(out, ["digits"], flags)
    inside = replace(file, path=out / "data/photos-train.beton")
    _train(record, choose(file, on_gpu=True), inside, inside, flags)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home/runs/p").rename(tmp_path / "moved")
    first, second = _Record(Path("moved"), ["digits"], flags).stages
    assert (first["run"], second["run"]) == ("moved/pretrain", "moved/finetune")
    assert first["words"][3:5] == ["--data", "moved/data/photos-train.beton"]
    assert second["words"][second["words"].index("--init") + 1] == "moved/pretrain"


def test_fewer_minutes_than_a_fit_was_begun_with_are_refused_while_it_is_open(
    file: BetonFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitds.jobs.fit._run", lambda *_: None)
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: FAST)
    record, choice = _Record(tmp_path, ["photos"], FitFlags(minutes=60.0)), choose(file, on_gpu=False)
    _train(record, choice, file, None, FitFlags(minutes=60.0))
    with pytest.raises(UsageError, match=r"`minutes=6`: .* was begun with 60"):
        _train(record, choice, file, None, FitFlags(minutes=6.0))
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune/summary.json").write_text("{}")
    _train(record, choice, file, None, FitFlags(minutes=6.0))
    assert len(record.stages) == 1


def test_a_fit_is_finished_on_a_machine_of_its_kind_and_shown_on_any(
    file: BetonFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitds.jobs.fit._run", lambda *_: None)
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: FAST)
    record = _Record(tmp_path, ["photos"], FitFlags(minutes=3.0))
    _train(record, choose(file, on_gpu=False), file, None, FitFlags(minutes=3.0))
    (tmp_path / "finetune").mkdir()
    monkeypatch.setattr("vitds.jobs.fit._device", lambda: "cuda")
    on_gpu = choose(file, on_gpu=True)
    with pytest.raises(RunError, match="was begun on a machine that trains by cpu, and this one by cuda"):
        _train(record, on_gpu, file, None, FitFlags(minutes=3.0))
    (tmp_path / "finetune/summary.json").write_text("{}")
    _train(record, on_gpu, file, None, FitFlags(minutes=3.0))
    assert [stage["name"] for stage in record.stages] == ["finetune"]


def test_a_folder_with_another_fit_json_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(RunError, match=r"fit\.json is no record of a fit"):
        fit("digits", minutes=3.0, out=tmp_path)


def test_the_result_of_a_plan_is_asked_for_in_vain(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: FAST)
    planned = fit(photos, minutes=3.0, out=tmp_path / "out", plan=True)
    with pytest.raises(RunError, match="nothing was trained yet"):
        _ = planned.accuracy


def test_a_stopped_stage_has_used_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: object) -> None:
        time.sleep(0.1)
        raise VitdsError("stopped")

    monkeypatch.setattr("vitds.jobs.fit.run_stages", stopped)
    record = _Record(tmp_path, ["photos"], FitFlags(minutes=3.0))
    stage = {"name": "finetune", "run": str(tmp_path / "finetune"), "words": [], "expected_s": 60.0}
    record.add(stage)
    with pytest.raises(VitdsError, match="stopped"):
        _run(record, stage)
    assert _Record(tmp_path, ["photos"], FitFlags(minutes=3.0)).facts["spent_s"] >= 0.1


def test_a_stage_that_was_killed_and_went_on_has_used_the_time_of_both_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written when a process is killed; the run's own seconds have it."""

    def finish(stages: list[Stage]) -> None:
        stages[0].run.mkdir()
        (stages[0].run / "summary.json").write_text('{"seconds": 1700}')

    record = _Record(tmp_path, ["photos"], FitFlags(minutes=60.0))
    stage = {"name": "pretrain", "run": str(tmp_path / "pretrain"), "words": [], "expected_s": 60.0}
    record.add(stage)
    monkeypatch.setattr("vitds.jobs.fit.run_stages", finish)
    _run(record, stage)
    assert _Record(tmp_path, ["photos"], FitFlags(minutes=60.0)).left_s == pytest.approx(3600 - 1700, abs=1)


def test_folders_are_the_same_by_any_path_and_names_may_be_no_text(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitds.jobs.fit.measure", lambda *_: FAST)
    named = tmp_path / os.fsdecode(b"fotos\xe4")
    shutil.copytree(photos, named)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    fit(named.name, minutes=3.0, plan=True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["fotos\\xe4"]
    monkeypatch.chdir(tmp_path / "other")
    fit(f"../{named.name}", minutes=3.0, plan=True, out="../runs/fotos\\xe4")


def test_a_class_whose_images_cannot_be_read_leaves_one_class_which_is_said(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos / "one", tmp_path / "set/cat")
    (tmp_path / "set/dog").mkdir()
    for number in range(4):
        (tmp_path / f"set/dog/{number}.jpg").write_bytes(b"\xff\xd8\xff cut")
    words = ["fit", str(tmp_path / "set"), "--minutes", "3", "--out", str(tmp_path / "out"), "--plan"]
    assert main(words) == 3
    assert "has images of one class alone, 'cat', of those in its list" in capsys.readouterr().err


def test_a_published_set_is_taken_by_its_name_with_its_own_test_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CATALOGUE, "cifar10", make_cifar10(tmp_path / "root"))
    words = ["cifar10", "--root", str(tmp_path / "root"), "--minutes", "30", "--plan"]
    assert main(["fit", *words, "--out", str(tmp_path / "out")]) == 0
    assert "finetune_photos_cpu" in capsys.readouterr().out
    halves = [open_beton(tmp_path / "out" / "data" / f"photos-{half}.beton") for half in ("train", "test")]
    assert [half.images for half in halves] == [4, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["flowers102", "--minutes", "3"], "--root is missing, the folder where this published set lies"),
        (["flowers102", "photos", "--minutes", "3"], "flowers102: this set is built by itself"),
        (["digits", "--minutes", "3", "--split", "train"], "digits is taken whole, with its own test half"),
        (["digits", "--minutes", "3", "--root", "x"], "--root does nothing with digits"),
        (["digits", "--minutes", "0"], "--minutes 0.0: must be a number of minutes, more than 0"),
        (["digits", "--minutes", "inf"], "--minutes inf: must be a number of minutes, more than 0"),
        (["digits", "--minutes", "3", "--seed", "-1"], "--seed -1: must be from 0 to "),
        (["--minutes", "3"], "SOURCE is missing"),
        (["nothing-here", "--minutes", "3"], "nothing-here: there is no such folder, tar or zip"),
        (["digits", "--out", "x"], "--minutes is missing"),
    ],
)
def test_wrong_words_are_refused_in_a_line(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *words]) != 0
    assert said in capsys.readouterr().err


def test_a_folder_with_other_things_in_it_is_not_written_to(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="is not empty and holds no fit"):
        fit(photos, minutes=3.0, out=tmp_path)
