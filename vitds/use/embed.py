"""Features with file names to .npz, .csv or .parquet, written as they come."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from vitds.use.model import Answer
from vitds.use.tables import open_table, writing

ENDINGS = (".npz", ".csv", ".parquet")


def write_features(path: Path, answers: Iterable[Answer], width: int) -> tuple[int, list[Answer]]:
    """Write the features of all images in order.

    An .npz has `features` (n, D) float32 and `files` (n,), and of images that could not be used
    `unreadable_files` and `reasons`. The tables have a row for every image, with the reason where there are
    no features.

    Args:
        path: its ending says the format.
        answers: features, as they come.
        width: D.
    Returns: how many images have features, and the others.
    Raises: ResourceError if the file cannot be written.
    """
    write = _to_npz if path.suffix.lower() == ".npz" else _to_table
    return write(path, answers, width)


def _to_table(path: Path, answers: Iterable[Answer], width: int) -> tuple[int, list[Answer]]:
    count, unreadable = 0, []
    numbers = [f"feature_{place}" for place in range(width)]
    is_csv = path.suffix.lower() == ".csv"
    schema = {"file": "text", "features": "floats", "reason": "text"}
    with open_table(path, schema, columns=["file", *numbers, "reason"]) as table:
        for answer in answers:
            row = {"file": answer.file, "reason": answer.reason}
            if answer.row is None:
                unreadable.append(answer)
            else:
                count += 1
                values = answer.row.tolist()
                row |= dict(zip(numbers, values, strict=True)) if is_csv else {"features": values}
            table.write(row)
    return count, unreadable


def _to_npz(path: Path, answers: Iterable[Answer], width: int) -> tuple[int, list[Answer]]:
    """The rows wait in a temporary file, not in memory: their number is known at the end."""
    files, unreadable = [], []
    part = path.with_name(f"{path.name}.part")
    with ExitStack() as stack:
        with writing(path, part):
            spool = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
        for answer in answers:
            if answer.row is None:
                unreadable.append(answer)
            else:
                files.append(answer.file)
                with writing(path, part):
                    spool.write(answer.row.tobytes())
        with writing(path, part):
            spool.flush()
            shape = (len(files), width)
            features = (
                np.memmap(spool, np.float32, "r", shape=shape) if files else np.empty(shape, np.float32)
            )
            with part.open("wb") as file:
                np.savez(
                    file,
                    features=features,
                    files=np.array(files, np.str_),
                    unreadable_files=np.array([answer.file for answer in unreadable], np.str_),
                    reasons=np.array([answer.reason for answer in unreadable], np.str_),
                )
            part.replace(path)
    return len(files), unreadable
