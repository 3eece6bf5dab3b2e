"""The members of a zip and where their bytes lie in it, so that they are read in place. Nothing is extracted.

A zip is hostile until shown otherwise: no member may unpack to more than MAX_MEMBER_BYTES, no two may share
bytes (a few kilobytes could claim terabytes so), and each is checked by its size and check sum when it is
read.
"""

from __future__ import annotations

import contextlib
import posixpath
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from vitds.data.archives import Kind, Member, Packed
from vitds.errors import DataError

ZIP_SUFFIXES = (".zip",)
MAX_MEMBER_BYTES = 1 << 30
MAX_LINK_BYTES = 4096
ENCRYPTED, UTF8 = 0x1, 0x800  # bits of a member's flags
WINDOWS, UNIX = 0, 3  # systems that a zip can be made on
LOCAL_HEADER = struct.Struct("<4s22xHH")  # mark, lengths of the name and of what follows it
METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}


def list_zip(path: Path) -> list[Member]:
    """The members of a zip.

    Raises: DataError if it cannot be read, is no zip, is damaged, cut short or encrypted, or its members lie
        over one another (names the file, and the member).
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = archive.infolist()
            if sum(info.compress_size for info in infos) > size:
                raise DataError(
                    f"{path}: its members lie over one another, as those of a zip bomb do. Nothing of it is "
                    "read. Unpack it, if you trust it, and build from the folder."
                )
            return [_member(path, file, info, size) for info in infos]
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not a zip, or damaged or cut short ({error}). Fetch or make the archive again."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check the file.") from None


def unpack(raw: bytes, packed: Packed) -> bytes:
    """The bytes of a member; never more than it announces, whatever is in it.

    Args:
        raw: as they lie in the zip.
        packed: how they are packed.
    Raises: ValueError if they are not what the zip says (size, check sum).
    """
    if packed.is_deflated:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            raw = inflater.decompress(raw, packed.size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged inside the zip: {error}") from None
    if len(raw) != packed.size or zlib.crc32(raw) != packed.crc:
        raise ValueError("damaged inside the zip: its size or check sum is not the one that the zip states")
    return raw


def _member(path: Path, file: BinaryIO, info: zipfile.ZipInfo, size: int) -> Member:
    name = _name(info)
    if info.flag_bits & ENCRYPTED:
        raise DataError(
            f"{path}: {name} is encrypted. Unpack the zip with its password, and build from the folder."
        )
    file.seek(info.header_offset)
    mark, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    offset = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    if mark != b"PK\3\4" or offset + info.compress_size > size:
        raise DataError(f"{path}: damaged at {name}. Fetch or make the archive again.")
    packed = Packed(METHODS.get(info.compress_type) == "deflated", info.file_size, info.CRC)
    kind, target = _kind(info), ""
    if kind == "link":
        file.seek(offset)
        link = unpack(file.read(info.compress_size), packed).decode("utf-8", "surrogateescape")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return Member(name, kind, offset, info.compress_size, target, packed)


def _kind(info: zipfile.ZipInfo) -> Kind:
    if info.is_dir():
        return "folder"
    if info.compress_type not in METHODS:
        return "method_unknown"
    if info.create_system == UNIX and stat.S_ISLNK(info.external_attr >> 16):
        return "link" if info.file_size <= MAX_LINK_BYTES else "other"
    return "file" if info.file_size <= MAX_MEMBER_BYTES else "bomb"


def _name(info: zipfile.ZipInfo) -> str:
    name = info.filename
    if not info.flag_bits & UTF8:
        # By the standard it is in code page 437 then; macOS writes UTF-8 without saying so.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/") if info.create_system == WINDOWS else name
