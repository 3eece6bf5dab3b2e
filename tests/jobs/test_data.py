"""`vitds data build | info | verify` as functions: what they print, return and refuse."""

from __future__ import annotations

import json
import os

import pytest

from tests.data.images import class_folders, jpeg, png, write_folder
from tests.data.test_catalogue import make_imagenet_folders
from vitds.cli import data_build, main
from vitds.config.flags import BuildFlags
from vitds.data.beton import open_beton
from vitds.data.build import build_beton
from vitds.data.catalogue import CATALOGUE
from vitds.errors import DataError, UsageError
from vitds.jobs.as_flags import as_flags
from vitds.jobs.data import build as build_files
from vitds.jobs.data_check import info, list_images, verify


def build(sources, **flags):
    return build_files(sources, BuildFlags(**flags))


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
        (["pets"], {}, r"pets: `root` is missing, .* A folder of its name is \./pets\."),
        (
            ["pets", "folder"],
            {"root": "r"},
            r"pets: this set is built by itself\. A folder of that name is \./pets\.",
        ),
        (
            ["digits", "folder"],
            {},
            r"digits: this set is built by itself\. A folder of that name is \./digits\.",
        ),
    ],
)
def test_words_that_do_not_go_together_are_refused(tmp_path, sources, words, message):
    with pytest.raises(UsageError, match=message):
        build(sources, out=str(tmp_path / "x.beton"), **words)


def test_a_folder_called_digits_is_asked_about(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=r"digits: there is a folder .* here, .* Write \./digits for what lies"
    ):
        build(["digits"], out="x.beton")


IDLE = [  # sources, what would do nothing with them, the message
    (
        ["folder"],
        {"root": "r"},
        r"`root` does nothing with folders, tars and zips: it goes with one published set: aircraft, cars, ",
    ),
    (["folder"], {"download": True}, r"`download` does nothing with folders, tars and zips"),
    (
        ["digits"],
        {"per_class": 3},
        r"`per_class` does nothing with digits: it goes with one published set or folders: aircraft, ",
    ),
    (["digits"], {"classes": 3}, r"`classes` does nothing with digits"),
    (["digits"], {"total": 3}, r"`total` does nothing with digits"),
    (["digits"], {"folds": 3}, r"`folds` does nothing with digits"),
    (["digits"], {"labels": "l.csv"}, r"`labels` does nothing with digits"),
    (["pets"], {"root": "r", "unlabelled": "u"}, r"`unlabelled` does nothing with pets"),
    (["folder"], {"label_column": "x"}, r"`label_column` does nothing here: it goes with `labels`\."),
    (["folder"], {"yes": True}, r"`yes` does nothing here: it goes with `label_from`\."),
    (["folder"], {"alike": "keep", "no_labels": True}, r"`alike` does nothing here: it goes with labels\."),
    (["folder"], {"group": "a"}, r"`group` does nothing here: it goes with `test_fraction` or `folds`\."),
    (
        ["folder"],
        {"no_labels": True, "classes_are_folders": True},
        r"`classes_are_folders` does nothing here",
    ),
    (["folder"], {"no_labels": True, "labels": "x"}, r"`labels` and `no_labels` exclude each other"),
    (["folder"], {"folds": 2, "test_fraction": 0.5}, r"`test_fraction` and `folds` exclude each other"),
    (["folder"], {"list": "x"}, r"`list` does nothing with folders, tars and zips"),
    (["digits"], {"root": "r"}, r"`root` does nothing with digits: it goes with one published set"),
    (
        ["digits"],
        {"test_fraction": 0.1},
        r"`test_fraction` does nothing with digits, whose classes and split are published: it goes",
    ),
    (["digits"], {"classes_are_folders": True}, r"`classes_are_folders` does nothing with digits"),
    (["digits"], {"workers": 2}, r"`workers`: the digits are built sooner than a worker starts"),
    (
        ["pets"],
        {"root": "r", "test_fraction": 0.1},
        r"`test_fraction` does nothing with pets, .*`split=train` or `split=test`",
    ),
    (["pets"], {"root": "r", "classes_are_folders": True}, r"`classes_are_folders` does nothing with pets"),
    (
        ["folder"],
        {"seed": 1},
        r"`seed=1`: nothing is drawn\. It goes with `test_fraction` or `folds`, or with `per_class`, ",
    ),
    (["folder"], {"seed": 0}, r"`seed=0`: nothing is drawn"),
    (["digits"], {"seed": 1}, r"`seed=1`: nothing is drawn"),
    (["pets"], {"root": "r", "seed": 1}, r"`seed=1`: nothing is drawn"),
    (["pets"], {"root": "r", "seed": 1, "list": "x"}, r"`seed=1`: nothing is drawn"),
    (
        ["folder"],
        {"quality": 80, "storage": "raw"},
        r"`quality=80`: the storage is raw, so no JPEG is encoded\. It goes with `storage=jpg`",
    ),
    (["folder"], {"quality": 90}, r"`quality=90`: this set is small and `storage=auto` keeps raw pixels"),
    (["digits"], {"quality": 90}, r"`quality=90`: this set is small"),
]


