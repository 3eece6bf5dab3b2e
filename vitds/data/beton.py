"""Opening a .beton: every number in it is checked against the file's size before compiled code may follow it.

A .beton is FFCV's file, format version 2, little-endian, with the fields image, index and label:

    header       version, number of fields, page size, number of samples N, where the allocation table lies
    fields       3 descriptors: type, name, and, of ours, the manifest's content hash with the image's
    samples      N rows: image (mode, width, height, pointer), index, label; there may be space for more
    data         each sample's bytes, JPEG or raw (H, W, 3) uint8, none across a page's border
    allocations  N rows: sample, pointer, size; to the end of the file

Beside x.beton lies x.beton.json, its manifest: what the numbers mean to a person. The file is of no use
without it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitds.data.manifest import Manifest, load_manifest, manifest_path
from vitds.errors import DataError
from vitds.kernels.views import JPEG, RAW

FORMAT_VERSION = 2
HASH_BYTES = 32
MIN_PAGE_BYTES, MAX_PAGE_BYTES = 1 << 21, 1 << 31

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("index", "<i8"), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = {"image": 2, "index": 1, "label": 1}  # name -> FFCV's type: RGBImageField, IntField
SAMPLES_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


@dataclass(frozen=True, eq=False)
class BetonFile:
    """A .beton whose tables were found sound. All arrays are in index order and read-only.

    Attributes:
        path: of the file; of several that are joined (joined.py), the first.
        parts: paths of the files that hold the bytes.
        images: N.
        heights: (N,) int32, pixels.
        widths: (N,) int32, pixels.
        offsets: (N,) int64, where each sample's bytes begin in the file.
        sizes: (N,) int64, how many they are.
        is_jpeg: (N,) bool; else the bytes are the (H, W, 3) uint8 pixels.
        labels: (N,) int64, position in `manifest.classes`; -1 where there are none.
        index: (N,) int64, each image's number in the .beton; 0..N-1 unless the file was taken from another.
        part: (N,) int64, which of `parts` an image's bytes lie in.
        manifest: what x.beton.json says.
    """

    path: Path
    parts: tuple[Path, ...]
    images: int
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    is_jpeg: NDArray[np.bool_]
    labels: NDArray[np.int64]
    index: NDArray[np.int64]
    part: NDArray[np.int64]
    manifest: Manifest

    @functools.cached_property
    def names(self) -> tuple[str, ...] | None:
        """The path of each image below its source; None where the build kept none."""
        if self.manifest.names is None:
            return None
        lines = self.manifest.names.split("\n")
        return tuple(lines[i] for i in self.index)

    @property
    def typical_side_px(self) -> int:
        """The median short side of the images, which one small picture among large ones does not move."""
        return int(np.median(np.minimum(self.heights, self.widths)))

    def describe(self, image: int) -> str:
        """An image for a message: its number in the .beton, and its photograph where that is known."""
        number = f"image {self.index[image]}"
        if len(self.parts) > 1:
            number += f" of all, in {self.parts[self.part[image]]}"
        return number if self.names is None else f"{number} ({self.names[image]})"

    def stored(self, image: int) -> bytes:
        """An image as it is stored: a JPEG, or raw pixels."""
        with self.parts[self.part[image]].open("rb") as stream:
            stream.seek(int(self.offsets[image]))
            return stream.read(int(self.sizes[image]))

    def take(self, positions: NDArray[np.int64]) -> BetonFile:
        """Some of the images as a file of its own, in the given order; the manifest still speaks of all.

        Args:
            positions: (n,) of images in this file; n is at least 1.
        """
        names = ("heights", "widths", "offsets", "sizes", "is_jpeg", "labels", "index", "part")
        taken = {name: getattr(self, name)[positions] for name in names}
        for array in taken.values():
            array.setflags(write=False)
        return replace(self, images=len(positions), **taken)


def labelled(file: BetonFile) -> BetonFile:
    """The images of a file that have a label, as a file of its own; the file itself if all have one."""
    has_label = file.labels >= 0
    return file if has_label.all() else file.take(np.flatnonzero(has_label))


def open_beton(path: str | Path) -> BetonFile:
    """Read and check the header, the tables and the manifest of a .beton; the pixels are not touched.

    Raises: DataError if the file is missing, not a .beton, truncated, of another format version, lacks a
        field, holds a pointer, size or label out of bounds, or does not fit its manifest (names the file, the
        place and the way out).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header = _read_header(path, file, size)
            samples, allocations, content = _read_tables(path, file, size, header)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror}). "
            f"Build it with `vitds data build SOURCE --out {path}`."
        ) from None
    manifest = load_manifest(path)
    sizes = _check_samples(path, header, samples, allocations)
    _check_meaning(path, size, samples, content, manifest)
    image = samples["image"]
    arrays = {
        "heights": image["height"].astype(np.int32),
        "widths": image["width"].astype(np.int32),
        "offsets": image["data_ptr"].astype(np.int64),
        "sizes": sizes.astype(np.int64),
        "is_jpeg": image["mode"] == JPEG,
        "labels": samples["label"].astype(np.int64),
        "index": np.arange(len(samples)),
        "part": np.zeros(len(samples), np.int64),
    }
    for array in arrays.values():
        array.setflags(write=False)
    return BetonFile(path=path, parts=(path,), images=len(samples), manifest=manifest, **arrays)


