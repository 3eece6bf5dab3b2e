"""From what a person names (folders, tars) to a sorted list of images with class names. No image is opened here.

A folder or tar holds class folders (the first folder below it is an image's class, as in torchvision's ImageFolder) or, flat,
images without labels. Several sources make one set: classes are joined by name. The order, which decides the instance numbers, is
by class name, then by path within the source, then by source.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from vitds.data.archives import TAR_SUFFIXES, read_archive
from vitds.data.findings import OTHER_FILE, Findings, shown
from vitds.errors import DataError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split()
)  # fmt: skip
SPLIT_NAMES = frozenset("train val valid validation test training testing".split())


@dataclass(frozen=True, slots=True, eq=False)
class SourceImage:
    """Where one image lies: a file, a piece of a file (a tar's member), or pixels in memory.

    Attributes:
        name: what a person is shown. member: its path below its source, with / on every system.
        class_name: None where there are no labels.
        path: the file. offset, size: the piece of it; size -1 for all of it.
        pixels: (H, W, 3) uint8 in place of a file.
    """

    name: str
    member: str
    class_name: str | None
    path: str = ""
    offset: int = 0
    size: int = -1
    pixels: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images in instance order, the names of their classes in label order (() without labels), and where they come from."""

    images: list[SourceImage]
    classes: tuple[str, ...]
    sources: tuple[str, ...]
    split: str | None = None


@dataclass(frozen=True)
class SourceTree:
    """One source before labels: its image files and its folders, by path below the source's root."""

    files: dict[tuple[str, ...], SourceImage]
    folders: frozenset[tuple[str, ...]]


def scan_sources(
    sources: Sequence[str | Path], findings: Findings, workspace: Path, split: str | None = None
) -> ImageSet:
    """All images of the sources, joined and sorted; without labels where the sources are flat.

    Args:
        sources: folders or tars. A compressed tar is unpacked, as one tar, into `workspace`.
        findings: gets what was odd.
        split: take only the folder of this name in each source (train, val, ...).
    Raises: DataError if a source is missing, neither folder nor tar, a damaged tar, without images or without that split, or if
        flat and class-folder sources are mixed (names the source).
    """
    found: list[tuple[str, tuple[str, ...], int, SourceImage]] = []
    flat: dict[bool, str | Path] = {}
    for number, source in enumerate(sources):
        images = _read_source(Path(source), findings, workspace, split)
        flat.setdefault(next(iter(images.values())).class_name is None, source)
        found += [(image.class_name or "", parts, number, image) for parts, image in images.items()]
    if not found:
        raise DataError(
            "no source was given. Name a folder of class folders, a folder of images, a tar, or `digits`."
        )
    if len(flat) == 2:
        raise DataError(
            f"{flat[True]} holds images without class folders, {flat[False]} class folders. Build them as two files."
        )
    found.sort(key=lambda row: row[:3])
    classes = () if True in flat else tuple(sorted({row[0] for row in found}))
    return ImageSet(
        [row[3] for row in found], classes, tuple(shown(str(source)) for source in sources), split
    )


def _read_source(
    source: Path, findings: Findings, workspace: Path, split: str | None
) -> dict[tuple[str, ...], SourceImage]:
    if not source.exists():
        raise DataError(f"{source}: there is no such folder or tar. Check the path.")
    archive = not source.is_dir()
    if archive:
        if not source.name.lower().endswith(TAR_SUFFIXES):
            raise DataError(
                f"{source}: neither a folder nor a tar ({' '.join(TAR_SUFFIXES)}). Unpack it, or put the images into a folder."
            )
        tree = _read_tar(source, findings, workspace)
    else:
        tree = _read_folder(source, findings)
    if split is not None:
        tree = _take_split(tree, split, source)
    elif archive:
        while _has_wrapper(tree):
            tree = _below(tree, next(iter(tree.files))[0])
    if not tree.files:
        others = findings.counts.get(OTHER_FILE, 0)
        tail = (
            f" {others} files have other extensions, for example {findings.names[OTHER_FILE][0]}."
            if others
            else ""
        )
        raise DataError(f"{source}: there are no images ({' '.join(sorted(IMAGE_SUFFIXES))}).{tail}")
    return _label(tree, source, findings)


def _label(tree: SourceTree, source: Path, findings: Findings) -> dict[tuple[str, ...], SourceImage]:
    """Class names from the first folder; none where no image lies in a folder."""
    tops = {parts[0] for parts in tree.files if len(parts) > 1}
    if tops and tops <= SPLIT_NAMES and any(len(parts) > 2 for parts in tree.files):
        raise DataError(
            f"{source}: its folders {', '.join(sorted(tops))} look like splits, not classes. Choose one with --split."
        )
    images = {}
    for parts, image in tree.files.items():
        if tops and len(parts) == 1:
            findings.add("unlabelled", image.name)
            continue
        name = unicodedata.normalize("NFC", shown(parts[0])) if tops else None
        images[parts] = replace(image, class_name=name, member=shown("/".join(parts)))
    for parts in sorted(tree.folders if tops else ()):
        if len(parts) == 1 and parts[0] not in tops:
            findings.add("empty_class", f"{source}/{parts[0]}")
    return images


def _take_split(tree: SourceTree, split: str, source: Path) -> SourceTree:
    while split not in {parts[0] for parts in tree.files if len(parts) > 1} and _has_wrapper(tree):
        tree = _below(tree, next(iter(tree.files))[0])
    tops = sorted({parts[0] for parts in tree.files if len(parts) > 1})
    if split not in tops:
        some = ", ".join(shown(top) for top in tops[:5]) or "no folders"
        raise DataError(
            f"{source}: there is no folder {split!r} with images in it for --split; there are {some}."
        )
    return _below(tree, split)


def _has_wrapper(tree: SourceTree) -> bool:
    """True where one folder holds everything and has folders of images itself, as `tar cf x.tar folder` makes it."""
    return len({parts[0] for parts in tree.files}) == 1 and all(len(parts) > 2 for parts in tree.files)


def _below(tree: SourceTree, top: str) -> SourceTree:
    files = {parts[1:]: image for parts, image in tree.files.items() if parts[0] == top and len(parts) > 1}
    return SourceTree(
        files, frozenset(parts[1:] for parts in tree.folders if parts[0] == top and len(parts) > 1)
    )


def _is_hidden(parts: tuple[str, ...]) -> bool:
    """Passed over in silence: what systems leave behind in folders and archives (.DS_Store, ._1.jpg, __MACOSX)."""
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)


