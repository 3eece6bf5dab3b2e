"""`vitds predict`: the classes of images, by a fine-tuned run."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitds.errors import UsageError
from vitds.terminal import say
from vitds.use.images import NamedImage, find_images, passed_over
from vitds.use.model import Model, Prediction, open_model
from vitds.use.predict import SCHEMA, TOP, row_of
from vitds.use.tables import CsvTable, Table, check_out, open_table

ENDINGS = (".csv", ".json", ".parquet")
CLASSES_SHOWN = 10


def predict_files(
    run: str, images: Sequence[str | Path], *, out: str | None = None, workers: int | None = None
) -> None:
    """Name the likeliest classes of images: a row an image, in the order given.

    An image that cannot be read is a row with the reason.

    Args:
        run: a fine-tuned run, or one of its checkpoints.
        images: files, folders, archives, .beton files.
        out: a .csv, .json or .parquet file; None prints CSV.
        workers: processes that decode; None is one a core.
    Raises: DataError if a file does not exist or a source has no images; RunError if the run cannot be read
        or has no class head; ResourceError if `out` cannot be written; UsageError for another ending.
    """
    path = check_out(out, ENDINGS) if out else None
    model = opened(run, workers, needs_head=True)
    with found_images(images) as found:
        predictions = model.predictions(found, top=TOP, workers=workers, show_progress=True)
        if path is None:
            _write(CsvTable(sys.stdout, list(SCHEMA)), predictions)
            return
        with open_table(path, SCHEMA) as table:
            counts, unreadable = _write(table, predictions)
    say(f"{out}: {_summary(counts, unreadable)}")


def opened(run: str, workers: int | None, needs_head: bool = False) -> Model:
    """The model that a command names; what should be known of it is said on standard error.

    Raises: UsageError for less than one worker; as open_model.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"`workers={workers}`: must be at least 1")
    model = open_model(run, needs_head=needs_head)
    for note in model.notes:
        print(note, file=sys.stderr)
    return model


@contextmanager
def found_images(named: Sequence[str | Path]) -> Iterator[list[NamedImage]]:
    """The images that a command names; what was passed over among them is said on standard error."""
    with tempfile.TemporaryDirectory() as workspace:
        found, findings = find_images(list(named), Path(workspace))
        if note := passed_over(findings):
            print(note, file=sys.stderr)
        yield found


def _write(table: Table, predictions: Iterator[Prediction]) -> tuple[Counter[str], int]:
    """How many images of each class there were, and how many could not be read."""
    counts: Counter[str] = Counter()
    unreadable = 0
    for prediction in predictions:
        table.write(row_of(prediction))
        if prediction.classes:
            counts[prediction.classes[0]] += 1
        else:
            unreadable += 1
    return counts, unreadable


def _summary(counts: Counter[str], unreadable: int) -> str:
    parts = [f"{count:,} {name}" for name, count in counts.most_common(CLASSES_SHOWN)]
    if len(counts) > CLASSES_SHOWN:
        parts.append(f"{len(counts) - CLASSES_SHOWN} more classes")
    listed = f" ({', '.join(parts)})" if parts else ""
    tail = f"; {unreadable:,} could not be read, with the reason in the file" if unreadable else ""
    return f"{counts.total():,} images{listed}{tail}"
