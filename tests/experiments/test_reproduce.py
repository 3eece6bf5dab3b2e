"""`vitds reproduce`: a stored row again, from published files to the table; and the rows themselves."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vitds.cli import main
from vitds.config.load import load_settings
from vitds.config.methods import METHODS
from vitds.data.catalogue import CATALOGUE
from vitds.data.findings import Findings
from vitds.data.published import published_images
from vitds.errors import DataError, Stopped
from vitds.jobs import result_rows
from vitds.jobs.result_rows import ROWS, read_row
from vitds.runs.directory import Run, read_json

ROW = {
    "title": "A small network",
    "table": "small",
    "set": "flowers102",
    "side": 24,
    "stages": [
        {"command": "finetune", "recipe": "finetune_digits", "epochs": 2, "set": []},
        {"command": "finetune", "recipe": "finetune_digits", "epochs": 1, "set": ["views.crop_px=32"]},
    ],
    "seconds": 1,
    "held_out": None,
    "test": {"seeds": [0, 1], "mean": 61.5, "deviation": 0.4, "interval": [60.1, 62.8], "majority": 33.3},
}
SMALL = (
    *("backbone.options={patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3, global_pool: avg}",),
    *("log.page=false", "log.tensorboard=false", "engine.compile=off"),
)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of class folders, of three classes: 12 training images, and 6 test images in two tars."""
    folder, digits = tmp_path_factory.mktemp("shipped"), load_digits()
    for tar, label_range, numbers in (
        *(
            ("train", range(3), range(4)),
            ("test-a", range(2), range(4, 6)),
            ("test-b", range(2, 3), range(4, 6)),
        ),
    ):
        with tarfile.open(folder / f"{tar}.tar", "w") as opened:
            for label in label_range:
                own = digits.images[digits.target == label]
                for number in numbers:
                    image = Image.fromarray((own[number] * 15.9).astype("uint8")).resize((24, 24))
                    image.save(folder / "image.png")
                    opened.add(folder / "image.png", f"{label}/{number}.png")
    (folder / "image.png").unlink()
    return folder


@pytest.fixture(scope="module")
def small_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows with a small one, for a CPU and for a GPU."""
    folder = tmp_path_factory.mktemp("rows")
    stages = [stage | {"set": [*stage["set"], *SMALL]} for stage in ROW["stages"]]
    for name in ("small_cpu", "small_gpu"):
        (folder / f"{name}.json").write_text(json.dumps(ROW | {"stages": stages}))
    return folder


@pytest.fixture(autouse=True)
def small_world(small_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the folder above, of a published set of 12 and 6 images."""
    monkeypatch.setattr(result_rows, "ROWS", small_rows)
    entry = replace(CATALOGUE["flowers102"], classes=3, counts={"train": 12, "test": 6})
    monkeypatch.setitem(CATALOGUE, "flowers102", entry)


def words(shipped: Path, out: Path, *more: str) -> list[str]:
    return ["reproduce", "small", "--cpu", "--source", str(shipped), "--out", str(out), "--seeds", "1", *more]


def test_a_row_is_made_again_from_the_published_files(
    shipped: Path, tmp_path: Path, ran: list[str], capsys
) -> None:
    out = tmp_path / "out"
    ran.clear()
    assert main(words(shipped, out)) == 0
    printed = capsys.readouterr().out
    assert ran == [str(out / f"runs/{name}-seed0") for name in ("finetune", "finetune-32")]
    first, second = (Run(Path(run)) for run in ran)
    assert (first.settings.epochs, second.settings.epochs, second.settings.init) == (2, 1, ran[0])
    result = read_json(out / "reproduction.json")
    assert result["arms"][0]["test"]["mean"] == second.summary["top1"]
    assert "Stored row: 61.5 ± 0.4 % (60.1 to 62.8), 2 seeds." in printed
    difference = second.summary["top1"] - 61.5
    assert f"Seed by seed: {second.summary['top1']:.1f} %." in printed
    assert f"This is {difference:+.1f} points from it, and the intervals " in printed
    assert "disk: at most" in printed
    assert "by a few steps of each stage here: about 0.0 hours for 2 runs, until" in printed
    assert "crops of 32 see them enlarged" in printed
    assert main(words(shipped, out)) == 0 and len(ran) == 2, "a finished one runs nothing"
    assert main(words(shipped, out, "--toy")) == 5
    assert "this row takes 6 of side 24 at toy length" in capsys.readouterr().err


def test_images_that_cannot_be_used_are_said_before_anything_trains(
    shipped: Path, tmp_path: Path, ran: list[str], capsys
) -> None:
    ran.clear()
    source = shutil.copytree(shipped, tmp_path / "shipped")
    with tarfile.open(shipped / "train.tar") as tar:
        tar.extractall(tmp_path / "train", filter="data")
    (tmp_path / "train/0/1.png").write_bytes((tmp_path / "train/0/1.png").read_bytes()[:90])
    with tarfile.open(source / "train.tar", "w") as tar:
        tar.add(tmp_path / "train", ".")
    for _ in range(2):
        assert main(words(source, tmp_path / "out")) == 3
        assert "flowers102-train.beton: 11 of 12 images can be used" in capsys.readouterr().err
    assert ran == [] and main(words(shipped, tmp_path / "out", "--plan")) == 0


