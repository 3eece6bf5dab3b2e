"""`vitds embed`: the features of images, by a run or one of timm's models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitds.jobs.predict import found_images, opened
from vitds.terminal import say
from vitds.use.embed import ENDINGS, write_features
from vitds.use.tables import check_out


def embed_files(run: str, images: Sequence[str | Path], *, out: str, workers: int | None = None) -> None:
    """Write the features of images with their file names, in the order given.

    Args:
        run: a run, one of its checkpoints, or a timm model's name (with its published weights).
        images: files, folders, archives, .beton files.
        out: an .npz, .csv or .parquet file.
        workers: processes that decode; None is one a core.
    Raises: DataError if a file does not exist or a source has no images; RunError if the run cannot be read;
        ResourceError if `out` cannot be written; UsageError for another ending.
    """
    path = check_out(out, ENDINGS)
    model = opened(run, workers)
    with found_images(images) as found:
        answers = model.answers(found, workers=workers, show_progress=True)
        count, unreadable = write_features(path, answers, model.width)
    line = f"{out}: {count:,} images, {model.width} features each"
    if unreadable:
        first = unreadable[0]
        line += f"; {len(unreadable):,} could not be read, first {first.file}: {first.reason}"
    say(line)
