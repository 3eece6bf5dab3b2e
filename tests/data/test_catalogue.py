"""Published sets read from small stand-ins laid out as their publishers ship them; the real counts stand in
the catalogue.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision import datasets

from tests.data.images import class_folders, jpeg, photo, write_folder, write_tar
from vitds.data.archives import list_members
from vitds.data.catalogue import CATALOGUE, TRAIN_AND_VAL, Lookalike, NamedSet, _cifar, _listed, load_named
from vitds.data.findings import Findings
from vitds.data.images import read_bytes
from vitds.errors import DataError, UsageError


class SmallFlowers(datasets.Flowers102):
    """Without the check sums of the published label files."""

    _file_dict = {name: (file, None) for name, (file, _) in datasets.Flowers102._file_dict.items()}
    classes = datasets.Flowers102.classes[:3]
    _download_url_prefix = "http://127.0.0.1:9/"


class SmallCifar(datasets.CIFAR10):
    """Without check sums, and with one batch."""

    train_list, test_list = [["data_batch_1", None]], [["test_batch", None]]
    meta = {**datasets.CIFAR10.meta, "md5": None}


def small(name: str, train: int, test: int, classes: int, gather: Callable | None = None) -> NamedSet:
    entry = CATALOGUE[name]
    return replace(
        entry, counts={"train": train, "test": test}, classes=classes, gather=gather or entry.gather
    )


def make_flowers(root: Path) -> NamedSet:
    base = root / "flowers-102"
    write_folder(base / "jpg", {f"image_{i:05d}.jpg": jpeg(i) for i in range(1, 7)})
    savemat(base / "imagelabels.mat", {"labels": [2, 1, 1, 1, 2, 3]})
    savemat(base / "setid.mat", {"trnid": [5, 3], "valid": [1, 4], "tstid": [2, 6]})
    return small("flowers102", 4, 2, 3, partial(_listed, SmallFlowers, TRAIN_AND_VAL))


def make_pets(root: Path) -> NamedSet:
    base = root / "oxford-iiit-pet"
    write_folder(
        base / "images",
        {f"{name}.jpg": jpeg(1) for name in ("Abyssinian_2", "Abyssinian_1", "great_dane_9", "great_dane_3")},
    )
    trainval, test = (
        b"Abyssinian_2 1 1 1\nAbyssinian_1 1 1 1\ngreat_dane_9 2 2 1\n",
        b"Abyssinian_1 1 1 1\ngreat_dane_3 2 2 1\n",
    )
    write_folder(base / "annotations", {"trainval.txt": trainval, "test.txt": test})
    return small("pets", 3, 2, 2)


def make_dtd(root: Path) -> NamedSet:
    base = root / "dtd" / "dtd"
    write_folder(
        base / "images",
        {f"{name}/{name}_{i}.jpg": jpeg(i) for name in ("banded", "dotted") for i in range(3)},
    )
    rows = {
        f"{split}1.txt": f"banded/banded_{i}.jpg\ndotted/dotted_{i}.jpg\n".encode()
        for i, split in enumerate(("train", "val", "test"))
    }
    write_folder(base / "labels", rows)
    return small("dtd", 4, 2, 2)


def make_aircraft(root: Path) -> NamedSet:
    base = root / "fgvc-aircraft-2013b" / "data"
    write_folder(base / "images", {f"{i:07d}.jpg": jpeg(i) for i in range(5)})
    lists = {
        "variants.txt": b"707-320\nF-16A/B\n",
        "images_variant_trainval.txt": b"0000004 F-16A/B\n0000000 707-320\n0000001 707-320\n",
        "images_variant_test.txt": b"0000002 F-16A/B\n0000003 707-320\n",
    }
    write_folder(base, lists)
    return small("aircraft", 3, 2, 2)


def make_cars(root: Path) -> NamedSet:
    base = root / "stanford_cars"
    kind = [("fname", object), ("class", np.uint8)]
    write_folder(
        base,
        {
            f"cars_{split}/{i:05d}.jpg": jpeg(i)
            for split, count in (("train", 3), ("test", 2))
            for i in range(count)
        },
    )
    (base / "devkit").mkdir()
    savemat(
        base / "devkit" / "cars_meta.mat",
        {"class_names": np.array(["AM General Hummer", "Acura RL"], object)},
    )
    train = np.array([("00000.jpg", 2), ("00001.jpg", 1), ("00002.jpg", 1)], kind)
    savemat(base / "devkit" / "cars_train_annos.mat", {"annotations": train})
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": train[:2]})
    return small("cars", 3, 2, 2)


def make_cub200(root: Path) -> NamedSet:
    base = root / "CUB_200_2011"
    paths = ["001.Albatross/a_1.jpg", "001.Albatross/a_2.jpg", "002.Auk/u 1.jpg", "002.Auk/u_2.jpg"]
    write_folder(base / "images", {path: jpeg(i) for i, path in enumerate(paths)})
    tables = {
        "images": "".join(f"{i} {path}\n" for i, path in enumerate(paths, 1)),
        "image_class_labels": "1 1\n2 1\n3 2\n4 2\n",
        "classes": "1 001.Albatross\n2 002.Auk\n",
        "train_test_split": "1 1\n2 0\n3 1\n4 1\n",
    }
    write_folder(base, {f"{name}.txt": text.encode() for name, text in tables.items()})
    return small("cub200", 3, 1, 2)


def make_indoor67(root: Path) -> NamedSet:
    write_folder(root / "Images", {f"{name}/{i}.jpg": jpeg(i) for name in ("attic", "bar") for i in range(3)})
    write_folder(
        root,
        {
            "TrainImages.txt": b"bar/0.jpg\r\nattic/1.jpg\r\nattic/0.jpg\r\n",
            "TestImages.txt": b"attic/2.jpg\nbar/2.jpg\n",
        },
    )
    return small("indoor67", 3, 2, 2)


def make_cifar10(root: Path) -> NamedSet:
    base = root / "cifar-10-batches-py"
    planes = np.stack([photo(i, 32, 32).transpose(2, 0, 1).reshape(-1) for i in range(4)])
    batches = {
        "data_batch_1": {"data": planes, "labels": [1, 0, 1, 0]},
        "test_batch": {"data": planes[:2], "labels": [0, 1]},
        "batches.meta": {"label_names": ["cat", "dog"]},
    }
    write_folder(base, {name: pickle.dumps(content) for name, content in batches.items()})
    return small("cifar10", 4, 2, 2, partial(_cifar, SmallCifar))


WNIDS = ("n01440764", "n01443537")


def make_imagenet_folders(root: Path) -> NamedSet:
    class_folders(root / "train", {WNIDS[0]: 2, WNIDS[1]: 1})
    class_folders(root / "val", {WNIDS[0]: 1, WNIDS[1]: 1})
    return small("imagenet", 3, 2, 2)


def make_imagenet_archives(root: Path) -> NamedSet:
    """As published: a tar of tars, numbered validation images, and a development kit that numbers synsets in
    another order.
    """
    root.mkdir(exist_ok=True)
    inner = {}
    for wnid, count in ((WNIDS[1], 1), (WNIDS[0], 2)):
        packed = write_tar(root / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": jpeg(i) for i in range(count)})
        inner[packed.name] = packed.read_bytes()
        packed.unlink()
    write_tar(root / "ILSVRC2012_img_train.tar", inner)
    write_tar(
        root / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_0000000{i}.JPEG": jpeg(9 + i) for i in (2, 1)}
    )
    meta = io.BytesIO()
    kind = [("ILSVRC2012_ID", np.uint16), ("WNID", object), ("words", object), ("num_children", np.uint16)]
    savemat(
        meta,
        {
            "synsets": np.array(
                [(1, WNIDS[1], "goldfish", 0), (2, WNIDS[0], "tench", 0), (3, "n00000000", "fish", 2)], kind
            )
        },
    )
    kit = "ILSVRC2012_devkit_t12/data"
    files = {f"{kit}/meta.mat": meta.getvalue(), f"{kit}/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n"}
    write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", files, "w:gz")
    return small("imagenet", 3, 2, 2)


EXPECTED = {
    make_flowers: (
        [
            ("pink primrose", "image_00003"),
            ("pink primrose", "image_00004"),
            ("hard-leaved pocket orchid", "image_00001"),
            ("hard-leaved pocket orchid", "image_00005"),
        ],
        [("pink primrose", "image_00002"), ("canterbury bells", "image_00006")],
    ),
    make_pets: (
        [("Abyssinian", "Abyssinian_1"), ("Abyssinian", "Abyssinian_2"), ("Great Dane", "great_dane_9")],
        [("Abyssinian", "Abyssinian_1"), ("Great Dane", "great_dane_3")],
    ),
    make_dtd: (
        [("banded", "banded_0"), ("banded", "banded_1"), ("dotted", "dotted_0"), ("dotted", "dotted_1")],
        [("banded", "banded_2"), ("dotted", "dotted_2")],
    ),
    make_aircraft: (
        [("707-320", "0000000"), ("707-320", "0000001"), ("F-16A/B", "0000004")],
        [("707-320", "0000003"), ("F-16A/B", "0000002")],
    ),
    make_cars: (
        [("AM General Hummer", "00001"), ("AM General Hummer", "00002"), ("Acura RL", "00000")],
        [("AM General Hummer", "00001"), ("Acura RL", "00000")],
    ),
    make_cub200: (
        [("001.Albatross", "a_1"), ("002.Auk", "u 1"), ("002.Auk", "u_2")],
        [("001.Albatross", "a_2")],
    ),
    make_indoor67: ([("attic", "0"), ("attic", "1"), ("bar", "0")], [("attic", "2"), ("bar", "2")]),
    make_cifar10: ([("cat", "1"), ("cat", "3"), ("dog", "0"), ("dog", "2")], [("cat", "0"), ("dog", "1")]),
    make_imagenet_folders: (
        [(WNIDS[0], "000"), (WNIDS[0], "001"), (WNIDS[1], "000")],
        [(WNIDS[0], "000"), (WNIDS[1], "000")],
    ),
    make_imagenet_archives: (
        [(WNIDS[0], f"{WNIDS[0]}_0"), (WNIDS[0], f"{WNIDS[0]}_1"), (WNIDS[1], f"{WNIDS[1]}_0")],
        [(WNIDS[0], "ILSVRC2012_val_00000002"), (WNIDS[1], "ILSVRC2012_val_00000001")],
    ),
}


def name_of(make: Callable) -> str:
    return make.__name__.removeprefix("make_").split("_")[0].replace("flowers", "flowers102")


def stem(member: str) -> str:
    return member.rsplit("/", 1)[-1].rsplit(".", 1)[0]


@pytest.mark.parametrize("make", EXPECTED)
def test_a_set_is_read_as_its_publisher_ships_it(tmp_path, make):
    entry = make(tmp_path)
    for split, expected in zip(("train", "test"), EXPECTED[make], strict=True):
        images = load_named(name_of(make), tmp_path, split, Findings(), entry=entry)
        assert [(image.class_name, stem(image.member)) for image in images.images] == expected
        assert images.split == split and len(images.classes) == entry.classes
        assert [images.classes.index(image.class_name) for image in images.images] == sorted(
            images.classes.index(image.class_name) for image in images.images
        )


def test_train_and_test_number_the_classes_alike(tmp_path):
    for make in EXPECTED:
        entry = make(tmp_path / make.__name__)
        both = [
            load_named(name_of(make), tmp_path / make.__name__, split, Findings(), entry=entry).classes
            for split in entry.counts
        ]
        assert both[0] == both[1]


def test_images_in_imagenets_archives_are_read_in_place(tmp_path):
    entry = make_imagenet_archives(tmp_path)
    train = load_named("imagenet", tmp_path, "train", Findings(), entry=entry)
    assert [read_bytes(image) for image in train.images] == [jpeg(0), jpeg(1), jpeg(0)]
    test = load_named("imagenet", tmp_path, "test", Findings(), entry=entry)
    assert [read_bytes(image) for image in test.images] == [jpeg(11), jpeg(10)]


def test_pixels_of_cifar_are_those_of_its_planes(tmp_path):
    images = load_named("cifar10", tmp_path, "train", Findings(), entry=make_cifar10(tmp_path)).images
    assert [np.array_equal(image.pixels, photo(int(image.member), 32, 32)) for image in images] == [True] * 4


def test_published_counts_are_those_of_the_publishers():
    assert {name: (*entry.counts.values(), entry.classes) for name, entry in CATALOGUE.items()} == {
        "flowers102": (2040, 6149, 102),
        "pets": (3680, 3669, 37),
        "dtd": (3760, 1880, 47),
        "aircraft": (6667, 3333, 100),
        "cars": (8144, 8041, 196),
        "cub200": (5994, 5794, 200),
        "indoor67": (5360, 1340, 67),
        "cifar10": (50000, 10000, 10),
        "cifar100": (50000, 10000, 100),
        "imagenet": (1281167, 50000, 1000),
    }


def test_missing_files_are_named(tmp_path):
    entry = make_dtd(tmp_path)
    (tmp_path / "dtd/dtd/images/dotted/dotted_1.jpg").unlink()
    with pytest.raises(DataError) as caught:
        load_named("dtd", tmp_path, "train", Findings(), entry=entry)
    assert (
        "split train has 3 images of 2 classes, published are 4 of 2. 1 files of its lists are missing: "
        in str(caught.value)
    )
    assert "dotted_1.jpg. Fetch or unpack dtd/dtd/images/ and dtd/dtd/labels/ again." in str(caught.value)


def test_class_folders_that_are_not_full_are_named(tmp_path):
    entry = make_imagenet_folders(tmp_path)
    (tmp_path / "train" / WNIDS[0] / "000.jpg").unlink()
    with pytest.raises(
        DataError,
        match=r"split train has 2 images of 2 classes, published are 3 of 2\. Smallest classes: n01440764",
    ):
        load_named("imagenet", tmp_path, "train", Findings(), entry=entry)


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_empty_root_is_told_what_has_to_lie_there(tmp_path, name):
    with pytest.raises(DataError) as caught:
        load_named(name, tmp_path, "train", Findings())
    assert str(caught.value).startswith(f"{name}: {tmp_path}: ")
    assert str(caught.value).endswith(f"Under `root` there must be {CATALOGUE[name].files}.")


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"`split=val`: pets has train and test\."):
        load_named("pets", tmp_path, "val", Findings())


def test_a_download_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(
        UsageError,
        match=r"`download`: cars cannot be fetched by a program\. Put stanford_cars/cars_train/.* by hand",
    ):
        load_named("cars", tmp_path, "train", Findings(), download=True)


def test_a_download_that_fails_is_an_error_with_the_reason(tmp_path):
    entry = small("flowers102", 1, 1, 1, partial(_listed, SmallFlowers, TRAIN_AND_VAL))
    with pytest.raises(
        DataError, match=r"flowers102: .*Connection refused.*Under `root` there must be flowers-102/jpg/"
    ):
        load_named("flowers102", tmp_path, "train", Findings(), download=True, entry=entry)


KAGGLE = {
    "train/1/a.jpg": b"",
    "train/2/b.jpg": b"",
    "train/2/c.jpg": b"",
    "valid/1/d.jpg": b"",
    "test/e.jpg": b"",
    "test/f.jpg": b"",
}


@pytest.mark.parametrize("where", ["", "flower_data", "flowers-102/jpg"])
def test_the_kaggle_copy_of_flowers_is_recognised_with_the_consequence(tmp_path, where):
    write_folder(tmp_path / where, KAGGLE)
    real = CATALOGUE["flowers102"].lookalikes[0]
    assert real.counts == (6552, 818, 819)
    entry = replace(CATALOGUE["flowers102"], lookalikes=(replace(real, counts=(3, 1, 2)),))
    with pytest.raises(
        DataError,
        match=r"this is the Kaggle copy of Flowers-102 \(6,552 / 818 / 819 images\), not .*not comparable",
    ):
        load_named("flowers102", tmp_path, "train", Findings(), entry=entry)


@pytest.mark.parametrize(
    "files",
    [[f"jpg/image_{i:04d}.jpg" for i in range(1360)], [f"{c}/{i}.jpg" for c in range(17) for i in range(80)]],
)
def test_the_seventeen_class_flowers_are_recognised(tmp_path, files):
    write_folder(tmp_path / "17flowers", dict.fromkeys(files, b""))
    with pytest.raises(
        DataError, match=r"this is the 17-class Flowers set \(1,360 images\), another data set"
    ):
        load_named("flowers102", tmp_path, "train", Findings())


def test_flowers_with_wrong_counts_are_checked_for_lookalikes_too(tmp_path):
    entry = replace(
        make_flowers(tmp_path), counts={"train": 9, "test": 2}, lookalikes=(Lookalike((6,), "six flowers."),)
    )
    with pytest.raises(
        DataError,
        match=r"flowers102: .*: this is six flowers\. Put flowers-102/jpg/.* under `root`, or build",
    ):
        load_named("flowers102", tmp_path, "train", Findings(), entry=entry)


def test_a_tar_within_a_tar_is_listed_by_places_in_the_outer_file(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", {"a": b"1" * 700, "b": b"2"}).read_bytes()
    outer = write_tar(tmp_path / "outer.tar", {"before": b"x" * 5000, "inner.tar": inner, "after": b"y"})
    place = {member.name: member for member in list_members(outer)}["inner.tar"]
    data = outer.read_bytes()
    assert [data[m.offset : m.offset + m.size] for m in list_members(outer, place.offset)] == [
        b"1" * 700,
        b"2",
    ]
    with tarfile.open(outer) as tar:
        assert tar.getnames() == ["before", "inner.tar", "after"]
