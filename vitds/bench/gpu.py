"""`vitds bench gpu`: ten minutes on a new GPU. Is it used as it should be, and are its numbers right?

A part is a process of its own with a time limit, so a part that fails, hangs or breaks the device leaves the
others. What it finds is a line of results.jsonl as soon as it is found: a cut loses nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitds.bench.gpu_check import RESULTS, Check
from vitds.bench.images import PHOTOGRAPHS
from vitds.config.names import did_you_mean
from vitds.errors import DataError, UsageError, VitdsError

TIME_TO_END_S = 3.0  # between TERM and KILL
TOY_PATIENCE = 10  # a busy laptop's


class Part(NamedTuple):
    """A function of a module of vitds.bench, and the seconds after which it is ended."""

    module: str
    function: str
    limit_s: float


# In this order, 580 s together.
PARTS = {
    "machine": Part("gpu_speed", "machine", 40),
    "numbers": Part("gpu_numbers", "numbers", 95),
    "resume": Part("gpu_runs", "resume", 75),
    "speed": Part("gpu_speed", "speed", 110),
    "head": Part("gpu_speed", "head", 60),
    "train": Part("gpu_runs", "train", 40),
    "memory": Part("gpu_speed", "memory", 120),
    "resume_compiled": Part("gpu_runs", "resume_compiled", 40),
}


def bench_gpu(*, out: str, parts: str | None = None, data: str | None = None, toy: bool = False) -> None:
    """Run the parts one after the other, then print and write the summary.

    Args:
        out: folder of results.jsonl, summary.json, profile.txt and log.txt, which is all that it prints.
        parts: names with commas between; None: all.
        data: a folder or archive of images; None: photographs beside the checkout, else the digits.
        toy: small sizes, for a try without a GPU.
    Raises: UsageError for an unknown part. DataError if the data are not there. VitdsError at the end if a
        part failed.
    """
    chosen = _chosen(parts)
    if data is not None and not Path(data).exists():
        raise DataError(f"--data {data}: there is no such folder or archive")
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    states: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="vitds-gpu-") as work:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{work}/compiled"  # what one part compiles the next has
        source = Path(data) if data else (PHOTOGRAPHS if PHOTOGRAPHS.exists() else None)
        ends = time.monotonic()
        for name in chosen:
            # A part that ends early leaves its time to the next ones.
            ends += PARTS[name].limit_s * (TOY_PATIENCE if toy else 1)
            check = Check(name, folder, Path(work), source and source.resolve(), toy)
            began = time.monotonic()
            reason = _run(check, ends - began)
            states[name] = {"seconds": round(time.monotonic() - began, 1), "failed": reason}
            check.write({"name": "part", **states[name]})
            print(f"{name}: {reason or 'done'}, {states[name]['seconds']} s", flush=True)
    rows = _rows(folder, chosen)
    (folder / "summary.json").write_text(json.dumps({"parts": states, "rows": rows}, indent=1) + "\n")
    _print(states, rows)
    if failed := [name for name, state in states.items() if state["failed"]]:
        raise VitdsError(
            f"{len(failed)} of {len(chosen)} parts failed: {', '.join(failed)}; see {out}/log.txt"
        )


def _chosen(parts: str | None) -> list[str]:
    names = list(PARTS) if parts is None else parts.split(",")
    for name in names:
        if name not in PARTS:
            raise UsageError(f"--parts {name}: there are {','.join(PARTS)}{did_you_mean(name, PARTS)}")
    return [name for name in PARTS if name in names]


def _run(check: Check, limit_s: float) -> str | None:
    """One part in a process group of its own; why it failed, if it did."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_part, args=(check, theirs))
    process.start()
    theirs.close()
    try:
        process.join(limit_s)
    finally:  # also after Ctrl-C
        is_late = process.is_alive()
        for sign in (signal.SIGTERM, signal.SIGKILL) if is_late else ():
            _send(process.pid, sign)
            process.join(TIME_TO_END_S)
    if is_late:
        return f"cut after {limit_s:.0f} s"
    if process.exitcode == 0:
        return None
    try:
        return ours.recv()
    except EOFError:
        return f"ended with status {process.exitcode}"


def _send(process: int, sign: signal.Signals) -> None:
    """To the part and all that it started."""
    for send in (os.kill, os.killpg):  # its group it makes only when it has begun
        with contextlib.suppress(ProcessLookupError):
            send(process, sign)


def _part(check: Check, reason: Connection) -> None:
    """The process of a part: what is printed goes to log.txt, the reason of a failure to the caller."""
    os.setpgrp()
    with (check.out / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    print(f"==== {check.part}", flush=True)
    os.chdir(check.work)
    part = PARTS[check.part]
    try:
        getattr(importlib.import_module(f"vitds.bench.{part.module}"), part.function)(check)
    except BaseException as error:
        traceback.print_exc()
        reason.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise SystemExit(1) from error


def _rows(folder: Path, parts: Sequence[str]) -> list[dict[str, Any]]:
    """What is in results.jsonl of these parts; of one found twice the last."""
    lines = map(json.loads, (folder / RESULTS).read_text().splitlines())
    found = {(line["part"], line["name"]): line for line in lines if line["part"] in parts}
    return [row for (_, name), row in found.items() if name != "part"]


def _print(states: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("part", "what", "found", "goal"):
        table.add_column(heading, justify="right" if heading == "found" else "left")
    for part, state in states.items():
        for row in (row for row in rows if row["part"] == part):
            value = row["value"]
            text = f"{value:,.4g}" if isinstance(value, float) else "-" if value is None else str(value)
            table.add_row(part, row["name"], f"{text} {row['unit']}", row["goal"])
        ended = Text(state["failed"], "red") if state["failed"] else "done"
        table.add_row(part, ended, f"{state['seconds']} s", "", end_section=True)
    console = Console(width=max(Console().width, 120), markup=False, emoji=False)
    console.print(table, highlight=False)