def test_runs_of_a_row_that_has_changed_since_are_not_judged_by_the_new_one(
    shipped: Path, small_rows: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def stopped(_: object) -> None:
        raise Stopped("now")

    monkeypatch.setattr("vitds.jobs.experiment.run_stages", stopped)
    assert main(words(shipped, tmp_path / "out")) != 0
    text = (small_rows / "small_cpu.json").read_text()
    (small_rows / "small_cpu.json").write_text(text.replace("A small network", "A large network"))
    try:
        assert main(words(shipped, tmp_path / "out")) == 5
    finally:
        (small_rows / "small_cpu.json").write_text(text)
    assert "title was 'A small network', now 'A large network'" in capsys.readouterr().err


def test_toy_length_is_two_images_a_class_and_says_so(shipped: Path, tmp_path: Path, capsys) -> None:
    command = words(shipped, tmp_path / "out", "--toy", "--plan")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "This is of toy length" in printed and "(6 images)" in printed
    assert [line.split()[-4] for line in printed.replace("│", " ").splitlines() if " x 32" in line] == ["6"]


def test_files_of_toy_length_or_of_another_row_are_not_taken_for_the_rows_own(
    shipped: Path, small_rows: Path, tmp_path: Path, capsys
) -> None:
    toy, whole = tmp_path / "toy", tmp_path / "whole"
    assert main(words(shipped, toy, "--toy", "--plan")) == 0
    assert main(words(shipped, toy, "--plan")) == 5
    said = capsys.readouterr().err
    assert "flowers102-train.beton has 6 images of side 24, and this row takes 12 of side 24: it was" in said
    assert main(words(shipped, whole, "--plan")) == 0
    row = json.loads((small_rows / "small_cpu.json").read_text())
    (small_rows / "wide_cpu.json").write_text(json.dumps(row | {"side": 32}))
    command = ["wide" if word == "small" else word for word in words(shipped, whole, "--plan")]
    assert main(command) == 5
    assert "this row takes 12 of side 32: it was built for another one" in capsys.readouterr().err


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_row_for_a_gpu_is_refused_without_one(shipped: Path, tmp_path: Path, capsys) -> None:
    command = words(shipped, tmp_path / "out")
    command.remove("--cpu")
    assert main(command) == 6
    said = capsys.readouterr().err
    assert "the row small_gpu needs a CUDA device, and torch finds none here. --cpu makes the row" in said
    assert not (tmp_path / "out").exists()
    assert main([*command, "--toy", "--plan"]) == 0
    assert "GB by the arithmetic of `vitds plan`" in capsys.readouterr().out


def test_wrong_words_are_refused_in_a_line(shipped: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for command, said in (
        (["reproduce", "smal", "--cpu"], "smal is no result that can be made again; did you mean small?"),
        (words(tmp_path, tmp_path / "out"), "does not hold flowers102: there must be 102flowers.tgz, "),
        ([*words(tmp_path, tmp_path / "out")[:-1], "0"], "--seeds 0: must be 1 or more"),
        (words(shipped, tmp_path), "is not empty and holds no experiment. Choose another --out"),
    ):
        assert main(command) != 0
        assert said in capsys.readouterr().err


def test_tars_with_other_counts_are_refused(shipped: Path, tmp_path: Path, monkeypatch) -> None:
    entry = replace(CATALOGUE["flowers102"], counts={"train": 13, "test": 6})
    monkeypatch.setitem(CATALOGUE, "flowers102", entry)
    with pytest.raises(DataError, match="hold 12 images of 3 classes, published are 13 of 3"):
        published_images("flowers102", str(shipped), "train", Findings(), tmp_path)


def test_the_publishers_archive_is_unpacked_beside_its_tables(tmp_path: Path, shipped: Path) -> None:
    """The tables here are not the publisher's, so the catalogue, which knows their sums, refuses them."""
    source = tmp_path / "as shipped"
    source.mkdir()
    with tarfile.open(source / "102flowers.tgz", "w:gz") as archive:
        archive.add(shipped / "train.tar", "jpg/image_00001.jpg")
    for name in ("imagelabels.mat", "setid.mat"):
        (source / name).write_bytes(b"no table")
    with pytest.raises(DataError, match="not found or corrupted"):
        published_images("flowers102", str(source), "train", Findings(), tmp_path / "work")
    assert {path.name for path in (tmp_path / "work/flowers-102").iterdir()} == {
        *(".unpacked", "jpg", "imagelabels.mat", "setid.mat")
    }


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    for name in ("102flowers.tgz", "imagelabels.mat", "setid.mat"):
        (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(DataError, match="102flowers.tgz cannot be unpacked"):
        published_images("flowers102", str(tmp_path), "train", Findings(), tmp_path / "work")


@pytest.mark.parametrize("path", sorted(ROWS.glob("*.json")), ids=lambda path: path.stem)
def test_every_stored_row_names_recipes_and_settings_that_there_are(path: Path) -> None:
    row = read_row(path)
    for stage in row.stages:
        settings = load_settings(recipe=stage.recipe, command=stage.command, assignments=stage.set, flags={})
        assert METHODS[settings.method].command == stage.command


def test_a_file_that_is_no_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROW | {"side": "wide"}))
    with pytest.raises(DataError, match=r"a\.json is no row of results: side: "):
        read_row(tmp_path / "a.json")