def require_same_classes(train: BetonFile, test: BetonFile) -> None:
    """Whether two files number their classes alike.

    Raises: DataError if they do not (names the first class that differs in each).
    """
    ours, theirs = train.manifest.classes, test.manifest.classes
    if ours == theirs:
        return
    place = next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(ours), len(theirs)),
    )
    first, second = (repr(names[place]) if place < len(names) else "nothing" for names in (ours, theirs))
    raise DataError(
        f"{test.path}: its {len(theirs)} classes are not the {len(ours)} of {train.path}: "
        f"class {place} is {second} there, {first} here. "
        f"Build it again with `vitds data build … --classes_from {train.path}`."
    )


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}. The file is damaged: copy it again, or build it again with `vitds data build`."
    )


def _read_header(path: Path, file: BinaryIO, size: int) -> dict[str, int]:
    raw = file.read(HEADER.itemsize)
    if not raw:
        raise DataError(f"{path}: the file is empty. Build it again with `vitds data build`.")
    header = {name: 0 for name in HEADER.names or ()}
    if len(raw) == HEADER.itemsize:
        header = {
            name: int(value)
            for name, value in zip(HEADER.names or (), np.frombuffer(raw, HEADER)[0], strict=True)
        }
    page = header["page_size"]
    if not (
        1 <= header["num_fields"] <= 255
        and MIN_PAGE_BYTES <= page <= MAX_PAGE_BYTES
        and page & (page - 1) == 0
    ):
        raise DataError(
            f"{path}: this is not a .beton file. Make one with `vitds data build SOURCE --out x.beton`."
        )
    if header["version"] != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {header['version']}, vitds reads {FORMAT_VERSION} (FFCV 1.0). "
            "Build it again with `vitds data build`."
        )
    if size < SAMPLES_START:
        raise _damaged(path, f"truncated: {size} bytes end inside the header")
    return header