def _keep(name: str, findings: Findings, where: str) -> bool:
    """True for an image's name; other files are counted."""
    if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
        findings.add(OTHER_FILE, where)
        return False
    return True


def _read_tar(source: Path, findings: Findings, workspace: Path) -> SourceTree:
    path, members = read_archive(source, workspace)
    files, folders = {}, set()
    for member in members:
        parts, where = PurePosixPath(member.name).parts, f"{source}:{member.name}"
        if not parts or _is_hidden(parts):
            continue
        if member.kind == "folder":
            folders.add(parts)
        elif member.kind == "link":
            findings.add("archive_link", where)
        elif member.name.startswith("/") or ".." in parts:
            findings.add("archive_outside", where)
        elif member.kind == "sparse":
            findings.add("unreadable", where)
        elif member.kind == "file" and _keep(parts[-1], findings, where):
            files[parts] = SourceImage(shown(where), "", None, str(path), member.offset, member.size)
    return SourceTree(files, frozenset(folders))


def _read_folder(source: Path, findings: Findings) -> SourceTree:
    root = os.path.realpath(source)
    files: dict[tuple[str, ...], SourceImage] = {}
    folders: set[tuple[str, ...]] = set()
    open_folders: list[tuple[tuple[str, ...], str, frozenset[str]]] = [((), str(source), frozenset({root}))]
    while open_folders:
        parts, folder, above = open_folders.pop()
        for entry in _list(folder, findings):
            inner = (*parts, entry.name)
            if _is_hidden(inner[-1:]):
                continue
            if entry.is_symlink() and not _check_link(entry, root, above, findings):
                continue
            if entry.is_dir():
                folders.add(inner)
                open_folders.append((inner, entry.path, above | {os.path.realpath(entry.path)}))
            elif entry.is_file() and _keep(entry.name, findings, entry.path):
                files[inner] = SourceImage(shown(entry.path), "", None, entry.path)
    return SourceTree(files, frozenset(folders))


def _list(folder: str, findings: Findings) -> Iterable[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        findings.add("unreadable", f"{folder} ({error.strerror})")
        return ()


def _check_link(entry: os.DirEntry[str], root: str, above: frozenset[str], findings: Findings) -> bool:
    """True where a symbolic link can be followed; one that leads out of the source is followed and named."""
    real = os.path.realpath(entry.path)
    if not os.path.exists(real) or real in above:
        findings.add("dead_link", f"{entry.path} -> {os.readlink(entry.path)}")
        return False
    if os.path.commonpath((real, root)) != root:
        findings.add("link_outside", f"{entry.path} -> {os.readlink(entry.path)}")
    return True
