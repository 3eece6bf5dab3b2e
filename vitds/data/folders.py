"""Which folders of a source are classes: not those that systems leave behind, nor splits, nor wrappers.

What is certain is done and counted; what only looks so is asked about, by an error that names both answers.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vitds.data.findings import shown
from vitds.errors import DataError

Parts = tuple[str, ...]  # a path below a source, folder by folder

# Of macOS, Synology, QNAP, Windows, Android, Linux, Python: thumbnails, waste paper, rescued pieces.
LEFT_BEHIND = frozenset(
    "__macosx @eadir @synoresource #recycle #snapshot @recycle @recently-snapshot @sharebin @tmp ~snapshot"
    " $recycle.bin lost.dir lost+found found.000 __pycache__".split()
) | {"system volume information", "network trash folder", "temporary items"}

TRAIN_WORDS = frozenset("train training trainset trainval tr learn learning".split())
TEST_WORDS = frozenset(
    "test testing testset ts val valid validation valset dev eval evaluation pred predict prediction"
    " holdout".split()
)
SPLIT_WORDS = TRAIN_WORDS | TEST_WORDS
# Words for parts of a data set: a folder whose name has no other word is no class.
PART_WORDS = SPLIT_WORDS | frozenset(
    "set sets split splits fold folds part batch data dataset image images img imgs photo photos picture"
    " pictures pics jpg jpeg jpegs png jpegimages seg segmentation mask masks label labels annotation"
    " annotations trimaps labeled labelled unlabeled unlabelled query gallery thumbs thumbnails".split()
)
NAMES_SHOWN = 5


def is_left_behind(name: str) -> bool:
    """Whether a file or folder is a system's, not a person's: .DS_Store, ._1.jpg, @eaDir, lost+found."""
    return (name.startswith(".") and name != "..") or name.lower() in LEFT_BEHIND


def require_classes(paths: Iterable[Parts], source: Path, below: str | None) -> list[str]:
    """Check that the first folders of a source can be classes.

    Args:
        paths: of all images, below the source or below the split that was taken of it.
        source: for the message.
        below: the split that was taken, for the message.
    Returns: the folders among others that alone are named like a part of a data set: `test` beside `cat` and
        `dog` may be a class or not, as `train` beside `bus` and `tram`.
    Raises: DataError if they look like splits or parts of a data set, or if one folder is wrapped around all
        others (names the folders and both ways on).
    """
    paths = list(paths)
    inner: dict[str, set[Parts]] = {}  # first folder -> the folders in it that hold images
    for parts in paths:
        if len(parts) > 1:
            inner.setdefault(parts[0], set()).add(parts[1:-1])
    tops = sorted(inner)
    if not tops:
        return []
    if len(tops) == 1 and inner[tops[0]] != {()}:
        wrapper = os.path.commonprefix([parts[:-1] for parts in paths if len(parts) > 1])
        raise DataError(
            f"{source}: one folder, {shown('/'.join(wrapper))}, is around all others. If those in it are the "
            f"classes, take it with `split={_below(below, '/'.join(wrapper))}`; if {shown(tops[0])} is one "
            "class, say so with `classes_are_folders=True`."
        )
    way_on = "If they are classes all the same, say so with `classes_are_folders=True`."
    if _are_splits(tops) or all(_is_part(top) for top in tops):
        raise DataError(
            f"{source}: its folders look like parts of a data set, not classes: {_listed(tops)}. Take one of "
            f"them with `split={_below(below, _first(tops))}`. {way_on}"
        )
    shared = Counter(folder for folders in inner.values() for folder in folders if folder)
    repeated = {folder[0] for folder, count in shared.items() if count > 1}
    if sum(count > 1 for count in shared.values()) > 1:
        # CLASS/train/1.jpg, or train/CLASS/1.jpg under whatever names.
        chosen = _first(sorted(repeated)) if _are_splits(repeated) else _below(below, tops[0])
        raise DataError(
            f"{source}: its folders {_listed(tops)} hold folders of the same names ({_listed(repeated)}), as "
            f"splits do. Take one of them with `split={chosen}`. {way_on}"
        )
    return [top for top in tops if _is_part(top)]


def _words(name: str) -> list[str]:
    """trainImages_2017 -> train, images."""
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _is_part(name: str) -> bool:
    words = _words(name)
    return bool(words) and PART_WORDS.issuperset(words)


def _are_splits(names: Iterable[str]) -> bool:
    """Whether last words speak of training and of testing: Training and Testing, seg_train and seg_pred."""
    last = {word for name in names for word in _words(name)[-1:]}
    return bool(last & TRAIN_WORDS and last & TEST_WORDS)


def _first(names: list[str]) -> str:
    """The one to offer: that of training, if a name says so."""
    return next((name for name in names if TRAIN_WORDS.intersection(_words(name))), names[0])


def _below(above: str | None, name: str) -> str:
    return shown(f"{above}/{name}" if above else name)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(shown(name) for name in names[:NAMES_SHOWN]) + ", …" * (len(names) > NAMES_SHOWN)