@pytest.mark.parametrize(("sources", "words", "message"), IDLE)
def test_an_argument_that_would_do_nothing_is_refused(tmp_path, sources, words, message):
    folder = class_folders(tmp_path / "folder", {"cat": 2, "dog": 2})
    sources = [str(folder) if name == "folder" else name for name in sources]
    with pytest.raises(UsageError, match=message):
        build(sources, out=str(tmp_path / "x.beton"), **words)
    assert not list(tmp_path.glob("*.beton"))


def test_on_the_command_line_messages_speak_of_flags(tmp_path, capsys):
    class_folders(tmp_path / "set/Training", {"a b": 1, "c": 1})
    class_folders(tmp_path / "set/Testing", {"a b": 1, "c": 1})
    out = ("--out", str(tmp_path / "x.beton"))
    said = {
        (): "Take one of them with --split Training. If they are classes all the same, say so with",
        ("--split", "val"): "there is no folder 'val' with images in it to take as --split;",
        ("--side", "0"): "--side 0: must be from 1 to 65535.",
        (
            "--seed",
            "1",
        ): "--seed 1: nothing is drawn. It goes with --test_fraction or --folds, or with --per_class",
        ("--root", "r"): "--root does nothing with folders, tars and zips: it goes with one published set",
    }
    for words, message in said.items():
        assert main(["data", "build", str(tmp_path / "set"), *out, *words]) in (2, 3)
        assert message in capsys.readouterr().err
    assert main(["data", "build", str(tmp_path / "set"), *out, "--split", "Training"]) == 0
    assert open_beton(tmp_path / "x.beton").manifest.classes == ("a b", "c")
    assert main(["data", "build", str(tmp_path / "set"), *out, "--classes_are_folders"]) == 0
    assert open_beton(tmp_path / "x.beton").manifest.classes == ("Testing", "Training")


def test_values_with_spaces_are_quoted_and_other_words_between_backticks_stay(tmp_path, capsys):
    class_folders(tmp_path / "set/my photos", {"a": 1, "b": 1})
    assert main(["data", "build", str(tmp_path / "set"), "--out", str(tmp_path / "x.beton")]) == 3
    assert "take it with --split 'my photos';" in capsys.readouterr().err
    with (
        pytest.raises(DataError, match="`pip install x` and `unknown` of --split and --side 3"),
        as_flags(data_build),
    ):
        raise DataError("`pip install x` and `unknown` of `split` and `side_px=3`")


def test_one_class_alone_is_said_plainly(tmp_path, capsys):
    build([str(class_folders(tmp_path / "set", {"cat": 2}))], out=str(tmp_path / "x.beton"))
    printed = capsys.readouterr().out
    assert "one class alone, cat: enough to pretrain on, but there is nothing to tell it from" in printed


