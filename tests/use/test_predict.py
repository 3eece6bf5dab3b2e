"""`vitds predict` and `predict` from Python: the classes of any images, in the order given."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.images import encode, photo, png, rotated_jpeg, write_folder, write_tar
from tests.data.test_odd_images import CONVERTED
from vitds.cli import main
from vitds.data.beton import open_beton
from vitds.errors import DataError, RunError
from vitds.evaluate.files import file_features
from vitds.runs.directory import Run
from vitds.use.images import find_images
from vitds.use.model import Model, open_model
from vitds.use.run import TrainedRun
from vitds.use.tables import CsvTable

COLUMNS = "file class probability class_2 probability_2 class_3 probability_3 reason".split()


def csv_rows(text: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text))
    assert reader.fieldnames == COLUMNS
    return list(reader)


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that fails."""
    assert main([str(word) for word in words]) != 0
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


@pytest.fixture(scope="module")
def parquet():
    return pytest.importorskip("pyarrow.parquet")


def test_the_files_of_a_folder_get_the_accuracy_that_the_run_reports(
    fine: Model, photos: Path, used_runs
) -> None:
    found = fine.predict([photos])
    hits = [prediction.classes[0] == Path(prediction.file).parent.name for prediction in found]
    assert len(found) == 20
    assert 100 * sum(hits) / len(hits) == pytest.approx(Run(Path(used_runs["supervised"])).summary["top1"])


def test_files_folder_tar_zip_and_beton_give_the_same_numbers(
    fine: Model, photos: Path, digit_files, tmp_path: Path
) -> None:
    files = sorted(photos.glob("*/*.png"))
    content = {str(file.relative_to(photos)): file.read_bytes() for file in files}
    tar = write_tar(tmp_path / "set.tar", content)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in content.items():
            packed.writestr(name, data)
    for other in ([photos], files, [tar], [tmp_path / "set.zip"], [digit_files[1]]):
        found = [(prediction.classes, prediction.probabilities) for prediction in fine.predict(other)]
        assert found == [
            (one.classes, one.probabilities) for one in fine.predict([str(file) for file in files])
        ]


def test_the_logits_are_those_of_evaluation_to_the_bit(fine: Model, photos: Path, digit_files) -> None:
    model = torch.nn.Sequential(fine.backbone, fine.head)
    expected = file_features(fine.settings, model, open_beton(digit_files[1]), fine.device).rows_MD
    chances = expected.double().softmax(1)
    for prediction, chance in zip(fine.predict([photos], top=4), chances, strict=True):
        order = chance.argsort(descending=True)
        assert prediction.classes == tuple(fine.classes[i] for i in order)
        assert prediction.probabilities == tuple(chance[order].tolist())


