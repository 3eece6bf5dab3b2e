"""`vitds embed` and `vitds similar`: features with names, and the nearest images."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.images import png
from vitds.cli import main
from vitds.data.beton import open_beton
from vitds.errors import ResourceError
from vitds.evaluate.files import file_features
from vitds.use.embed import write_features
from vitds.use.model import Answer, Model, open_model


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that fails."""
    assert main([str(word) for word in words]) != 0
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


@pytest.fixture(scope="module")
def pre(used_runs) -> Model:
    return open_model(used_runs["idmm"])


@pytest.fixture(scope="module")
def expected(pre: Model, digit_files) -> np.ndarray:
    """(20, 24) as evaluation has them, in the order of the files' paths."""
    return file_features(pre.settings, pre.backbone, open_beton(digit_files[1]), pre.device).rows_MD.numpy()


def test_features_are_those_of_evaluation_to_the_bit(pre: Model, photos: Path, expected: np.ndarray) -> None:
    assert np.array_equal(pre.embed([photos]), expected)


def test_an_image_that_cannot_be_read_has_no_numbers(pre: Model, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"")
    good = sorted(photos.glob("*/*.png"))[0]
    rows = pre.embed([tmp_path / "cut.png", good])
    assert np.isnan(rows[0]).all() and np.isfinite(rows[1]).all()
    assert pre.embed([]).shape == (0, 24)
    assert pre.embed([tmp_path / "cut.png"]).shape == (1, 24)


def test_npz_csv_and_parquet_hold_the_same_features(
    used_runs, photos: Path, tmp_path: Path, expected: np.ndarray, capsys
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "bad.png").write_bytes(b"")
    for suffix in ("npz", "csv", "parquet"):
        words = ["embed", used_runs["idmm"], str(tmp_path / "bad.png"), str(photos)]
        assert main([*words, "--out", str(tmp_path / f"f.{suffix}")]) == 0
    said = capsys.readouterr().out
    assert said.count("20 images, 24 features each; 1 could not be read, first ") == 3
    files = [str(path) for path in sorted(photos.glob("*/*.png"))]
    with np.load(tmp_path / "f.npz") as found:
        assert np.array_equal(found["features"], expected) and found["features"].dtype == np.float32
        assert found["files"].tolist() == files
        assert found["unreadable_files"].tolist() == [str(tmp_path / "bad.png")]
        assert found["reasons"].tolist() == ["not an image: an empty file"]
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", *(f"feature_{place}" for place in range(24)), "reason"]
    assert rows[0]["reason"] == "not an image: an empty file" and rows[0]["feature_0"] == ""
    numbers = np.array([[row[f"feature_{place}"] for place in range(24)] for row in rows[1:]], np.float32)
    assert np.array_equal(numbers, expected)
    table = parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert table[0] == {
        "file": str(tmp_path / "bad.png"),
        "features": None,
        "reason": "not an image: an empty file",
    }
    assert np.array_equal(np.array([row["features"] for row in table[1:]], np.float32), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "f.csv", "f.npz", "f.parquet"]


@pytest.mark.parametrize("suffix", ["npz", "csv", "json"])
def test_only_a_failing_write_is_said_to_be_one(tmp_path: Path, suffix: str) -> None:
    """Answers come from processes, which fail in ways of their own: shared memory, for one."""

    def answers():
        yield Answer("a.png", np.zeros(2, np.float32), "")
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        write_features(tmp_path / f"x.{suffix}", answers(), 2)
    with pytest.raises(ResourceError, match=r"cannot be written.*No such file"):
        write_features(tmp_path / "gone" / f"x.{suffix}", iter(()), 2)