def test_very_unequal_classes_are_said_and_equal_ones_not(tmp_path, capsys):
    out = str(tmp_path / "x.beton")
    build([str(class_folders(tmp_path / "set", {"cat": 30, "dog": 3, "eel": 9}))], out=out)
    printed = capsys.readouterr().out
    assert "very unequal classes: cat has 30 images, dog 3. Top-1 says little then: look at" in printed
    build([str(class_folders(tmp_path / "more", {"cat": 9, "dog": 3}))], out=out)
    assert "unequal classes" not in capsys.readouterr().out


def test_a_table_of_labels_is_said_as_it_was_read_and_the_sum_counts_what_has_no_label(tmp_path, capsys):
    source = write_folder(tmp_path / "set", {f"{i}.png": png(i) for i in range(4)})
    (tmp_path / "l.csv").write_text("file;label\n0;a\n1;b\n2;\n")
    build([str(source)], out=str(tmp_path / "x.beton"), labels=str(tmp_path / "l.csv"))
    printed = capsys.readouterr().out
    assert "x.beton: 3 images, 2 classes, 1 without a label, raw" in printed
    assert "l.csv: labels from column 'label', files from column 'file', 3 rows, read as utf-8" in printed
    assert info(str(tmp_path / "x.beton"))["images_per_class"] == [1, 1]
    assert "unlabelled" in capsys.readouterr().out


def test_many_classes_are_shown_by_their_largest_and_smallest(tmp_path, capsys):
    files = {f"c{i:02d}/{j}.png": png(1) for i in range(45) for j in range(1 + (i == 7))}
    build([str(write_folder(tmp_path / "set", files))], out=str(tmp_path / "x.beton"))
    capsys.readouterr()
    info(str(tmp_path / "x.beton"))
    printed = capsys.readouterr().out
    assert "c07" in printed and "… 5 classes between (all of them with --json) …" in printed


def test_everything_that_is_written_obeys_the_umask(tmp_path, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "imagenet", make_imagenet_folders(tmp_path / "root"))
    for mask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            build(
                ["imagenet"], out=str(tmp_path / f"{mask}/x.beton"), root=str(tmp_path / "root"), per_class=1
            )
        finally:
            os.umask(before)
        written = list((tmp_path / f"{mask}").iterdir())
        assert len(written) == 5 and {path.stat().st_mode & 0o777 for path in written} == {mode}


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
    build([str(write_folder(tmp_path / "flat", {"1.png": png(1)}))], out=str(tmp_path / "x.beton"), side=20)
    info(str(tmp_path / "x.beton"))
    printed = capsys.readouterr().out
    assert "none (no labels)" in printed and "short side reduced to 20" in printed


def test_every_image_is_listed_with_its_number_class_and_photograph(built, capsys):
    capsys.readouterr()
    rows = list_images(str(built))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0\tcat\tcat/000.jpg" and lines[4] == "4\tdog\tdog/001.jpg" and len(lines) == 5
    assert list_images(str(built), as_json=True) == rows
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"file": str(built), "images": rows}
    assert rows[3] == {"index": 3, "class": "dog", "name": "dog/000.jpg"}


def test_images_without_label_and_name_are_listed_with_dashes(tmp_path, capsys):
    source = write_folder(tmp_path / "flat", {"1.png": png(1)})
    build_beton([source], tmp_path / "x.beton", no_names=True)
    assert main(["data", "list", str(tmp_path / "x.beton")]) == 0
    assert capsys.readouterr().out == "0\t-\t-\n"


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
        match=r"x\.beton: 1 of 5 images cannot be decoded, by index: 2 \(cat/002\.jpg: .*the JPEG data are",
    ):
        verify(str(built), as_json=True)
    verdict = json.loads(capsys.readouterr().out)
    assert list(verdict["undecodable"]) == ["2"] and verdict["names"] == {"2": "cat/002.jpg"}


def test_verify_names_both_hashes_of_changed_content(built):
    with built.open("r+b") as content:
        place = content.read().index(b"\xff\xdb") + 5  # a number of a quantisation table: another picture
        content.seek(place)
        number = content.read(1)[0]
        content.seek(place)
        content.write(bytes([number + 1]))
    with pytest.raises(
        DataError,
        match=r"x\.beton: the content is not what was built: sha256:\w+, the manifest says sha256:\w+\.",
    ):
        verify(str(built))
