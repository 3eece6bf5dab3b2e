"""The members of a tar and where their bytes lie in it, so that they are read in place. Nothing is extracted.

A compressed tar has no such places: it is decompressed, as one tar, into a workspace that the caller removes.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import re
import shutil
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitds.errors import DataError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# By how the file begins; a plain tar begins with a name, which may be BZhang.
_COMPRESSIONS = {
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
    rb"\xfd7zXZ\0": lzma.open,
}


Kind = Literal["file", "folder", "link", "sparse", "method_unknown", "bomb", "other"]


@dataclass(frozen=True, slots=True)
class Packed:
    """How a zip keeps one member's bytes.

    Attributes:
        is_deflated: else they are stored as they are.
        size: of what comes out.
        crc: CRC-32 of what comes out.
    """

    is_deflated: bool
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar or zip.

    Attributes:
        name: its path in the archive.
        kind: what it is; hard and symbolic links alike are links.
        offset: where its bytes begin in the archive's file.
        size: how many they are there.
        target: the path in the archive that a link leads to; "" for all else.
        packed: how a zip keeps them; None in a tar.
    """

    name: str
    kind: Kind
    offset: int
    size: int
    target: str
    packed: Packed | None = None


def read_archive(path: Path, workspace: Path) -> tuple[Path, list[Member]]:
    """The plain tar's path (in `workspace` where `path` is compressed), and its members.

    Raises: DataError if it cannot be read, is no tar, is damaged or cut short (names the file and the byte).
    """
    try:
        with path.open("rb") as file:
            head = file.read(10)
        opener = next((opener for mark, opener in _COMPRESSIONS.items() if re.match(mark, head)), None)
        if opener:
            plain = workspace / f"{len(list(workspace.iterdir()))}-{path.name}"
            with opener(path, "rb") as packed, plain.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            return plain, list_members(plain, shown_as=path)
        return path, list_members(path)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: its compressed data are damaged ({error}). Fetch or make the archive again."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check the file and the free space."
        ) from None


def list_members(path: Path, offset: int = 0, shown_as: Path | None = None) -> list[Member]:
    """The members of a plain tar.

    Args:
        path: the file.
        offset: the byte where the tar begins; a tar within a tar is one at its member's offset.
        shown_as: the name that messages give it, where it is not its own.
    Raises: DataError if there is no tar, or it is damaged or cut short (names the file and the byte).
    """
    members = []
    name = shown_as or path
    with path.open("rb") as file:
        file.seek(offset)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    members.append(Member(info.name, _kind(info), info.offset_data, info.size, _target(info)))
                    tar.members.clear()  # else tarfile keeps a kilobyte a member
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise DataError(
                f"{name}: not a tar, or a damaged one ({error}). Fetch or make the archive again."
            ) from None
        # tarfile takes a damaged header for the end; the true end is a block of zeros, or the file's end.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise DataError(f"{name}: damaged at byte {end}. Fetch or make the archive again.")
        size = file.seek(0, 2)
    for member in members:
        if member.kind == "file" and member.offset + member.size > size:
            raise DataError(f"{name}: cut short inside {member.name}. Fetch or make the archive again.")
    return members


def _kind(info: tarfile.TarInfo) -> Kind:
    if info.issym() or info.islnk():
        return "link"
    if info.isdir():
        return "folder"
    if info.issparse():
        return "sparse"
    return "file" if info.isreg() else "other"


def _target(info: tarfile.TarInfo) -> str:
    """A hard link names its target's path in the tar, a symbolic one the way there from its own folder."""
    if info.issym():
        return posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
    return info.linkname if info.islnk() else ""
