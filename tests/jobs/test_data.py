"""`vitds data build | info | verify` as functions: what they print, return and refuse."""

from __future__ import annotations

import json

import pytest

from tests.data.images import class_folders, jpeg, png, write_folder
from tests.data.test_catalogue import make_imagenet_folders
from vitds.data.beton import open_beton
from vitds.data.catalogue import CATALOGUE
from vitds.errors import DataError, UsageError
from vitds.jobs.data import build
from vitds.jobs.data_check import info, verify


def test_build_prints_and_returns_what_was_built_and_what_was_odd(tmp_path, capsys):
    source = write_folder(
        tmp_path / "set", {"cat/1.jpg": jpeg(1), "cat/[bold]2.png": png(2), "dog/3.jpg": b"no picture"}
    )
    (row,) = build([str(source)], out=str(tmp_path / "x.beton"))
    assert (row["file"], row["images"], row["storage"]) == (f"{tmp_path}/x.beton", 2, "raw")
    assert row["findings"]["not_image"]["count"] == 1
    printed = capsys.readouterr().out
    assert f"{tmp_path}/x.beton: 2 images, 2 classes, raw" in printed
    assert "left out: not an image" in printed and "3.jpg" in printed


def test_build_makes_both_halves_of_the_digits(tmp_path):
    assert [row["images"] for row in build(["digits"], out=str(tmp_path / "d.beton"))] == [896, 901]


def test_a_sample_of_a_published_set_is_listed_beside_the_file_and_built_again_from_the_list(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(CATALOGUE, "imagenet", make_imagenet_folders(tmp_path / "root"))
    words = {"root": str(tmp_path / "root"), "storage": "jpg"}
    train, test = build(["imagenet"], out=str(tmp_path / "x.beton"), classes=1, seed=3, **words)
    assert len(train["classes"]) == 1 and test["classes"] == train["classes"] and test["images"] == 1
    listed = tmp_path / "x-train.beton.list"
    assert listed.read_text().count("\n") == train["images"]
    (again,) = build(
        ["imagenet"], out=str(tmp_path / "again.beton"), split="train", list=str(listed), **words
    )
    assert again["content_hash"] == train["content_hash"]


def test_a_published_set_is_built_whole_without_a_list(tmp_path, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "imagenet", make_imagenet_folders(tmp_path / "root"))
    assert [
        row["images"]
        for row in build(["imagenet"], out=str(tmp_path / "x.beton"), root=str(tmp_path / "root"))
    ] == [3, 2]
    assert not list(tmp_path.glob("*.list"))


@pytest.mark.parametrize(
    ("sources", "words", "message"),
    [
        (
            ["pets"],
            {},
            r"pets: a published set is built by itself, with --root DIR\. A folder of that name is \./pets\.",
        ),
        (["pets", "folder"], {"root": "r"}, r"pets: a published set is built by itself"),
        (["pets"], {"root": "r", "test_fraction": 0.1}, r"--test_fraction: pets has a published split"),
        (
            ["folder"],
            {"root": "r"},
            r"--root, --download, --per_class, .* are for one published set: aircraft, cars, cifar10",
        ),
        (["folder"], {"total": 3}, r"are for one published set"),
        (
            ["digits", "folder"],
            {},
            r"digits: the embedded set is built by itself\. A folder of that name is \./digits\.",
        ),
    ],
)
def test_words_that_do_not_go_together_are_refused(tmp_path, sources, words, message):
    with pytest.raises(UsageError, match=message):
        build(sources, out=str(tmp_path / "x.beton"), **words)


@pytest.fixture
def built(tmp_path):
    """Five JPEG images of two classes."""
    build(
        [str(class_folders(tmp_path / "set", {"cat": 3, "dog": 2}))],
        out=str(tmp_path / "x.beton"),
        storage="jpg",
    )
    return tmp_path / "x.beton"


def test_info_as_json_is_one_object_and_nothing_else(built, capsys):
    capsys.readouterr()
    returned = info(str(built), as_json=True)
    assert json.loads(capsys.readouterr().out) == returned
    assert (returned["images"], returned["classes"], returned["images_per_class"]) == (
        5,
        ["cat", "dog"],
        [3, 2],
    )
    assert returned["content_hash"] == open_beton(built).manifest.content_hash


def test_info_shows_a_table(built, capsys):
    capsys.readouterr()
    info(str(built))
    printed = capsys.readouterr().out
    for part in (
        "images",
        "2: cat, dog; 2 to 3 images each",
        "jpg, quality 90 where encoded",
        "width 40 to 40, height 30 to 30",
    ):
        assert part in printed


def test_info_of_images_without_labels(tmp_path, capsys):
    build(
        [str(write_folder(tmp_path / "flat", {"1.png": png(1)}))], out=str(tmp_path / "x.beton"), side_px=20
    )
    info(str(tmp_path / "x.beton"))
    printed = capsys.readouterr().out
    assert "none (no labels)" in printed and "short side reduced to 20" in printed


def test_verify_says_that_a_file_is_sound(built, capsys):
    capsys.readouterr()
    assert verify(str(built))["is_sound"]
    assert "sound. All 5 images were decoded; sha256:" in capsys.readouterr().out


def test_verify_as_json_is_one_object_also_of_a_damaged_file(built, capsys):
    capsys.readouterr()
    data = bytearray(built.read_bytes())
    data[int(open_beton(built).offsets[2])] = 0
    built.write_bytes(data)
    with pytest.raises(
        DataError,
        match=r"x\.beton: 1 of 5 images cannot be decoded, by index: 2 \(.*the JPEG data are.*Copy the file",
    ):
        verify(str(built), as_json=True)
    assert list(json.loads(capsys.readouterr().out)["undecodable"]) == ["2"]


def test_verify_names_both_hashes_of_changed_content(built):
    sidecar = built.with_name("x.beton.json")
    sidecar.write_text(sidecar.read_text().replace("sha256:", "sha256:0"))
    with pytest.raises(
        DataError,
        match=r"x\.beton: the content is not what was built: sha256:\w+, the manifest says sha256:0\w+\. Copy",
    ):
        verify(str(built))
