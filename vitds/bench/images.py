"""Which images the benches of the input pipeline work on."""

from __future__ import annotations

from pathlib import Path

from vitds.data.beton import BetonFile, open_beton
from vitds.data.build import build_beton
from vitds.data.digits import embedded_digits

FOLDER = Path("data")  # where files are built, as for every other command
# Flowers-102, training and validation part, short side 256.
PHOTOGRAPHS = Path("../shared/data/flowers102-256/train.tar")


def bench_images(data: str | None) -> BetonFile:
    """A .beton as it is; a folder or tar of images built as one first, with JPEG files as their own bytes.

    Args:
        data: None: real photographs where they lie beside the checkout, else the embedded digits.
    Raises: DataError, UsageError as open_beton and build_beton.
    """
    if data is None and not PHOTOGRAPHS.exists():
        return open_beton(embedded_digits(FOLDER)[0])
    source = PHOTOGRAPHS if data is None else Path(data)
    if source.suffix == ".beton":
        return open_beton(source)
    built = FOLDER / f"bench-{source.stem}.beton"
    # No bench asks what the labels mean.
    build_beton([source], built, storage="jpg", classes_are_folders=True)
    return open_beton(built)
