"""From what a person names (folders, tars) to a sorted list of images with class names. None is decoded.

A folder or tar holds class folders (the first folder below it is an image's class, as in torchvision's
ImageFolder) or, flat, images without labels. The same tree gives the same set from either. Several sources
make one set: classes are joined by name. The order, which decides the instance numbers, is by class name,
then by path within the source, then by source.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitds.data.archives import TAR_SUFFIXES, Member, read_archive
from vitds.data.findings import LEFT_BEHIND, OTHER_FILE, PART_NAME, Findings, shown
from vitds.data.folders import Parts, is_left_behind, require_classes
from vitds.data.formats import HEAD_BYTES, IMAGE_SUFFIXES, format_of
from vitds.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class SourceImage:
    """Where one image lies: a file, a piece of a file (a tar's member), or pixels in memory.

    Attributes:
        name: what a person is shown.
        member: its path below its source, with / on every system.
        class_name: None where there are no labels.
        path: the file.
        offset: where its bytes begin in the file.
        size: how many they are; -1 for all of the file.
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
    """A set before it is decoded.

    Attributes:
        images: in instance order.
        classes: their names in label order; () without labels.
        sources: where the images come from.
        split: which part of the sources they are, if a part was taken.
    """

    images: list[SourceImage]
    classes: tuple[str, ...]
    sources: tuple[str, ...]
    split: str | None = None


@dataclass(frozen=True)
class SourceTree:
    """One source before labels: its image files and its folders, by path below the source's root."""

    files: dict[Parts, SourceImage]
    folders: frozenset[Parts]


def read_tree(source: Path, findings: Findings, workspace: Path) -> list[SourceImage]:
    """All images of one source by the order of their paths, whatever folders they lie in; none has a class.

    Args:
        source: a folder or tar.
        findings: gets what was odd.
        workspace: as for scan_sources.
    Raises: DataError if the source is missing, of no such kind, damaged or without images.
    """
    return [image for _, image in sorted(_read_source(source, findings, workspace).files.items())]


def scan_sources(
    sources: Sequence[str | Path],
    findings: Findings,
    workspace: Path,
    split: str | None = None,
    classes_are_folders: bool = False,
) -> ImageSet:
    """All images of the sources, joined and sorted; without labels where the sources are flat.

    Args:
        sources: folders or tars.
        findings: gets what was odd.
        workspace: a folder that the caller removes; a compressed tar is unpacked into it, as one tar.
        split: take only the folder of this name, or path, in each source (train, images/train), or in each
            class folder.
        classes_are_folders: take the first folders of each source as classes, whatever they look like.
    Raises: DataError if a source is missing, neither folder nor tar, a damaged tar, without images or without
        that split, if its folders look like splits or like a wrapper, or if flat and class-folder sources are
        mixed (names the source).
    """
    found: list[tuple[str, Parts, int, SourceImage]] = []
    flat: dict[bool, str | Path] = {}
    for number, source in enumerate(sources):
        tree = _take_images(
            _read_source(Path(source), findings, workspace), Path(source), split, classes_are_folders
        )
        if not classes_are_folders:
            for folder in require_classes(tree.files, Path(source), split):
                findings.add(PART_NAME, f"{source}/{folder}")
        images = _label(tree, Path(source), findings)
        flat.setdefault(next(iter(images.values())).class_name is None, source)
        found += [(image.class_name or "", parts, number, image) for parts, image in images.items()]
    if not found:
        raise DataError(
            "no source was given. Name a folder of class folders, a folder of images, a tar, or digits."
        )
    if len(flat) == 2:
        raise DataError(
            f"{flat[True]} holds images without class folders, {flat[False]} class folders. Build them as "
            "two files."
        )
    found.sort(key=lambda row: row[:3])
    classes = () if True in flat else tuple(sorted({row[0] for row in found}))
    return ImageSet(
        [row[3] for row in found], classes, tuple(shown(str(source)) for source in sources), split
    )


def _read_source(source: Path, findings: Findings, workspace: Path) -> SourceTree:
    if not source.exists():
        raise DataError(f"{source}: there is no such folder or tar. Check the path.")
    if source.is_dir():
        tree = _read_folder(source, findings)
    elif source.name.lower().endswith(TAR_SUFFIXES):
        tree = _read_tar(source, findings, workspace)
    else:
        raise DataError(
            f"{source}: neither a folder nor a tar ({' '.join(TAR_SUFFIXES)}). Unpack it, or put the images "
            "into a folder."
        )
    if not tree.files:
        others = findings.counts.get(OTHER_FILE, 0)
        tail = f" {others} files are none, for example {findings.names[OTHER_FILE][0]}." if others else ""
        raise DataError(f"{source}: there are no images.{tail}")
    return tree


def _take_images(tree: SourceTree, source: Path, split: str | None, classes_are_folders: bool) -> SourceTree:
    """The part of a source whose first folders are the classes."""
    name = Path(os.path.abspath(source)).name
    if not source.is_dir():
        name = next(name[: -len(suffix)] for suffix in TAR_SUFFIXES if name.lower().endswith(suffix))
    if split is not None:
        tree = _take_split(tree, split, source)
        name = split.rsplit("/", 1)[-1]
    # `tar cf cats.tar cats`, or cats/cats: a folder of the source's own name around everything is the source.
    while all(len(parts) > 1 and parts[0].casefold() == name.casefold() for parts in tree.files):
        if classes_are_folders and all(len(parts) == 2 for parts in tree.files):
            break
        tree = _below(tree, next(iter(tree.files))[0])
    return tree


def _label(tree: SourceTree, source: Path, findings: Findings) -> dict[Parts, SourceImage]:
    """Class names from the first folder; none where no image lies in a folder."""
    tops = {parts[0] for parts in tree.files if len(parts) > 1}
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
    """SPLIT/..., below folders that are around everything; a path of such; or CLASS/SPLIT/... as CLASS/..."""
    for name in split.split("/"):
        while (
            name not in _tops(tree) and len(_tops(tree)) == 1 and all(len(parts) > 2 for parts in tree.files)
        ):
            tree = _below(tree, next(iter(tree.files))[0])
        within = {p: image for p, image in tree.files.items() if len(p) > 2 and p[1] == name}
        if name in _tops(tree):
            tree = _below(tree, name)
        elif within:
            tree = SourceTree({(p[0], *p[2:]): image for p, image in within.items()}, frozenset())
        else:
            some = ", ".join(shown(top) for top in _tops(tree)[:5]) or "no folders"
            raise DataError(
                f"{source}: there is no folder {split!r} with images in it to take as `split`; there are "
                f"{some}."
            )
    return tree


def _tops(tree: SourceTree) -> list[str]:
    return sorted({parts[0] for parts in tree.files if len(parts) > 1})


def _below(tree: SourceTree, top: str) -> SourceTree:
    files = {parts[1:]: image for parts, image in tree.files.items() if parts[0] == top and len(parts) > 1}
    return SourceTree(
        files, frozenset(parts[1:] for parts in tree.folders if parts[0] == top and len(parts) > 1)
    )


def _keep(name: str, read_head: Callable[[], bytes], findings: Findings, where: str) -> bool:
    """True for an image by its name, else by its first bytes; other files are counted."""
    try:
        is_image = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or format_of(read_head()) is not None
    except OSError as error:
        findings.add("unreadable", f"{where} ({error.strerror})")
        return False
    if not is_image:
        findings.add(OTHER_FILE, where)
    return is_image


def _read_tar(source: Path, findings: Findings, workspace: Path) -> SourceTree:
    path, members = read_archive(source, workspace)
    files: dict[Parts, SourceImage] = {}
    folders: set[Parts] = set()
    left_behind: set[Parts] = set()
    links: dict[Parts, Member] = {}
    with path.open("rb") as file:
        for member in members:
            parts, where = PurePosixPath(member.name).parts, f"{source}:{member.name}"
            odd = next((parts[: i + 1] for i, part in enumerate(parts) if is_left_behind(part)), ())
            if odd and (odd != parts or member.kind == "folder"):
                left_behind.add(odd)
            if odd or not parts:
                continue
            if member.kind == "folder":
                folders.add(parts)
            elif member.name.startswith("/") or ".." in parts:
                findings.add("archive_outside", where)
            elif member.kind == "link":
                links[parts] = member
            elif member.kind == "sparse":
                findings.add("unreadable", where)
            elif member.kind == "file" and _keep(parts[-1], partial(_head, file, member), findings, where):
                files[parts] = SourceImage(shown(where), "", None, str(path), member.offset, member.size)
    for parts, link in links.items():  # as in a folder, a link to an image is one more image
        where = f"{source}:{link.name}"
        if target := files.get(PurePosixPath(link.target).parts):
            files[parts] = replace(target, name=shown(where))
        else:
            findings.add("archive_link", where)
    for parts in sorted(left_behind):
        findings.add(LEFT_BEHIND, f"{source}:{'/'.join(parts)}")
    return SourceTree(files, frozenset(folders))


def _head(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(min(HEAD_BYTES, member.size))


def _read_folder(source: Path, findings: Findings) -> SourceTree:
    root = os.path.realpath(source)
    files: dict[Parts, SourceImage] = {}
    folders: set[Parts] = set()
    open_folders: list[tuple[Parts, str, frozenset[str]]] = [((), str(source), frozenset({root}))]
    while open_folders:
        parts, folder, above = open_folders.pop()
        for entry in _list(folder, findings):
            inner = (*parts, entry.name)
            if is_left_behind(entry.name):
                if entry.is_dir():
                    findings.add(LEFT_BEHIND, entry.path)
                continue
            if entry.is_symlink() and not _check_link(entry, root, above, findings):
                continue
            if entry.is_dir():
                folders.add(inner)
                open_folders.append((inner, entry.path, above | {os.path.realpath(entry.path)}))
            elif entry.is_file() and _keep(entry.name, partial(_file_head, entry.path), findings, entry.path):
                files[inner] = SourceImage(shown(entry.path), "", None, entry.path)
    return SourceTree(files, frozenset(folders))


def _file_head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


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
