"""A small set out of a large one: a function of the seed, kept as a list of files that can
be given back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from vitds.data.sources import ImageSet
from vitds.errors import DataError, UsageError
from vitds.rng import LARGEST_SEED, Purpose, permutation

Item = TypeVar("Item")
CLASSES, IMAGES, POOL = 1, 2, 3  # the second part of the draws' keys: what is drawn


@dataclass(frozen=True)
class Sample:
    """Which images of a set are taken; all where nothing is set.

    Attributes:
        classes: so many classes, drawn first.
        per_class: so many images of each class.
        total: so many images of all together, whatever their class.
        seed: of these draws, which are uniform and without repeats.
        list: a file that names the images, one a line, in place of the draws.
    Raises: UsageError if a number is below 1, or a seed out of range, or two of them exclude each other.
    """

    classes: int | None = None
    per_class: int | None = None
    total: int | None = None
    seed: int = 0
    list: str | Path | None = None

    def __post_init__(self) -> None:
        numbers = {"classes": self.classes, "per_class": self.per_class, "total": self.total}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UsageError(f"`{name}={value}`: must be at least 1.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UsageError(f"`seed={self.seed}`: must be from 0 to {LARGEST_SEED}.")
        if self.per_class and self.total:
            raise UsageError(
                "`per_class` and `total` exclude each other: both say how many images are taken."
            )
        if self.list and any(numbers.values()):
            raise UsageError(
                "`list` names the images, so `classes`, `per_class` and `total` have nothing to draw. Leave "
                "them out."
            )

    @property
    def is_everything(self) -> bool:
        return not (self.list or self.classes or self.per_class or self.total)


def draw_sample(images: ImageSet, sample: Sample) -> ImageSet:
    """The chosen images in the order of the whole set, and the classes that they are of.

    Raises: DataError if a class or the set has fewer images than are asked for, or the list names an image
        that is not in the set.
    """
    if sample.list:
        members = _read_list(images, Path(sample.list))
        chosen = [i for i, image in enumerate(images.images) if image.member in members]
    else:
        images = draw_classes(images, sample)
        chosen = draw_images(images, range(len(images.images)), sample)
    taken = replace(images, images=[images.images[i] for i in chosen])
    return keep_classes(taken, {image.class_name for image in taken.images})


def draw_classes(images: ImageSet, sample: Sample) -> ImageSet:
    """The images of so many classes as the sample says, and those without a label.

    Raises: DataError if there are fewer classes.
    """
    if not sample.classes:
        return images
    return keep_classes(
        images, {*_draw(images.classes, sample.classes, "classes", sample.seed, CLASSES), None}
    )


def draw_images(images: ImageSet, among: Sequence[int], sample: Sample) -> list[int]:
    """So many images of each class, or of all together, as the sample says.

    Args:
        among: the positions in the set that may be drawn.
    Returns: positions in ascending order. With `per_class` images without a label beside labelled ones are
        all kept.
    Raises: DataError if there are fewer.
    """
    chosen = list(among)
    if sample.per_class:
        by_class: dict[str | None, list[int]] = {}
        for i in chosen:
            by_class.setdefault(images.images[i].class_name, []).append(i)
        chosen = by_class.pop(None, []) if images.classes else []
        for i, (name, own) in enumerate(by_class.items()):
            chosen += _draw(own, sample.per_class, f"images of {name}", sample.seed, IMAGES, i)
    if sample.total:
        chosen = _draw(chosen, sample.total, "images", sample.seed, POOL)
    return sorted(chosen)


def keep_classes(images: ImageSet, classes: Collection[str | None]) -> ImageSet:
    """Only the images of these classes; the classes keep their order."""
    kept = tuple(name for name in images.classes if name in classes)
    return replace(
        images, images=[image for image in images.images if image.class_name in classes], classes=kept
    )


def write_list(images: ImageSet, path: Path) -> None:
    """The members of a set, one a line, as `list` takes them."""
    path.write_text("".join(f"{image.member}\n" for image in images.images), encoding="utf-8")


def _draw(population: Sequence[Item], count: int, what: str, *key: int) -> list[Item]:
    if count > len(population):
        raise DataError(f"{count} {what} are asked for, there are {len(population)}. Ask for fewer.")
    return [population[i] for i in permutation(len(population), Purpose.SPLIT, *key)[:count]]


def _read_list(images: ImageSet, path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`list={path}`: cannot be read ({error}).") from None
    wanted = {line.strip() for line in lines if line.strip()}
    missing = sorted(wanted - {image.member for image in images.images})
    if missing or not wanted:
        what = (
            f"{len(missing)} of its {len(wanted)} images are not in the set, first {missing[0]}"
            if missing
            else "it names no image"
        )
        raise DataError(f"`list={path}`: {what}. Give a list that a build of this set and split has written.")
    return wanted