def test_nothing_but_unreadable_files_still_makes_a_file(used_runs, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    assert (
        main(["embed", used_runs["idmm"], str(tmp_path / "bad.png"), "--out", str(tmp_path / "f.npz")]) == 0
    )
    with np.load(tmp_path / "f.npz") as found:
        assert found["features"].shape == (0, 24) and len(found["unreadable_files"]) == 1


def test_a_folder_of_sound_images_is_said_without_more(
    used_runs, photos: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "f.npz"
    assert main(["embed", used_runs["idmm"], str(photos), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 20 images, 24 features each\n"


def test_what_is_no_run_and_no_model_is_named(
    used_runs, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name, text in (
        ("vit_tinny_patch16_224", "is no timm model; near names: vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", "the published weights of vit_tiny_patch16_224 cannot be had: "),
        (
            "runs/gone",
            "runs/gone does not exist; name a run directory, one of its checkpoints, or a timm model",
        ),
        (str(photos), f"{photos} is no run directory: it has no settings.yaml\n"),
        (
            str(Path(used_runs["idmm"]).parent),
            f"it has no settings.yaml; did you mean {used_runs['idmm']}",
        ),
    ):
        assert text in refusal(capsys, "embed", name, photos, "--out", tmp_path / "f.npz")


def nearest_by_hand(expected: np.ndarray, place: int) -> np.ndarray:
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit[place]), kind="stable")
    return order[order != place]


def test_the_nearest_have_the_highest_cosine_and_the_image_itself_is_not_among_them(
    used_runs, photos: Path, tmp_path: Path, expected: np.ndarray, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(photos.glob("*/*.png"))
    words = ["similar", used_runs["idmm"], str(files[3]), "--in", str(photos), "--count", "5"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in found["nearest"]] == [
        str(files[place]) for place in nearest_by_hand(expected, 3)[:5]
    ]
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    best = nearest_by_hand(expected, 3)[0]
    assert found["nearest"][0]["cosine"] == pytest.approx(float(unit[3] @ unit[best]), abs=1e-5)
    assert main(words) == 0
    listed = capsys.readouterr().out
    assert f"{found['nearest'][0]['cosine']:.4f}" in listed and "similar.png: the same as pictures" in listed


def test_the_sheet_shows_the_pictures(used_runs, photos: Path, tmp_path: Path, capsys) -> None:
    files = sorted(photos.glob("*/*.png"))
    words = ["similar", used_runs["idmm"], str(files[0]), "--in", str(photos), "--count", "4"]
    assert main([*words, "--out", str(tmp_path / "sheet.png"), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["nearest"][0]["file"]
    page = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    # A cell is 176 pixels wide; a digit of 24 x 20 pixels fills 176 x 147 of it, at its bottom.
    for column, file in enumerate((files[0], first)):
        left = 12 + column * 188
        rows = np.flatnonzero((page[:, left : left + 176] < 200).any(axis=(1, 2)))
        top = rows[rows > 40][0]
        picture = Image.open(file).convert("RGB").resize((176, 147), Image.Resampling.BICUBIC)
        cell = min(
            np.abs(page[y : y + 147, left : left + 176] - np.asarray(picture)).mean()
            for y in range(top, top + 60)
        )
        assert cell < 3
    assert page.shape[1] == 12 + 4 * 188


def test_a_picture_that_cannot_be_written_loses_no_search(
    used_runs, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    image = sorted(photos.glob("*/*.png"))[0]
    words = ["similar", used_runs["idmm"], str(image), "--in", str(photos), "--count", "2"]
    for error in (OSError("no space"), ValueError("encoding error 5")):

        def failing(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "save", failing)
        assert main([*words, "--out", str(tmp_path / "x.webp")]) == 6
        printed = capsys.readouterr()
        assert "cosine" in printed.out and f"the picture cannot be written ({error})" in printed.err


def test_an_image_from_elsewhere_finds_its_like_in_a_beton(
    used_runs, photos: Path, digit_files, tmp_path, capsys
):
    image = sorted(photos.glob("*/*.png"))[7]
    words = ["similar", used_runs["supervised"], str(image), "--in", digit_files[1], "--count", "1"]
    assert main([*words, "--out", str(tmp_path / "x.png"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["nearest"]
    assert row["file"] == f"{digit_files[1]}:{image.relative_to(photos)}" and row["cosine"] == pytest.approx(
        1, abs=1e-6
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["bad.png", "--in", "PHOTOS"], "bad.png: not an image: an empty file"),
        (["PHOTOS", "--in", "PHOTOS"], "holds 20 images; name one image file"),
        (["good.png", "--in", "bad.png"], "bad.png: no other image could be read there"),
        (["good.png", "--in", "good.png"], "good.png: no other image could be read there"),
        (["good.png", "--in", "PHOTOS", "--count", "0"], "--count 0: must be at least 1"),
        (
            ["good.png", "--in", "PHOTOS", "--out", "x.gif"],
            "--out x.gif: the name must end in .png, .jpg or .webp",
        ),
        (["good.png"], "--in is missing; see vitds similar --help"),
        (["good.png", "--in"], "--in needs a value"),
        (["good.png", "--in", "gone"], "gone: there is no such file"),
        (["good.png", "--inn", "PHOTOS"], "unknown flag --inn; did you mean --in?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_refused(
    words: list[str], text: str, used_runs, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.png").write_bytes(b"")
    Path("good.png").write_bytes(png(1))
    words = [str(photos) if word == "PHOTOS" else word for word in words]
    assert text in refusal(capsys, "similar", used_runs["idmm"], *words)
    assert not Path("similar.png").exists()
