"""`vitds similar`: the images nearest to one, as a picture sheet and a list."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from vitds.data.images import LeftOut
from vitds.errors import DataError, ResourceError, UsageError
from vitds.jobs.predict import found_images, opened
from vitds.report.table import show
from vitds.terminal import say
from vitds.use.images import NamedImage, name_of
from vitds.use.model import Model
from vitds.use.similar import Neighbour, draw_sheet, nearest, without
from vitds.use.tables import check_out
from vitds.use.view import whole_picture

ENDINGS = (".png", ".jpg", ".webp")


def find_similar(
    run: str,
    image: str | Path,
    *,
    among: str | Path,
    count: int = 7,
    out: str = "similar.png",
    workers: int | None = None,
    as_json: bool = False,
) -> list[tuple[str, float]]:
    """Find the images whose features are nearest to those of one image, by the cosine.

    Args:
        run: a run, one of its checkpoints, or a timm model's name.
        image: the file that is asked about; left out where it is among the others by its path.
        among: a folder, archive or .beton file to look through.
        count: how many to find.
        out: the picture sheet to write, .png, .jpg or .webp.
        workers: processes that decode; None is one a core.
        as_json: print one JSON object and nothing else.
    Returns: names and cosines, the nearest first.
    Raises: DataError if there is nothing to compare, or the image cannot be read; ResourceError if the
        picture cannot be written, after printing; the others as embed_files.
    """
    if count < 1:
        raise UsageError(f"`count={count}`: must be at least 1")
    path = check_out(out, ENDINGS)
    model = opened(run, workers)
    with found_images([image]) as asked, found_images([among]) as others:
        if len(asked) != 1:
            raise DataError(f"{image} holds {len(asked)} images; name one image file")
        (query,) = model.answers(asked)
        if query.row is None:
            raise DataError(f"{image}: {query.reason}")
        others = without(asked[0], others)
        answers = model.answers(others, workers=workers, show_progress=True)
        found = nearest(query.row, others, answers, count)
        if not found:
            raise DataError(
                f"{among}: no other image could be read there, so there is nothing to compare with"
            )
        _print(str(image), found, out, as_json)  # first: the search took long, and the picture may fail
        _draw(model, path, asked[0], found, f"{image} and the nearest of {len(others):,} images in {among}")
    if not as_json:
        say(f"{out}: the same as pictures")
    return [(one.image.name, one.cosine) for one in found]


def _draw(model: Model, path: Path, asked: NamedImage, found: list[Neighbour], title: str) -> None:
    cells = [(f"asked about\n{_short(asked)}", _pixels(model, asked))]
    cells += [
        (f"{place}.  cosine {one.cosine:.3f}\n{_short(one.image)}", _pixels(model, one.image))
        for place, one in enumerate(found, 1)
    ]
    page, escaped = draw_sheet(cells[0], cells[1:], title)
    try:
        page.save(path)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"`out={path}`: the picture cannot be written ({error}). Give another place, a name that ends in "
            ".png, or a smaller `count`"
        ) from None
    if escaped:
        print(  # standard output may be JSON
            f"{path}: no font of this machine has {' '.join(sorted(escaped))}; such letters stand there as "
            "code points",
            file=sys.stderr,
        )


def _short(image: NamedImage) -> str:
    """The last two parts of a name: folder and file, on two lines."""
    return "\n".join(Path(image.name).parts[-2:])


def _pixels(model: Model, image: NamedImage) -> NDArray[np.uint8]:
    pixels = whole_picture(image, model.storing)
    if isinstance(pixels, LeftOut):  # it was read a moment ago
        raise DataError(f"{image.name}: {name_of(pixels)}")
    return pixels


def _print(image: str, found: list[Neighbour], out: str, as_json: bool) -> None:
    rows = [{"file": one.image.name, "cosine": one.cosine} for one in found]
    if as_json:
        say(json.dumps({"image": image, "sheet": out, "nearest": rows}, ensure_ascii=False))
        return
    table = Table(title=f"nearest to {image}")
    table.add_column("", justify="right")
    table.add_column("cosine", justify="right")
    table.add_column("file", overflow="fold")
    for place, row in enumerate(rows, 1):
        table.add_row(str(place), f"{row['cosine']:.4f}", row["file"])
    show(table)
