"""Writing a .beton, sample by sample in index order, so that its layout is a function of the samples alone.

FFCV's own writer lays samples out as its processes happen to finish, waits for ever when one of them fails,
and encodes JPEG files again. The format (vitds/data/beton.py) is FFCV's; a test reads what is written here
with FFCV's own loader.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vitds.data.beton import (
    ALLOCATION,
    FIELD,
    FIELDS,
    FORMAT_VERSION,
    HEADER,
    MAX_PAGE_BYTES,
    SAMPLE,
    SAMPLES_START,
)
from vitds.data.manifest import MANIFEST_JSON, Manifest, manifest_path
from vitds.errors import DataError, ResourceError
from vitds.kernels.views import JPEG, RAW

PAGE_BYTES = 1 << 23  # FFCV's usual page


class BetonWriter:
    """A .beton in the making, under a hidden name beside its final one until `publish`."""

    def __init__(self, path: Path, capacity: int) -> None:
        """Open the hidden file.

        Args:
            path: the final name.
            capacity: the most samples that can be added. Their rows lie before the data, so room for them is
                made first.
        """
        self.path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
        self._rows = np.zeros(capacity, SAMPLE)
        self._allocations = np.zeros(capacity, ALLOCATION)
        self._count = 0
        self._end = SAMPLES_START + capacity * SAMPLE.itemsize
        self._page = PAGE_BYTES
        with self._named_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("xb")

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Close; what was not published is removed."""
        with contextlib.suppress(OSError):  # a full disk fails again on closing, after it was reported
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, data: bytes, *, is_jpeg: bool, height: int, width: int, label: int) -> None:
        """Append one sample.

        Raises: DataError if it has 2 GiB or more, ResourceError if it cannot be written (names the file and
            the reason).
        """
        if len(data) > MAX_PAGE_BYTES:
            raise DataError(
                f"{self.path}: an image of {len(data)} bytes, FFCV's most is {MAX_PAGE_BYTES}. "
                "Use `side_px` or `storage=jpg`."
            )
        # A sample lies within one page. Borders of larger pages are borders of smaller ones too, so what is
        # written stays right.
        while len(data) > self._page:
            self._page *= 2
        if self._end // self._page != (self._end + len(data) - 1) // self._page:
            self._end = (self._end // self._page + 1) * self._page
        with self._named_errors():
            self._file.seek(self._end)
            self._file.write(data)
        self._rows[self._count] = ((JPEG if is_jpeg else RAW, width, height, self._end), self._count, label)
        self._allocations[self._count] = (self._count, self._end, len(data))
        self._end += len(data)
        self._count += 1

    def finish(self, content: bytes) -> int:
        """Write the tables and the header.

        Args:
            content: the 32 bytes of the manifest's content hash, by which the two files know each other.
        Returns: the file's size in bytes.
        Raises: ResourceError if it cannot be written.
        """
        header, fields = np.zeros(1, HEADER), np.zeros(len(FIELDS), FIELD)
        header[0] = (FORMAT_VERSION, len(FIELDS), self._page, self._count, self._end)
        for row, (name, kind) in zip(fields, FIELDS.items(), strict=True):
            row["type_id"] = kind
            row["name"][: len(name)] = list(name.encode())
        fields["arguments"][0, : len(content)] = list(content)  # where FFCV keeps nothing of an image field
        with self._named_errors():
            self._file.seek(self._end)
            self._file.write(self._allocations[: self._count].tobytes())
            self._file.seek(0)
            self._file.write(header.tobytes() + fields.tobytes() + self._rows[: self._count].tobytes())
            _to_disk(self._file)
        return self._end + self._count * ALLOCATION.itemsize

    def publish(self, manifest: Manifest) -> None:
        """Put the finished file and its manifest under their final names."""
        # The manifest first, so that a .beton never lacks one.
        sidecar = manifest_path(self._partial)
        with self._named_errors():
            try:
                with sidecar.open("xb") as file:
                    file.write(MANIFEST_JSON.dump_json(manifest, indent=1) + b"\n")
                    _to_disk(file)
                sidecar.replace(manifest_path(self.path))
            finally:
                sidecar.unlink(missing_ok=True)
            self._partial.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # both names
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be written ({error.strerror or error}). "
                "Free space or permissions there, or choose another `out`."
            ) from None


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
