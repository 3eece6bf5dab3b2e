"""Building a small .beton and looking into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data.images import write_folder
from vitds.data.beton import BetonFile, open_beton
from vitds.data.build import build_beton
from vitds.data.images import decode_stored


def pixels_of(beton: BetonFile, index: int) -> np.ndarray:
    """(H, W, 3) of one stored sample."""
    data = beton.path.read_bytes()[beton.offsets[index] : beton.offsets[index] + beton.sizes[index]]
    return decode_stored(
        data, bool(beton.is_jpeg[index]), int(beton.heights[index]), int(beton.widths[index])
    )


def build(folder: Path, files: dict[str, bytes], **options: object) -> BetonFile:
    """The .beton of a folder of these files."""
    build_beton([write_folder(folder / "set", files)], folder / "x.beton", **options)
    return open_beton(folder / "x.beton")


def names(beton: BetonFile) -> dict[str, list[str]]:
    """Findings with the names cut to what stands below the source."""
    return {
        kind: [name.split("/set/", 1)[1] for name in found.names]
        for kind, found in beton.manifest.findings.items()
    }
