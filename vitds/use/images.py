"""What a person names (files, folders, archives, .beton files, pictures in memory) as a list of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitds.data.beton import open_beton
from vitds.data.findings import TEXTS, Findings, shown
from vitds.data.images import LeftOut
from vitds.data.pixels import Refused, layout_of, to_rgb
from vitds.data.trees import ARCHIVE_SUFFIXES, SourceImage, read_source
from vitds.errors import DataError

AnyImage = str | Path | Image.Image | np.ndarray  # an array is (H, W, 3) uint8
Images = Sequence[AnyImage] | np.ndarray
MISSING_SHOWN = 3


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of a .beton file, where it lies.

    Attributes:
        name: what a person is shown.
        path: the file.
        offset: where its bytes begin in the file.
        size: how many they are.
        is_jpeg: else they are the raw pixels.
        height: in pixels.
        width: in pixels.
    """

    name: str
    path: str
    offset: int
    size: int
    is_jpeg: bool
    height: int
    width: int


NamedImage = SourceImage | StoredImage


def find_images(named: Images, workspace: Path) -> tuple[list[NamedImage], Findings]:
    """The images in the order in which they are named, those of a folder or archive in the order of paths.

    Args:
        named: image files, folders, archives, .beton files; pictures of Pillow; (H, W, 3) uint8 arrays.
        workspace: a folder that the caller removes; archives may be unpacked into it.
    Returns: the images, and what was passed over in folders and archives.
    Raises: DataError if a file does not exist, a source holds no image, or a picture in memory has another
        shape or type (names all that are missing before anything is read).
    """
    if isinstance(named, str | Path | Image.Image) or getattr(named, "ndim", 4) == 3:
        raise DataError("give the images as a list, also where there is only one: predict([image])")
    missing = [str(one) for one in named if isinstance(one, str | Path) and not Path(one).exists()]
    if missing:
        more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
        raise DataError(f"{', '.join(missing[:MISSING_SHOWN])}{more}: there is no such file. Check the path.")
    findings = Findings()
    images: list[NamedImage] = []
    for place, one in enumerate(named):
        if isinstance(one, str | Path):
            images += _of_path(Path(one), findings, workspace)
        else:
            pixels = _checked(_rgb_of(one, place) if isinstance(one, Image.Image) else one, place)
            name = getattr(one, "filename", "") or f"image {place}"  # Pillow knows the file it has opened
            images.append(SourceImage(shown(str(name)), "", None, pixels=pixels))
    return images, findings


def passed_over(findings: Findings) -> str:
    """One line on what was passed over in folders and archives; empty where nothing was."""
    parts = [
        f"{count:,} x {TEXTS[kind]} (first: {findings.names[kind][0]})"
        for kind, count in findings.counts.items()
    ]
    return "; ".join(parts)


def _of_path(path: Path, findings: Findings, workspace: Path) -> list[NamedImage]:
    if path.suffix == ".beton":
        return _of_beton(path)
    if path.is_dir() or path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return [image for _, image in sorted(read_source(path, findings, workspace).files.items())]
    return [SourceImage(shown(path), "", None, str(path))]


def _of_beton(path: Path) -> list[NamedImage]:
    file = open_beton(path)
    columns = (file.offsets, file.sizes, file.is_jpeg, file.heights, file.widths)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    names = file.names or range(file.images)  # a build can be asked to keep none
    return [
        StoredImage(f"{shown(path)}:{name}", str(path), *row) for name, row in zip(names, rows, strict=True)
    ]


def _rgb_of(picture: Image.Image, place: int) -> NDArray[np.uint8]:
    """A picture in memory as it would be read from its file: turned upright, on white, 8-bit RGB."""
    try:
        return np.asarray(to_rgb(picture, layout_of(picture, _file_of(picture))))
    except MemoryError:
        raise
    except Exception as error:  # as in store_image: a decoder raises anything on hostile bytes
        if isinstance(error, Refused):
            advice = " Make it 8-bit RGB first." if error.kind == "range_unknown" else ""
            raise DataError(f"image {place}: {error}.{advice}") from None
        raise DataError(f"image {place}: the picture cannot be decoded: {error}") from error


def _file_of(picture: Image.Image) -> bytes:
    """The bytes behind a JPEG 2000 that was opened and not decoded yet, for its depth; else b""."""
    if picture.format != "JPEG2000" or not picture.tile:
        return b""
    at = picture.fp.tell()
    picture.fp.seek(0)
    raw = picture.fp.read()
    picture.fp.seek(at)
    return raw


def _checked(array: object, place: int) -> NDArray[np.uint8]:
    if not isinstance(array, np.ndarray):
        raise DataError(
            f"image {place} is of type {type(array).__name__}; give a path, a picture of Pillow, or an "
            "(H, W, 3) array of uint8"
        )
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise DataError(
            f"image {place} is an array {array.shape} of {array.dtype}; give a path, a picture of Pillow, or "
            "an (H, W, 3) array of uint8"
        )
    return np.ascontiguousarray(array)


def name_of(left_out: LeftOut) -> str:
    """The reason why an image cannot be used, for a table."""
    return f"{TEXTS[left_out.kind].removeprefix('left out: ')}: {left_out.reason}"
