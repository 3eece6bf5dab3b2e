"""Reading a whole .beton back: after a copy, or when a run complains about an image."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from vitds.data.beton import open_beton
from vitds.data.images import decode_stored, digest_of, hash_entry
from vitds.data.workers import work_through
from vitds.errors import DataError


@dataclass(frozen=True)
class Verdict:
    """What reading back found.

    Attributes:
        images: N.
        undecodable: index and reason of each sample that cannot be decoded.
        names: of those, the photograph by index, where the manifest keeps names.
        content_hash: of what was read; None where not all could be decoded.
        expected_hash: the manifest's.
    """

    images: int
    undecodable: dict[int, str]
    names: dict[int, str]
    content_hash: str | None
    expected_hash: str

    @property
    def is_sound(self) -> bool:
        return self.content_hash == self.expected_hash


def verify_beton(path: str | Path, *, workers: int | None = None, show_progress: bool = False) -> Verdict:
    """Check the tables, decode every sample, and compare the content hash with the manifest's.

    Raises: DataError where open_beton does. A sample that cannot be decoded is in the verdict, not an error.
    """
    beton = open_beton(path)
    columns = (beton.offsets, beton.sizes, beton.is_jpeg, beton.heights, beton.widths)
    samples = list(zip(*(column.tolist() for column in columns), strict=True))
    content, undecodable = hashlib.sha256(), {}
    read = functools.partial(_digest_at, str(path))
    results = work_through(
        read, samples, workers=workers, title=f"verifying {beton.path.name}", show_progress=show_progress
    )
    for index, (_, digest) in enumerate(results):
        if isinstance(digest, str):
            undecodable[index] = digest
        else:
            content.update(hash_entry(digest, int(beton.labels[index])))
    found = None if undecodable else f"sha256:{content.hexdigest()}"
    names = {index: beton.names[index] for index in undecodable} if beton.names else {}
    return Verdict(beton.images, undecodable, names, found, beton.manifest.content_hash)


def _digest_at(path: str, sample: tuple[int, int, bool, int, int]) -> bytes | str:
    """The digest of one stored sample (offset, size, is_jpeg, height, width), or why it cannot be decoded."""
    offset, size, is_jpeg, height, width = sample
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    try:
        return digest_of(decode_stored(data, is_jpeg, height, width))
    except DataError as error:
        return str(error)
