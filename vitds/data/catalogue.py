"""Data sets by name, read as their publishers ship them, in their published splits, their counts checked.

Through torchvision's data set classes where it has one (their folder names and check sums apply);
CUB-200-2011 and MIT Indoor-67 from the publishers' lists; ImageNet from class folders or, in place, from the
publisher's two tars. Instance order: by class in label order, then by path.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scipy.io.matlab import MatReadError
from torchvision import datasets

from vitds.data.findings import Findings
from vitds.data.formats import IMAGE_SUFFIXES
from vitds.data.imagenet import gather_imagenet
from vitds.data.sources import ImageSet
from vitds.data.trees import SourceImage
from vitds.errors import DataError, UsageError

Halves = dict[str, tuple[str, ...]]
TRAIN_AND_VAL: Halves = {"train": ("train", "val"), "test": ("test",)}
TRAINVAL: Halves = {"train": ("trainval",), "test": ("test",)}
AS_NAMED: Halves = {"train": ("train",), "test": ("test",)}
# What torchvision, SciPy, tarfile and open() raise at files that are missing, damaged, or something else.
UNREADABLE = (
    RuntimeError,
    ValueError,
    LookupError,
    OSError,
    EOFError,
    MatReadError,
    tarfile.TarError,
    zlib.error,
)


@dataclass(frozen=True)
class Lookalike:
    """Another set that goes by the same name.

    Attributes:
        counts: how many images its folders hold.
        what: what it is, and what using it would mean.
    """

    counts: tuple[int, ...]
    what: str


@dataclass(frozen=True)
class NamedSet:
    """One entry of the catalogue.

    Attributes:
        classes: how many.
        counts: images of train and test.
        files: what has to lie under `root`.
        can_download: whether torchvision knows where to fetch it.
        gather: (root, split, download, findings) -> the set.
        lookalikes: sets mistaken for it.
    """

    classes: int
    counts: dict[str, int]
    files: str
    can_download: bool
    gather: Callable[[Path, str, bool, Findings], ImageSet]
    lookalikes: tuple[Lookalike, ...] = ()


def load_named(
    name: str,
    root: str | Path,
    split: str,
    findings: Findings,
    *,
    download: bool = False,
    entry: NamedSet | None = None,
) -> ImageSet:
    """The images of one split of a set in the catalogue, every one of them there.

    Args:
        split: train or test (ImageNet's test is its published validation set).
        download: fetch it first, where torchvision can.
        entry: in place of the catalogue's.
    Raises: UsageError for an unknown split, or a download that does not exist. DataError if files are
        missing, the counts are not the published ones, or it is another set of that name (names the files,
        the counts and the consequence).
    """
    entry = entry or CATALOGUE[name]
    root = Path(root)
    if split not in entry.counts:
        raise UsageError(f"`split={split}`: {name} has {' and '.join(entry.counts)}.")
    if download and not entry.can_download:
        raise UsageError(
            f"`download`: {name} cannot be fetched by a program. Put {entry.files} under {root} by hand."
        )
    try:
        images = entry.gather(root, split, download, findings)
    except UNREADABLE as error:
        _refuse_lookalikes(name, root, entry)
        raise DataError(f"{name}: {root}: {error}. Under `root` there must be {entry.files}.") from None
    missing = [image.name for image in images.images if image.path and not os.path.exists(image.path)]
    found = len(images.images) - len(missing)
    if (found, len(images.classes)) != (entry.counts[split], entry.classes):
        _refuse_lookalikes(name, root, entry)
        gone = (
            f" {len(missing)} files of its lists are missing: "
            f"{', '.join(missing[:5])}{', …' * (len(missing) > 5)}."
            if missing
            else ""
        )
        raise DataError(
            f"{name}: {root}: split {split} has {found} images of {len(images.classes)} classes, published "
            f"are {entry.counts[split]} of "
            f"{entry.classes}.{gone or ' Smallest classes: ' + _smallest(images) + '.'} Fetch or unpack "
            f"{entry.files} again."
        )
    return images


def _smallest(images: ImageSet) -> str:
    counts = Counter(image.class_name for image in images.images)
    return ", ".join(
        f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: (item[1], item[0]))[:5]
    )


def _refuse_lookalikes(name: str, root: Path, entry: NamedSet) -> None:
    if not entry.lookalikes or not root.is_dir():
        return
    tops = _image_counts(root)
    while len(tops) == 1 and next(iter(tops)):  # a folder around everything
        root = root / next(iter(tops))
        tops = _image_counts(root)
    for other in entry.lookalikes:
        if sorted(tops.values()) == sorted(other.counts):
            raise DataError(
                f"{name}: {root}: this is {other.what} Put {entry.files} under `root`, or build this one as "
                "a plain folder."
            )


def _image_counts(root: Path) -> Counter[str]:
    """How many images lie in each folder of `root`, all the way down; those beside the folders under ""."""
    counts: Counter[str] = Counter()
    for folder, _, files in os.walk(root):
        top = next(iter(Path(folder).relative_to(root).parts), "")
        counts[top] += sum(os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES for file in files)
    return +counts


def _in_order(
    rows: Iterable[tuple[str, str, int]], classes: tuple[str, ...], source: str, split: str
) -> ImageSet:
    """(path, member, label) rows as a set."""
    images = [
        SourceImage(path, member, classes[label], path)
        for path, member, label in sorted(rows, key=lambda row: (row[2], row[1]))
    ]
    return ImageSet(images, classes, (source,), split)


def _path_itself(path: str | Path) -> str:
    """In place of torchvision's loader: we want to know where an image lies, not to decode it."""
    return str(path)


def _listed(
    dataset: type, halves: Halves, root: Path, split: str, download: bool, findings: Findings
) -> ImageSet:
    """torchvision's classes that list files: the halves of them that make up a split."""
    rows = []
    classes = ()
    for half in halves[split]:
        listed = dataset(root, split=half, download=download, loader=_path_itself)
        classes = tuple(listed.classes)
        rows += [
            (path, os.path.relpath(path, root), label)
            for path, label in (listed[i] for i in range(len(listed)))
        ]
    return _in_order(rows, classes, str(root), split)


def _pets(dataset: type, root: Path, split: str, download: bool, findings: Findings) -> ImageSet:
    pets = dataset(root, split=TRAINVAL[split][0], download=download)
    # Its only public way to a path is through decoding the image.
    rows = [
        (str(path), os.path.relpath(path, root), label)
        for path, label in zip(pets._images, pets._labels, strict=True)
    ]
    return _in_order(rows, tuple(pets.classes), str(root), split)


def _cifar(dataset: type, root: Path, split: str, download: bool, findings: Findings) -> ImageSet:
    cifar = dataset(root, train=split == "train", download=download)
    order = sorted(range(len(cifar.data)), key=lambda i: cifar.targets[i])
    name = dataset.base_folder
    images = [
        SourceImage(f"{name}:{split}:{i}", str(i), cifar.classes[cifar.targets[i]], pixels=cifar.data[i])
        for i in order
    ]
    return ImageSet(images, tuple(cifar.classes), (str(root),), split)


def _cub200(root: Path, split: str, download: bool, findings: Findings) -> ImageSet:
    """CUB-200-2011: numbered tables of images, their labels, classes, and whether each is for training."""
    base = root / "CUB_200_2011"
    tables = {name: dict(line.split(maxsplit=1) for line in _lines(base / f"{name}.txt")) for name in
              ("images", "image_class_labels", "classes", "train_test_split")}  # fmt: skip
    classes = tuple(name for _, name in sorted(tables["classes"].items(), key=lambda item: int(item[0])))
    wanted = "1" if split == "train" else "0"
    rows = [
        (str(base / "images" / path), path, int(tables["image_class_labels"][number]) - 1)
        for number, path in tables["images"].items()
        if tables["train_test_split"][number] == wanted
    ]
    return _in_order(rows, classes, str(root), split)


def _indoor67(root: Path, split: str, download: bool, findings: Findings) -> ImageSet:
    """MIT Indoor-67: class folders in Images, and a list of paths below it for each split."""
    paths = _lines(root / ("TrainImages.txt" if split == "train" else "TestImages.txt"))
    classes = tuple(sorted({path.split("/")[0] for path in paths}))
    rows = [(str(root / "Images" / path), path, classes.index(path.split("/")[0])) for path in paths]
    return _in_order(rows, classes, str(root), split)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


KAGGLE_FLOWERS = Lookalike(
    (6552, 818, 819),
    "the Kaggle copy of Flowers-102 (6,552 / 818 / 819 images), not the published split (2,040 / 6,149): it "
    "trains on three times as many images, so its accuracies, near 97 % from scratch, are not comparable.",
)
FLOWERS_17 = tuple(
    Lookalike(
        counts,
        "the 17-class Flowers set (1,360 images), another data set: accuracies on it say nothing about "
        "Flowers-102.",
    )
    for counts in ((1360,), (80,) * 17)
)

CATALOGUE = {
    "flowers102": NamedSet(
        102,
        {"train": 2040, "test": 6149},
        "flowers-102/jpg/, flowers-102/imagelabels.mat and flowers-102/setid.mat",
        True,
        partial(_listed, datasets.Flowers102, TRAIN_AND_VAL),
        (KAGGLE_FLOWERS, *FLOWERS_17),
    ),
    "pets": NamedSet(
        37,
        {"train": 3680, "test": 3669},
        "oxford-iiit-pet/images/ and oxford-iiit-pet/annotations/",
        True,
        partial(_pets, datasets.OxfordIIITPet),
    ),
    "dtd": NamedSet(
        47,
        {"train": 3760, "test": 1880},
        "dtd/dtd/images/ and dtd/dtd/labels/",
        True,
        partial(_listed, datasets.DTD, TRAIN_AND_VAL),
    ),
    "aircraft": NamedSet(
        100,
        {"train": 6667, "test": 3333},
        "fgvc-aircraft-2013b/data/",
        True,
        partial(_listed, datasets.FGVCAircraft, TRAINVAL),
    ),
    "cars": NamedSet(
        196,
        {"train": 8144, "test": 8041},
        "stanford_cars/cars_train/, stanford_cars/cars_test/, stanford_cars/devkit/ and "
        "stanford_cars/cars_test_annos_withlabels.mat",
        False,
        partial(_listed, datasets.StanfordCars, AS_NAMED),
    ),
    "cub200": NamedSet(
        200,
        {"train": 5994, "test": 5794},
        "CUB_200_2011/ with images/, images.txt, image_class_labels.txt, classes.txt and "
        "train_test_split.txt",
        False,
        _cub200,
    ),
    "indoor67": NamedSet(
        67, {"train": 5360, "test": 1340}, "Images/, TrainImages.txt and TestImages.txt", False, _indoor67
    ),
    "cifar10": NamedSet(
        10, {"train": 50000, "test": 10000}, "cifar-10-batches-py/", True, partial(_cifar, datasets.CIFAR10)
    ),
    "cifar100": NamedSet(
        100, {"train": 50000, "test": 10000}, "cifar-100-python/", True, partial(_cifar, datasets.CIFAR100)
    ),
    "imagenet": NamedSet(
        1000,
        {"train": 1281167, "test": 50000},
        "train/ and val/ with 1,000 class folders each, or ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar "
        "and ILSVRC2012_devkit_t12.tar.gz",
        False,
        gather_imagenet,
    ),
}
