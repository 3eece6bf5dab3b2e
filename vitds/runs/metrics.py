"""metrics.jsonl: one line a step, each step once after any number of kills.

Keys that time or measure the machine begin with `time/`; all others are bit-reproducible.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from vitds.runs.directory import write_atomic

TAIL_BYTES = 1 << 16  # holds many lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a half line that a kill left at the end is not one."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines():  # a broken disk may give what is no text
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line, without reading all before it; None where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:  # the half line of a kill, or the first one, which the seek may have cut
            continue
    return None


def seconds_of(path: Path, steps: int) -> float:
    """What the first `steps` steps took, with the starts that led to them, in seconds."""
    lines = [line for line in read_metrics(path) if line["step"] < steps]
    return sum((line["time/step_s"] + line.get("time/start_s", 0.0) for line in lines), 0.0)


def cut_back(path: Path, steps: int) -> list[dict[str, Any]]:
    """Keep the lines of the first `steps` steps and drop the rest, for a resume from there.

    Returns: the kept lines.
    """
    kept = [line for line in read_metrics(path) if line["step"] < steps]
    if path.exists():
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept


class MetricsFile:
    """Appends lines; what is appended survives a kill of the process."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a", buffering=1)

    def append(self, line: dict[str, Any]) -> None:
        """One step's numbers.

        What is not finite becomes null: JSON has no NaN, and strict readers refuse it.
        """
        whole = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        self.file.write(json.dumps(whole, allow_nan=False) + "\n")

    def sync(self) -> None:
        """To the disk, before a checkpoint that stands on these lines."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """No more lines."""
        self.file.close()