def _read_tables(
    path: Path, file: BinaryIO, size: int, header: dict[str, int]
) -> tuple[NDArray, NDArray, bytes]:
    """The samples, the allocations, and the 32 bytes of the content hash; zeros in older files."""
    descriptors = np.frombuffer(
        file.read(min(header["num_fields"] * FIELD.itemsize, size - HEADER.itemsize)), np.uint8
    )
    descriptors = descriptors[: len(descriptors) // FIELD.itemsize * FIELD.itemsize].view(FIELD)
    found = {
        bytes(row["name"]).split(b"\0")[0].decode("ascii", "replace"): int(row["type_id"])
        for row in descriptors
    }
    if list(found.items()) != list(FIELDS.items()) or header["num_fields"] != len(FIELDS):
        listed = ", ".join(f"{name!r} (type {kind})" for name, kind in found.items())
        raise DataError(
            f"{path}: its fields are {listed}; vitds needs image, index and label (types 2, 1, 1), in this "
            "order. Build it with `vitds data build`."
        )
    count, table = header["num_samples"], header["alloc_table_ptr"]
    if count == 0:
        raise _damaged(path, "the header says that it holds no image")
    end = table + count * ALLOCATION.itemsize
    if end > size:
        raise _damaged(path, f"truncated: the header promises {end} bytes, there are {size}")
    if SAMPLES_START + count * SAMPLE.itemsize > table or end != size:
        raise _damaged(
            path, f"the header's {count} images and table at byte {table} do not fit a file of {size} bytes"
        )
    samples = file.read(count * SAMPLE.itemsize)
    file.seek(table)
    allocations = file.read(count * ALLOCATION.itemsize)
    if len(allocations) != count * ALLOCATION.itemsize:
        raise _damaged(path, "it became shorter while it was read")
    content = descriptors["arguments"][0, :HASH_BYTES].tobytes()
    return np.frombuffer(samples, SAMPLE), np.frombuffer(allocations, ALLOCATION), content


def _check_samples(
    path: Path, header: dict[str, int], samples: NDArray, allocations: NDArray
) -> NDArray[np.uint64]:
    """Sizes (N,) uint64 of the samples' bytes.

    Raises: DataError if one lies outside the data, crosses a page's border, or overlaps another.
    """
    count, table, page = len(samples), header["alloc_table_ptr"], header["page_size"]
    ids = allocations["sample_id"]
    if not np.array_equal(np.sort(ids), np.arange(count, dtype=np.uint64)):
        raise _damaged(path, "its allocation table does not name every image once")
    start = SAMPLES_START + count * SAMPLE.itemsize
    pointers, sizes = np.empty(count, np.uint64), np.empty(count, np.uint64)
    pointers[ids], sizes[ids] = allocations["ptr"], allocations["size"]
    image = samples["image"]
    # Compared by subtraction from what is known to fit: a sum of two 64-bit numbers from the file could wrap
    # around.
    inside = (pointers >= start) & (pointers < table)
    inside &= (sizes > 0) & (sizes <= np.where(inside, np.uint64(table) - pointers, np.uint64(0)))
    _require(path, inside, "its bytes lie outside the file's data")
    _require(
        path,
        pointers // np.uint64(page) == (pointers + sizes - np.uint64(1)) // np.uint64(page),
        "its bytes cross a page's border",
    )
    _require(path, image["data_ptr"] == pointers, "its pointer differs from the allocation table's")
    _require(path, np.isin(image["mode"], (JPEG, RAW)), "its storage is neither JPEG nor raw")
    height, width = image["height"].astype(np.uint64), image["width"].astype(np.uint64)
    _require(path, (height > 0) & (width > 0), "its width or height is 0")
    _require(
        path,
        (image["mode"] == JPEG) | (sizes == 3 * height * width),
        "its size is not that of its raw pixels",
    )
    order = np.argsort(pointers, kind="stable")
    is_alone = np.ones(count, bool)
    is_alone[order[1:]] = pointers[order[:-1]] + sizes[order[:-1]] <= pointers[order[1:]]
    _require(path, is_alone, "its bytes overlap another image's")
    return sizes


def _check_meaning(path: Path, size: int, samples: NDArray, content: bytes, manifest: Manifest) -> None:
    if (manifest.images, manifest.file_bytes) != (len(samples), size):
        raise DataError(
            f"{manifest_path(path)}: written for {manifest.images} images in {manifest.file_bytes} bytes, "
            f"{path.name} has {len(samples)} in {size}. The two files do not belong together: copy both from "
            "one build, or build again with `vitds data build`."
        )
    _require(path, samples["index"] == np.arange(len(samples)), "its index is not its position")
    classes = len(manifest.classes)
    low, high = (-1 if manifest.unlabelled or not classes else 0), classes - 1
    in_range = (samples["label"] >= low) & (samples["label"] <= high)
    _require(
        path, in_range, f"its label is outside {low}..{high}, the range of the manifest's {classes} classes"
    )
    without = int((samples["label"] < 0).sum()) if classes else 0
    lines = len(samples) if manifest.names is None else manifest.names.count("\n") + 1
    if (without, lines) != (manifest.unlabelled, len(samples)):
        raise DataError(
            f"{manifest_path(path)}: it speaks of {manifest.unlabelled} images without a label and names "
            f"{lines}, {path.name} has {without} of {len(samples)}. The two files do not belong together: "
            "copy both from one build, or build again with `vitds data build`."
        )
    if any(content) and manifest.content_hash != f"sha256:{content.hex()}":
        raise DataError(
            f"{manifest_path(path)}: written for other images than {path.name} has. The two files do not "
            "belong together: copy both from one build, or build again with `vitds data build`."
        )


def _require(path: Path, holds: NDArray[np.bool_], what: str) -> None:
    if not holds.all():
        raise _damaged(path, f"image {int(np.argmin(holds))}: {what}")
