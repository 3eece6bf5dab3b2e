"""scikit-learn's bundled digits as a data set: 1,797 scans of 8 x 8 pixels, in a fixed, class-balanced split.

Each class gives half of its images, rounded down, to training (896) and the rest to test (901), by a keyed
draw that never changes. The scans' grey levels 0..16 become 0..255 by v · 255 / 16, rounded half up, the same
in the three channels.
Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; scikit-learn holds its
test part.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitds.data.beton import open_beton
from vitds.data.build import BuildOptions, build_set
from vitds.data.manifest import Manifest
from vitds.data.sources import ImageSet
from vitds.data.split import with_suffix
from vitds.data.trees import SourceImage
from vitds.errors import DataError, UsageError
from vitds.rng import Purpose, permutation

NAME = "digits"


def digit_images(split: str) -> ImageSet:
    """The images of one half, by class, then as they stand in scikit-learn's file.

    Raises: UsageError for a split that is not train or test.
    """
    if split not in ("train", "test"):
        raise UsageError(f"`split={split}`: the digits have train and test.")
    from sklearn.datasets import load_digits  # at the top it costs every start a second

    digits = load_digits()
    grey = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    images = []
    for label in range(10):
        own = np.flatnonzero(digits.target == label)
        order = permutation(len(own), Purpose.SPLIT, label)
        half = order[: len(own) // 2] if split == "train" else order[len(own) // 2 :]
        for i in own[np.sort(half)]:
            images.append(
                SourceImage(
                    f"{NAME}:{i}", str(i), str(label), pixels=np.repeat(grey[i][:, :, None], 3, axis=2)
                )
            )
    return ImageSet(images, tuple("0123456789"), (NAME,), split)


def build_digits(out: str | Path, *, split: str | None = None, **options: Any) -> list[tuple[Path, Manifest]]:
    """Build F.beton of one half, or F-train.beton and F-test.beton where no split is named.

    Else as build.build_beton.
    Raises: UsageError for an unknown split, for `test_fraction`, as the split is fixed, and for `workers`.
    """
    checked = BuildOptions(**options)
    if checked.test_fraction is not None:
        raise UsageError(
            "`test_fraction`: the digits have a fixed split. Leave it out, or choose a half with "
            "`split=train` or `split=test`."
        )
    if checked.workers is not None:
        raise UsageError("`workers`: the digits are built sooner than a worker starts. Leave it out.")
    checked = replace(checked, workers=1)
    halves = (
        {split: Path(out)} if split else {half: with_suffix(Path(out), half) for half in ("train", "test")}
    )
    return [built for half, path in halves.items() for built in build_set(digit_images(half), path, checked)]


def embedded_digits(folder: str | Path) -> tuple[Path, Path]:
    """The paths of digits-train.beton and -test.beton in `folder`, built unless sound ones are there.

    Several processes may call at once: each builds under a name of its own, and the bytes are the same.
    Raises: ResourceError if `folder` cannot be written.
    """
    train, test = (with_suffix(Path(folder) / f"{NAME}.beton", half) for half in ("train", "test"))
    try:
        open_beton(train), open_beton(test)
    except DataError:
        build_digits(Path(folder) / f"{NAME}.beton")
    return train, test
