"""Several .beton files as one training set: --data a.beton --data b.beton. Nothing is copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vitds.data.beton import BetonFile, require_same_classes
from vitds.data.manifest import Manifest
from vitds.errors import DataError

COLUMNS = ("heights", "widths", "offsets", "sizes", "is_jpeg", "labels")


def join(files: Sequence[BetonFile]) -> BetonFile:
    """The images of all files, one file after the other; each file's bytes stay where they are.

    Files without classes may stand beside those with: their images have no label then.

    Args:
        files: one at least; labels are numbers of one class list.
    Returns: a file whose manifest speaks of all images; the one file itself if there is no other.
    Raises: DataError if two are the same, number their classes differently, or store images differently.
    """
    first, *others = files
    if not others:
        return first
    _check(files)
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(file, name) for file in files]) for name in COLUMNS
    }
    images = [file.images for file in files]
    arrays |= {"index": np.arange(sum(images)), "part": np.repeat(np.arange(len(files)), images)}
    for array in arrays.values():
        array.setflags(write=False)
    parts = tuple(file.path for file in files)
    return BetonFile(path=first.path, parts=parts, images=sum(images), manifest=_manifest(files), **arrays)


def joined_hash(hashes: Sequence[str]) -> str:
    """The content hash of several files as one set, from theirs; of one file its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _check(files: Sequence[BetonFile]) -> None:
    with_classes = [file for file in files if file.manifest.classes]
    for place, file in enumerate(files):
        before = files[:place]
        if same := [other for other in before if other.manifest.content_hash == file.manifest.content_hash]:
            raise DataError(f"{file.path} holds the same images as {same[0].path}; name one of them")
        ways = [(each.manifest.storage, each.manifest.side_px) for each in (files[0], file)]
        if ways[0] != ways[1]:
            said = [f"{storage}, {f'at most {px} px' if px else 'full size'}" for storage, px in ways]
            raise DataError(
                f"{file.path} stores its images otherwise ({said[1]}) than {files[0].path} ({said[0]}), and "
                "a trained run treats all images alike. Build both with one --storage and --side."
            )
        if file in with_classes[1:]:
            require_same_classes(with_classes[0], file)


def _manifest(files: Sequence[BetonFile]) -> Manifest:
    """Of all files: what holds for the set, and of what is one file's own the first one's."""
    manifests = [file.manifest for file in files]
    classes = next((each.classes for each in manifests if each.classes), ())
    counts = np.array([each.images for each in manifests], np.float64)
    means = np.array([each.mean for each in manifests])
    mean = counts @ means / counts.sum()
    # Of all pixels, taking images for equally large, as the two numbers are for a person to look at.
    squares = np.array([each.std for each in manifests]) ** 2 + means**2
    std = np.sqrt(np.maximum(counts @ squares / counts.sum() - mean**2, 0))
    has_names = all(each.names is not None for each in manifests)
    return replace(
        manifests[0],
        images=sum(each.images for each in manifests),
        file_bytes=sum(each.file_bytes for each in manifests),
        classes=classes,
        width_px=_range([each.width_px for each in manifests]),
        height_px=_range([each.height_px for each in manifests]),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        content_hash=joined_hash([each.content_hash for each in manifests]),
        sources=tuple(dict.fromkeys(source for each in manifests for source in each.sources)),
        findings={},
        unlabelled=sum(int((file.labels < 0).sum()) for file in files) if classes else 0,
        grouped=next((each.grouped for each in manifests if each.grouped), None),
        names="\n".join(each.names or "" for each in manifests) if has_names else None,
    )


def _range(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(low for low, _ in pairs), max(high for _, high in pairs)
