"""ImageNet (ILSVRC 2012) from class folders, or in place from the publisher's archives: nothing is unpacked.

The training archive is a tar of one tar a class, both plain, so an image lies at a known byte of the outer
file. The validation images are numbered; their classes stand in the development kit. Classes are WordNet ids,
in sorted order, as everywhere.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

from scipy.io import loadmat

from vitds.data.archives import list_members
from vitds.data.findings import Findings
from vitds.data.sources import ImageSet, SourceOptions, scan_sources
from vitds.data.trees import SourceImage

TRAIN_TAR, VAL_TAR, DEVKIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)


def gather_imagenet(root: Path, split: str, download: bool, findings: Findings) -> ImageSet:
    """One split, train or test (the validation images).

    Raises: DataError, OSError, KeyError if files are missing or damaged.
    """
    folder = root / ("train" if split == "train" else "val")
    if folder.is_dir():
        with tempfile.TemporaryDirectory() as workspace:
            images = scan_sources(
                [folder], findings, Path(workspace), SourceOptions(classes_are_folders=True)
            )
        return ImageSet(images.images, images.classes, (str(root),), split)
    found = (
        _train_in_place(root / TRAIN_TAR)
        if split == "train"
        else _val_in_place(root / VAL_TAR, root / DEVKIT)
    )
    found.sort(key=lambda image: (image.class_name, image.member))
    return ImageSet(found, tuple(sorted({image.class_name for image in found})), (str(root),), split)


def _train_in_place(archive: Path) -> list[SourceImage]:
    images = []
    for inner in list_members(archive):
        wnid = inner.name.removesuffix(".tar")
        for member in list_members(archive, inner.offset):
            name = f"{wnid}/{member.name}"
            images.append(
                SourceImage(f"{archive}:{name}", name, wnid, str(archive), member.offset, member.size)
            )
    return images


def _val_in_place(archive: Path, devkit: Path) -> list[SourceImage]:
    wnids = _val_wnids(devkit)
    images = []
    for member in list_members(archive):
        # ILSVRC2012_val_00000001.JPEG is the first line of the ground truth.
        wnid = wnids[int(member.name.removesuffix(".JPEG").rsplit("_", 1)[1]) - 1]
        images.append(
            SourceImage(
                f"{archive}:{member.name}",
                f"{wnid}/{member.name}",
                wnid,
                str(archive),
                member.offset,
                member.size,
            )
        )
    return images


def _val_wnids(devkit: Path) -> list[str]:
    """The WordNet id of each validation image, in the order of their numbers."""
    with tarfile.open(devkit) as tar:
        inside = {member.name.rsplit("/", 1)[-1]: member for member in tar if member.isreg()}
        synsets = loadmat(io.BytesIO(tar.extractfile(inside["meta.mat"]).read()), squeeze_me=True)["synsets"]
        truth = tar.extractfile(inside["ILSVRC2012_validation_ground_truth.txt"]).read().split()
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return [wnid_of[int(number)] for number in truth]
