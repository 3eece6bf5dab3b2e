"""Which folders are classes: the same from a folder, a tar and a zip, and what only looks like classes is
asked about.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from tests.data.images import write_folder
from vitds.data.findings import Findings
from vitds.data.sources import SourceOptions, scan_sources
from vitds.errors import DataError


def tree(*folders: str) -> dict[str, bytes]:
    """Two images in each folder."""
    return {f"{folder}/{name}.jpg": b"" for folder in folders for name in "ab"}


@pytest.fixture(params=["folder", "tar", "tar of its content", "zip"])
def scan(request, tmp_path: Path):
    """scan(files, **options) -> (members, classes, findings), from a folder, from a tar or zip of it, or
    from a tar of what is in it.
    """

    def scan_it(files: dict[str, bytes], name: str = "office", **options: object):
        source = write_folder(tmp_path / name, files)
        if request.param == "zip":
            source = Path(shutil.make_archive(str(source), "zip", tmp_path, name))
        elif request.param != "folder":
            with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
                tar.add(source, arcname=name if request.param == "tar" else ".")
            source = tmp_path / f"{name}.tar"
        findings = Findings()
        images = scan_sources([source], findings, tmp_path, SourceOptions(**options))
        return [image.member for image in images.images], images.classes, findings

    return scan_it


LEFT_BEHIND = [
    "@eaDir",
    "__MACOSX",
    ".thumbnails",
    "lost+found",
    ".ipynb_checkpoints",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    ".Trash-1000",
    "@Recycle",
    "LOST.DIR",
    "__pycache__",
]


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_a_folder_that_a_system_left_behind_is_no_class_and_holds_no_images(scan, name):
    members, classes, findings = scan(tree("cat", "dog", name, f"dog/{name}"))
    assert members == ["cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg"] and classes == ("cat", "dog")
    assert findings.counts == {"left_behind": 2}
    assert all(each.endswith(name) for each in findings.names["left_behind"])


def test_names_that_only_resemble_those_of_systems_are_classes(scan):
    assert scan(tree("@home", "lost", "recycled"))[1] == ("@home", "lost", "recycled")


SPLITS = {
    "Training Testing": ("Training/glioma", "Training/tumour", "Testing/glioma", "Testing/tumour"),
    "train val pred": ("train/cat", "val/cat", "pred"),
    "train test, flat": ("train", "test"),
    "TRAIN alone": ("TRAIN/cat", "TRAIN/dog"),
    "seg_train seg_test": ("seg_train/a", "seg_test/a", "seg_pred"),
    "imagesTr imagesTs": ("imagesTr", "imagesTs"),
    "train2017 val2017": ("train2017", "val2017"),
    "trainset testset and more": ("trainset/cat", "testset/cat", "readme_pictures"),
    "images and masks": ("images", "masks"),
    "JPEGImages alone": ("JPEGImages",),
    "folds": ("fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"),
    "splits in another language": (
        "Entrenamiento/gato",
        "Entrenamiento/perro",
        "Prueba/gato",
        "Prueba/perro",
    ),
    "domains": ("amazon/images/bike", "amazon/images/mug", "dslr/images/bike", "dslr/images/mug"),
    "splits within classes": ("cat/train", "cat/test", "dog/train", "dog/test"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_folders_that_look_like_splits_are_asked_about_with_both_ways_on(scan, case):
    with pytest.raises(DataError, match=r"office.*: .*`split=.+`.*`classes_are_folders=True`"):
        scan(tree(*SPLITS[case]))


@pytest.mark.parametrize("case", [case for case in SPLITS if "alone" not in case])
def test_folders_that_look_like_splits_are_classes_if_a_person_says_so(scan, case):
    tops = {folder.split("/")[0] for folder in SPLITS[case]}
    assert set(scan(tree(*SPLITS[case]), classes_are_folders=True)[1]) == tops


@pytest.mark.parametrize(
    ("case", "split", "classes"),
    [
        ("Training Testing", "Training", ("glioma", "tumour")),
        ("domains", "amazon/images", ("bike", "mug")),
        ("folds", "fold2", ("cat", "dog")),
        ("splits within classes", "train", ("cat", "dog")),
        ("JPEGImages alone", "JPEGImages", ()),
    ],
)
def test_the_split_that_the_message_offers_settles_it(scan, case, split, classes):
    members, found, _ = scan(tree(*SPLITS[case]), split=split)
    assert found == classes and len(members) == 2 * max(1, len(classes))


CLASSES = {
    "a class called train": ("bus", "train", "tram"),
    "two words": ("test tube", "train station", "tower"),
    "numbers": ("0", "1"),
    "one folder of one name in each": ("n01/images", "n02/images"),
    "folders of their own": ("cat/tabby", "cat/siamese", "dog/poodle"),
    "with and without": ("mask", "no_mask"),
    "another script": ("训练", "测试"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_ordinary_classes_are_not_asked_about(scan, case):
    assert set(scan(tree(*CLASSES[case]))[1]) == {folder.split("/")[0] for folder in CLASSES[case]}


@pytest.mark.parametrize("name", ["test", "thumbnails", "unlabeled", "train"])
def test_a_class_named_like_a_part_of_a_data_set_among_others_is_built_and_named(scan, name):
    _, classes, findings = scan(tree("cat", "dog", name))
    assert classes == ("cat", "dog", name)
    assert list(findings.counts) == ["part_name"] and findings.names["part_name"][0].endswith(f"/{name}")
    assert scan(tree("cat", "dog", name), name="sure", classes_are_folders=True)[2].counts == {}


WRAPPED = tree("images/bike", "images/pack")


def test_a_folder_around_the_class_folders_is_asked_about_with_both_ways_on(scan):
    message = (
        r"office.*: one folder, images, is around all others.*`split=images`.*`classes_are_folders=True`"
    )
    with pytest.raises(DataError, match=message):
        scan(WRAPPED)
    assert scan(WRAPPED, split="images")[1] == ("bike", "pack")
    assert scan(WRAPPED, classes_are_folders=True)[1] == ("images",)


def test_several_folders_around_the_class_folders_are_offered_as_one_path(scan):
    with pytest.raises(DataError, match=r"`split=data/images`"):
        scan(tree("data/images/bike", "data/images/pack"))
    assert scan(tree("data/images/bike", "data/images/pack"), split="data/images")[1] == ("bike", "pack")


def test_an_image_beside_the_folder_around_all_others_changes_nothing(scan):
    with pytest.raises(DataError, match="one folder, images, is around all others"):
        scan({**WRAPPED, "sample.jpg": b""})


def test_a_folder_of_the_sources_own_name_around_everything_is_the_source(scan):
    assert scan(tree("office/bike", "office/pack"))[:2] == scan(tree("bike", "pack"), name="office2")[:2]
    assert scan(tree("flat"), name="flat")[1] == ()


def test_one_class_is_a_class(scan):
    assert scan(tree("cat"))[1] == ("cat",)