def test_rows_stand_in_the_order_given_and_an_unreadable_file_is_one_with_the_reason(
    used_runs, photos: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(png(1, 200, 200)[:9000])
    first, last = sorted(photos.glob("*/*.png"))[0], sorted(photos.glob("*/*.png"))[-1]
    named = [last, tmp_path / "notes.txt", tmp_path / "cut.png", first]
    assert main(["predict", used_runs["supervised"], *map(str, named)]) == 0
    rows = csv_rows(capsys.readouterr().out)
    assert [row["file"] for row in rows] == [str(path) for path in named]
    assert rows[1]["reason"] == "not an image: no known format" and rows[1]["class"] == ""
    assert "truncated" in rows[2]["reason"] and rows[2]["probability"] == ""
    for row in (rows[0], rows[3]):
        assert row["reason"] == "" and row["class"].startswith("digit ")
        assert float(row["probability"]) >= float(row["probability_2"]) >= float(row["probability_3"]) > 0


def test_csv_json_and_parquet_hold_the_same_rows(
    used_runs, photos: Path, tmp_path: Path, parquet, capsys
) -> None:
    (tmp_path / "bad, name.png").write_bytes(b"")
    for suffix in ("csv", "json", "parquet"):
        words = ["predict", used_runs["supervised"], str(photos), str(tmp_path / "bad, name.png")]
        assert main([*words, "--out", str(tmp_path / f"f.{suffix}")]) == 0
    said = capsys.readouterr().out
    assert said.count("20 images (") == 3 and "1 could not be read, with the reason in the file" in said
    from_json = json.loads((tmp_path / "f.json").read_text())
    assert parquet.read_table(tmp_path / "f.parquet").to_pylist() == from_json
    assert list(from_json[0]) == COLUMNS and len(from_json) == 21
    for row, text in zip(from_json, csv_rows((tmp_path / "f.csv").read_text()), strict=True):
        assert text["file"] == row["file"] and text["class"] == (row["class"] or "")
        assert text["reason"] == row["reason"]
        assert row["probability"] is None or float(text["probability"]) == pytest.approx(row["probability"])
    assert sorted(path.name for path in tmp_path.glob("f.*")) == ["f.csv", "f.json", "f.parquet"]


def test_no_text_of_a_csv_is_a_formula() -> None:
    stream = io.StringIO()
    CsvTable(stream, ["file", "probability"]).write({"file": "=cmd()", "probability": -0.5})
    assert stream.getvalue() == "file,probability\n'=cmd(),-0.5\n"


def test_processes_that_decode_change_no_number_and_no_order(
    fine: Model, photos: Path, tmp_path: Path
) -> None:
    images, _ = find_images([photos], tmp_path)
    alone, shared = (list(fine.predictions(images, workers=workers)) for workers in (1, 2))
    assert alone == shared


def test_images_are_read_as_they_are_answered_and_not_all_at_first(fine: Model, tmp_path: Path) -> None:
    files = {f"{number:02d}.png": png(number) for number in range(40)}
    images, _ = find_images([write_folder(tmp_path / "set", files)], tmp_path)
    few = fine.settings.eval.model_copy(update={"batch_images": 2})
    model = replace(fine, settings=fine.settings.model_copy(update={"eval": few}))
    answers = model.answers(images)
    next(answers)
    (tmp_path / "set" / "39.png").write_bytes(b"")
    assert [answer.reason for answer in answers][-2:] == ["", "not an image: an empty file"]


def test_a_folder_may_hold_images_beside_folders(fine: Model, tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/train/1.png": png(1), "b/train/2.png": png(2), "3.png": png(3)})
    found = [Path(prediction.file).name for prediction in fine.predict([tmp_path])]
    assert sorted(found) == ["1.png", "2.png", "3.png"]


@pytest.mark.parametrize("name", CONVERTED)
def test_a_picture_in_memory_is_seen_as_its_file(fine: Model, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONVERTED[name][0])
    with Image.open(tmp_path / name) as picture:
        # Each alone: products of some processors end in other last bits for the second row of a batch.
        (in_memory,), (in_file,) = fine.predict([picture]), fine.predict([tmp_path / name])
    assert (in_memory.file, in_memory.probabilities) == (in_file.file, in_file.probabilities)


def test_a_photograph_in_memory_is_turned_as_its_exif_tag_says(fine: Model, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(rotated_jpeg(1, 6))
    with Image.open(tmp_path / "x.jpg") as picture:
        # Each alone, as above.
        (in_memory,), (in_file,) = fine.embed([picture]), fine.embed([tmp_path / "x.jpg"])
    np.testing.assert_allclose(in_memory, in_file, atol=0.05)
    upright = fine.embed([np.rot90(np.asarray(Image.open(tmp_path / "x.jpg")), -1)])[0]
    np.testing.assert_array_equal(in_memory, upright)


def test_arrays_and_pictures_get_the_names_of_their_places(fine: Model) -> None:
    found = fine.predict([photo(1), Image.fromarray(photo(2))])
    assert [prediction.file for prediction in found] == ["image 0", "image 1"]
    assert found[0].probabilities != found[1].probabilities


def test_a_run_that_python_gets_back_can_be_used_at_once(given_back, photos: Path, fine: Model) -> None:
    path, features = given_back["supervised"]
    np.testing.assert_allclose(features, fine.embed([photos]), rtol=1e-4, atol=1e-5)
    assert TrainedRun(Path(path)).predict([photos], top=2) == fine.predict([photos], top=2)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (photo(1).astype(float), r"image 0 is an array \(30, 40, 3\) of float64; give a path"),
        (photo(1)[..., 0], r"image 0 is an array \(30, 40\) of uint8; give a path"),
        (Image.new("F", (4, 4)), "image 0: floating-point samples.*Make it 8-bit RGB first"),
        (Image.open(io.BytesIO(encode(photo(1), "PNG")[:900])), "image 0: the picture cannot be decoded"),
    ],
    ids=["floats", "grey", "mode F", "cut"],
)
def test_what_is_no_picture_is_refused(fine: Model, image: object, text: str) -> None:
    with pytest.raises(DataError, match=text):
        fine.predict([image])


def test_one_image_that_is_no_list_is_refused(fine: Model) -> None:
    for image in ("x.png", photo(1)):
        with pytest.raises(DataError, match=r"give the images as a list.*predict\(\[image\]\)"):
            fine.predict(image)


def test_files_that_do_not_exist_are_named_before_anything_is_written(
    used_runs, photos: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "f.csv"
    text = refusal(
        capsys, "predict", used_runs["supervised"], photos, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "--out", out
    )
    assert "a.jpg, b.jpg, c.jpg and 1 more: there is no such file. Check the path." in text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_images_is_refused(used_runs, tmp_path: Path, capsys) -> None:
    text = refusal(capsys, "predict", used_runs["supervised"], tmp_path)
    assert f"{tmp_path}: there are no images." in text


def test_less_than_one_process_is_refused(used_runs, photos: Path, capsys) -> None:
    text = refusal(capsys, "predict", used_runs["supervised"], photos, "--workers", "0")
    assert "--workers 0: must be at least 1" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f.xls", "--out f.xls: the name must end in .csv, .json or .parquet"),
        ("gone/f.csv", "--out gone/f.csv: there is no folder gone; make it first"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(
    used_runs, photos: Path, name: str, text: str, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in refusal(capsys, "predict", used_runs["supervised"], photos, "--out", name)


def test_parquet_without_its_library_says_how_to_get_it(used_runs, photos: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("vitds.use.tables.pyarrow", None)
    text = refusal(capsys, "predict", used_runs["supervised"], photos, "--out", "f.parquet")
    assert 'Parquet needs pyarrow: pip install "vitds[parquet]"' in text


def test_a_run_without_class_head_is_refused_with_what_it_can_do(used_runs, photos: Path, capsys) -> None:
    text = refusal(capsys, "predict", used_runs["idmm"], photos)
    assert f"{used_runs['idmm']} was trained without labels and has no class head" in text
    assert f"vitds finetune --init {used_runs['idmm']}" in text and "`vitds embed` for features" in text
    text = refusal(capsys, "predict", "vit_tiny_patch16_224", photos)
    assert "vit_tiny_patch16_224 is a plain timm model and has no class head" in text
    with pytest.raises(RunError, match="has no class head"):
        open_model(used_runs["idmm"]).predict([photos])


def test_a_checkpoint_predicts_with_its_own_weights_and_the_names_of_the_training_file(
    used_runs, photos: Path, fine: Model, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(used_runs["supervised"], run)
    for name in ("head.safetensors", "backbone.safetensors", "summary.json"):  # as a run that was stopped
        (run / name).unlink()
    newest = max((run / "checkpoints").glob("step-*"))
    assert open_model(newest).predict([photos]) == fine.predict([photos])


@pytest.fixture
def early_run(used_runs, tmp_path: Path) -> Path:
    """A copy of a run as earlier versions left it: without data.json."""
    shutil.copytree(used_runs["supervised"], tmp_path / "early")
    (tmp_path / "early" / "data.json").unlink()
    return tmp_path / "early"


def test_a_run_keeps_how_its_images_were_stored(fine: Model, used_runs) -> None:
    facts = json.loads((Path(used_runs["supervised"]) / "data.json").read_text())
    assert facts == {"storage": "raw", "side_px": None, "quality": 90, "images": 52, "classes": 4}
    assert (fine.storing.storage, fine.storing.side_px, fine.storing.quality) == ("raw", None, 90)


def test_of_an_early_run_the_training_file_says_it(early_run: Path, fine: Model) -> None:
    model = open_model(early_run)
    assert model.storing == fine.storing and model.notes == ()


def test_where_nothing_says_it_that_is_said(early_run: Path, digit_files, photos: Path, capsys) -> None:
    settings = early_run / "settings.yaml"
    settings.write_text(settings.read_text().replace(digit_files[0], "gone.beton"))
    assert main(["predict", str(early_run), str(photos)]) == 0
    assert "is from before runs kept how their images were stored, and its training file gone.beton" in (
        capsys.readouterr().err
    )


def test_a_damaged_record_of_it_is_named(early_run: Path) -> None:
    (early_run / "data.json").write_text('{"storage": "raw"}')
    with pytest.raises(
        RunError, match="data.json lacks 'side_px'; remove it: the training file's manifest says it too"
    ):
        open_model(early_run)
