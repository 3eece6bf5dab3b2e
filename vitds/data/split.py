"""Which images of a set are for training and which for the test: the same share of each class, whole groups,
by draws that are functions of the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitds.data.findings import TEST_GROUP, Findings
from vitds.data.sources import ImageSet
from vitds.errors import DataError
from vitds.rng import Purpose, permutation

GROUPS, FOLDS = 4, 5  # the second part of the draws' keys; sampling.py has 1 to 3


@dataclass(frozen=True)
class Part:
    """The images that go into one file, as positions in the set.

    Attributes:
        out: the file.
        chosen: in ascending order.
        split: what the manifest calls it.
    """

    out: Path
    chosen: Sequence[int]
    split: str | None


def with_suffix(out: Path, half: str) -> Path:
    """F.beton -> F-train.beton or F-test.beton."""
    return out.with_name(f"{out.stem}-{half}{out.suffix}")


def split_once(images: ImageSet, out: Path, fraction: float, seed: int, findings: Findings) -> list[Part]:
    """F-train and F-test: a share of each class, at least one image, never all; of groups, the nearest to it.

    Images without a label beside labelled ones are all for training, unless their group is for the test.

    Args:
        findings: gets the classes of a single image, or of one side; a share that groups did not allow; the
            images without a label that go to the test file.
    Raises: DataError if nothing would be left for one of the two.
    """
    labels, groups = _labels(images), _groups(images)
    if groups is None:
        test = _draw_share(images, labels, fraction, seed, findings)
        if not test:
            raise DataError(
                f"{out}: no class has two images, so `test_fraction` finds none for the test file. Leave it "
                "out."
            )
    else:
        dealt = _deal(labels, groups, [fraction, 1 - fraction], GROUPS, seed)
        test = set(np.flatnonzero(dealt == 0).tolist())
        _note_uneven(images, labels, dealt == 0, fraction, findings)
        _note_test_groups(images, labels, dealt == 0, findings)
        if not test or len(test) == len(labels):
            raise DataError(
                f"{out}: the images are of {groups.max() + 1} groups, of which none can go to the test file "
                f"alone. A share of {fraction:g} needs more and smaller groups: another `group`, or none."
            )
    return _halves(out, test, len(labels), "")


def split_folds(images: ImageSet, out: Path, folds: int, seed: int, findings: Findings) -> list[list[Part]]:
    """F-fold1-train and F-fold1-test, and so on: each labelled image is in the test file of one fold.

    Args:
        findings: gets the classes that are too small to be in every test file, and the images without a
            label that are in one.
    Raises: DataError if there are fewer images or groups than folds.
    """
    labels = _labels(images)
    groups = _groups(images)
    units = np.arange(len(labels)) if groups is None else groups
    count = len(np.unique(units[labels >= 0]))
    if count < folds:
        raise DataError(
            f"{out}: `folds={folds}` needs as many {'images' if groups is None else 'groups'}, there are "
            f"{count}."
        )
    dealt = _deal(labels, units, [1 / folds] * folds, FOLDS, seed)
    for label, name in enumerate(images.classes):
        if len(set(dealt[labels == label].tolist())) < folds:
            findings.add("fold_lacks", name)
    _note_test_groups(images, labels, dealt >= 0, findings)
    tests = (set(np.flatnonzero(dealt == fold).tolist()) for fold in range(folds))
    return [_halves(out, test, len(labels), f"fold{fold + 1}-") for fold, test in enumerate(tests)]


def _halves(out: Path, test: set[int], images: int, prefix: str) -> list[Part]:
    halves = {"train": [i for i in range(images) if i not in test], "test": sorted(test)}
    return [
        Part(with_suffix(out, f"{prefix}{half}"), chosen, f"{prefix}{half}")
        for half, chosen in halves.items()
    ]


def _note_uneven(
    images: ImageSet,
    labels: NDArray[np.int64],
    is_test: NDArray[np.bool_],
    fraction: float,
    findings: Findings,
) -> None:
    for label, name in enumerate(images.classes):
        if len(set(is_test[labels == label].tolist())) == 1:
            findings.add("one_sided", name)
    share = is_test[labels >= 0].mean()
    if abs(share - fraction) > fraction / 2:
        findings.add("share_missed", f"{share:.1%} of the labelled images in place of {fraction:.1%}")


def _note_test_groups(
    images: ImageSet, labels: NDArray[np.int64], is_test: NDArray[np.bool_], findings: Findings
) -> None:
    for i in np.flatnonzero(is_test & (labels < 0)):
        findings.add(TEST_GROUP, images.images[i].name)


def _labels(images: ImageSet) -> NDArray[np.int64]:
    """(N,) of the set; where no image has a class they are one class, else -1 stands for none."""
    label_of = {name: label for label, name in enumerate(images.classes)}
    if not images.classes:
        return np.zeros(len(images.images), np.int64)
    return np.array([label_of.get(image.class_name, -1) for image in images.images])


def _groups(images: ImageSet) -> NDArray[np.int64] | None:
    """(N,) numbers of groups, in order of appearance; an image of none has its own. None without any."""
    if all(image.group is None for image in images.images):
        return None
    numbers: dict[object, int] = {}
    keys = (image.group if image.group is not None else i for i, image in enumerate(images.images))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _draw_share(
    images: ImageSet, labels: NDArray[np.int64], fraction: float, seed: int, findings: Findings
) -> set[int]:
    test: set[int] = set()
    for label in range(max(1, len(images.classes))):
        own = np.flatnonzero(labels == label)
        if not len(own):
            continue
        count = min(max(1, round(len(own) * fraction)), len(own) - 1)
        if not count:
            findings.add("single", images.classes[label] if images.classes else images.sources[0])
        # Seed 0 keeps the key that the draw had before there was a seed. A set without classes had label -1.
        key = (label if images.classes else -1, *([seed] if seed else []))
        test.update(own[permutation(len(own), Purpose.SPLIT, *key)[:count]].tolist())
    return test


def _deal(
    labels: NDArray[np.int64], groups: NDArray[np.int64], shares: Sequence[float], *key: int
) -> NDArray[np.int64]:
    """(N,) for each image the part that its group goes to; -1 for groups without any label.

    The largest groups come first, those of one size in a drawn order. Each goes where it brings the parts
    nearest to their shares of every class and of the whole.

    Args:
        labels: (N,), -1 for none.
        groups: (N,) numbers from 0.
        shares: of each part; they add up to 1.
        key: of the draw.
    """
    members: list[list[int]] = [[] for _ in range(int(groups.max()) + 1)]
    for i in np.flatnonzero(labels >= 0):
        members[groups[i]].append(int(i))
    sizes = np.array([len(own) for own in members])
    totals = np.append(np.bincount(labels[labels >= 0]), (labels >= 0).sum())  # of each class, and of all
    lack_PC = np.outer(shares, totals)  # what each part still lacks
    part_of = np.full(len(members), -1)
    drawn = np.argsort(permutation(len(members), Purpose.SPLIT, *key))
    for group in np.lexsort((drawn, -sizes)):
        if not sizes[group]:
            continue
        classes, counts = np.unique(labels[members[group]], return_counts=True)
        columns, counts = np.append(classes, len(totals) - 1), np.append(counts, sizes[group])
        lack = lack_PC[:, columns]
        # By how much the squared lacks shrink, each in relation to the size of its class.
        gain = ((2 * lack - counts) * counts / np.maximum(totals[columns], 1)).sum(axis=1)
        part_of[group] = int(np.argmax(gain))
        lack_PC[part_of[group], columns] -= counts
    return part_of[groups]
