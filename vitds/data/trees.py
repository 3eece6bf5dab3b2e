"""A folder, tar or zip as a tree: its image files and its folders, by path below it. Nothing is decoded.

The same tree comes of a folder and of an archive of it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitds.data.archives import TAR_SUFFIXES, Member, Packed, read_archive
from vitds.data.findings import LEFT_BEHIND, OTHER_FILE, Findings, shown
from vitds.data.folders import Parts, is_left_behind
from vitds.data.formats import HEAD_BYTES, IMAGE_SUFFIXES, format_of
from vitds.data.zips import MAX_MEMBER_BYTES, ZIP_SUFFIXES, list_zip
from vitds.errors import DataError

ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, *ZIP_SUFFIXES)
PACKED_HEAD_BYTES = 4096  # enough, deflated, for HEAD_BYTES
# Members of archives that are not read: the finding, and what is said of them.
NOT_READ = {
    "sparse": ("unreadable", "a sparse member"),
    "method_unknown": ("unreadable", "packed by a method that is not read here; make the zip again"),
    "bomb": ("too_large", f"unpacks to more than {MAX_MEMBER_BYTES >> 20:,} MiB"),
}


@dataclass(frozen=True, slots=True, eq=False)
class SourceImage:
    """Where one image lies: a file, a piece of a file (an archive's member), or pixels in memory.

    Attributes:
        name: what a person is shown.
        member: its path below its source, with / on every system.
        class_name: None where there are no labels.
        path: the file.
        offset: where its bytes begin in the file.
        size: how many they are; -1 for all of the file.
        packed: how a zip keeps them; None where they are the image's own.
        pixels: (H, W, 3) uint8 in place of a file.
        group: what it belongs to; images of one group go to one side of a split. None: to nothing.
    """

    name: str
    member: str
    class_name: str | None
    path: str = ""
    offset: int = 0
    size: int = -1
    packed: Packed | None = None
    pixels: NDArray[np.uint8] | None = None
    group: str | None = None


@dataclass(frozen=True)
class SourceTree:
    """One source before labels: its image files and its folders, by path below the source's root."""

    files: dict[Parts, SourceImage]
    folders: frozenset[Parts]


def read_source(source: Path, findings: Findings, workspace: Path) -> SourceTree:
    """The tree of one source.

    Raises: DataError if it is missing, neither folder nor archive, a damaged archive, or holds no image.
    """
    if not source.exists():
        raise DataError(f"{source}: there is no such folder, tar or zip. Check the path.")
    if source.is_dir():
        tree = _read_folder(source, findings)
    elif source.name.lower().endswith(ARCHIVE_SUFFIXES):
        tree = _read_archive(source, findings, workspace)
    else:
        raise DataError(
            f"{source}: neither a folder nor an archive ({' '.join(ARCHIVE_SUFFIXES)}). Unpack it, or put "
            "the images into a folder."
        )
    if not tree.files:
        others = findings.counts.get(OTHER_FILE, 0)
        tail = f" {others} files are none, for example {findings.names[OTHER_FILE][0]}." if others else ""
        unread = findings.names.get("unreadable", [])
        tail += f" {len(unread)} cannot be read, for example {unread[0]}." if unread else ""
        raise DataError(f"{source}: there are no images.{tail}")
    return tree


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


def _read_archive(source: Path, findings: Findings, workspace: Path) -> SourceTree:
    if source.name.lower().endswith(ZIP_SUFFIXES):
        path, members = source, list_zip(source)
    else:
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
                if parts in files or parts in links:
                    findings.add("archive_twice", where)
                if parts not in files or _target(member) != parts:  # tar can write a file as a link to itself
                    files.pop(parts, None)
                    links[parts] = member
            elif member.kind in NOT_READ:
                kind, why = NOT_READ[member.kind]
                findings.add(kind, f"{where} ({why})")
            elif member.kind == "file" and _keep(parts[-1], partial(_head, file, member), findings, where):
                if parts in files or links.pop(parts, None):
                    findings.add("archive_twice", where)
                place = (str(path), member.offset, member.size, member.packed)
                files[parts] = SourceImage(shown(where), "", None, *place)
    for first in list(links):  # as in a folder, a link to an image is one more image, by way of others too
        chain, parts = {}, first
        while parts in links:  # each is taken out, so that a circle ends
            chain[parts] = links.pop(parts)
            parts = _target(chain[parts])
        for each, link in chain.items():
            where = f"{source}:{link.name}"
            if target := files.get(parts):
                files[each] = replace(target, name=shown(where))
            else:
                findings.add("archive_link", where)
    for parts in sorted(left_behind):
        findings.add(LEFT_BEHIND, f"{source}:{'/'.join(parts)}")
    return SourceTree(files, frozenset(folders))


def _target(link: Member) -> Parts:
    return PurePosixPath(link.target).parts


def _head(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    if member.packed is None or not member.packed.is_deflated:
        return file.read(min(HEAD_BYTES, member.size))
    raw = file.read(min(PACKED_HEAD_BYTES, member.size))
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, HEAD_BYTES)
    except zlib.error:
        return b""


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
                if os.path.isdir(entry.path):  # False for a link in a circle, where entry.is_dir() raises
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
