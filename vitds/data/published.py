"""The images of a published set, whichever way they lie: as its publisher ships them, unpacked, as tars."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from vitds.data.catalogue import CATALOGUE, load_named
from vitds.data.findings import Findings
from vitds.data.sources import ImageSet, scan_sources
from vitds.errors import DataError, UsageError

# Set -> its publisher's files, the archive first, and the folder that the catalogue reads.
SHIPPED = {"flowers102": (("102flowers.tgz", "imagelabels.mat", "setid.mat"), "flowers-102")}


def published_images(
    name: str, source: str | None, split: str, findings: Findings, workspace: Path
) -> ImageSet:
    """One split of a set, its counts checked.

    Args:
        name: in the catalogue.
        source: a folder with the publisher's files, packed or as the catalogue reads them, or with train*.tar
            and test*.tar of class folders; None fetches the publisher's files into the workspace.
        split: train or test.
        findings: collects what is odd.
        workspace: a folder to unpack into.
    Raises: DataError if the folder holds none of these, or not as many images as were published.
    """
    if source is None:
        try:
            return load_named(name, workspace, split, findings, download=True)
        except (DataError, UsageError) as error:
            why = str(error).partition(". Under")[0]
            raise DataError(
                f"{why}; or give the folder where the published files lie with `source`"
            ) from None
    folder = Path(source).expanduser()
    tars = sorted(folder.glob(f"{split}*.tar"))
    if tars:
        return _counted(name, scan_sources(tars, findings, workspace), folder, split)
    files, unpacked = SHIPPED.get(name, ((), ""))
    if files and all((folder / file).is_file() for file in files):
        _unpack([folder / file for file in files], workspace / unpacked)
        folder = workspace
    elif not (unpacked and (folder / unpacked).is_dir()):
        packed = f"{', '.join(files)}; or " if files else ""
        raise DataError(
            f"{folder} does not hold {name}: there must be {packed}{CATALOGUE[name].files}; or train*.tar "
            "and test*.tar, each with a folder a class"
        )
    return load_named(name, folder, split, findings)


def _counted(name: str, images: ImageSet, folder: Path, split: str) -> ImageSet:
    expected = (CATALOGUE[name].counts[split], CATALOGUE[name].classes)
    found = (len(images.images), len(images.classes))
    if found != expected:
        raise DataError(
            f"{name}: the {split}*.tar of {folder} hold {found[0]} images of {found[1]} classes, published "
            f"are {expected[0]} of {expected[1]}"
        )
    return images


def _unpack(files: list[Path], folder: Path) -> None:
    """The archive and the tables beside it into a folder, once.

    Raises: DataError if the archive is damaged.
    """
    archive, *tables = files
    done = folder / ".unpacked"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from None
    for table in tables:
        shutil.copy(table, folder)
    done.touch()
