"""Makers of images, ordinary and odd, and of folders of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def photo(seed: int, width: int = 40, height: int = 30) -> NDArray[np.uint8]:
    """(height, width, 3) smooth random colours, as a photograph's are: a small picture, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(picture: Image.Image | NDArray[np.uint8], kind: str, **options: object) -> bytes:
    """The bytes of an image file of Pillow's format `kind`."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def jpeg(seed: int, width: int = 40, height: int = 30, **options: object) -> bytes:
    """A JPEG of photo(seed)."""
    return encode(photo(seed, width, height), "JPEG", **options)


def png(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A PNG of photo(seed)."""
    return encode(photo(seed, width, height), "PNG")


def rotated_jpeg(seed: int, orientation: int, width: int = 40, height: int = 30) -> bytes:
    """A JPEG of photo(seed) whose EXIF tag says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(seed, width, height, exif=exif)


def cmyk_jpeg(seed: int) -> bytes:
    """A JPEG in printers' colours."""
    return encode(Image.fromarray(photo(seed)).convert("CMYK"), "JPEG")


def grey16_png(levels: NDArray[np.uint16]) -> bytes:
    """A 16-bit greyscale PNG of (H, W) levels."""
    return encode(Image.fromarray(levels), "PNG")


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """The files, by path below `folder`; returns `folder`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def class_folders(folder: Path, classes: dict[str, int], make=jpeg, first_seed: int = 0) -> Path:
    """A folder of class folders: name -> number of images, each image of another seed."""
    seeds = iter(range(first_seed, first_seed + sum(classes.values())))
    suffix = "jpg" if make is jpeg else "png"
    return write_folder(
        folder,
        {
            f"{name}/{i:03d}.{suffix}": make(next(seeds))
            for name, count in classes.items()
            for i in range(count)
        },
    )


def write_tar(
    path: Path, files: dict[str, bytes], mode: str = "w", extra: list[tarfile.TarInfo] = ()
) -> Path:
    """A tar of the files, then of members without content (links, folders, devices)."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return path


def tar_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member without content: kind is one of tarfile's SYMTYPE, LNKTYPE, DIRTYPE, FIFOTYPE, ..."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
