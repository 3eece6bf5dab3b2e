"""Work through many images on all cores: results in order, few of them in memory, a progress bar."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vitds.errors import ResourceError

Item, Result = TypeVar("Item"), TypeVar("Result")
ITEMS_A_TASK = 8
FEW_ITEMS = 200  # done here: worker processes take a second to start


def work_through(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int | None = None,
    title: str = "",
    show_progress: bool = False,
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) for each item, in order; at most 24 results a worker are in memory.

    Args:
        function: importable by name, for it runs in other processes.
        items: what it is called with, one at a time.
        workers: processes. 1: this one alone. None: one a usable core, or this one alone where the items are
            few.
        title: of the progress bar.
        show_progress: a bar with counts, time gone and time left on standard error, if that is a terminal.
    Raises: what the function raises. ResourceError if a worker process dies (memory).
    """
    workers = workers or (1 if len(items) < FEW_ITEMS else usable_cores())
    tasks = [items[i : i + ITEMS_A_TASK] for i in range(0, len(items), ITEMS_A_TASK)]
    with (
        _progress_bar(show_progress) as bar,
        closing(_map_in_order(functools.partial(_all, function), tasks, workers)) as results,
    ):
        row = bar.add_task(title, total=len(items))
        for task, result in zip(tasks, results, strict=True):
            yield from zip(task, result, strict=True)
            bar.advance(row, len(task))


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def stops_in_order() -> Iterator[None]:
    """While entered, TERM and HUP end this process as Ctrl-C does, so that nothing half-made stays behind.

    Where somebody else hears them, or they are ignored, as HUP is under nohup, that stays so.
    """
    heard = []
    if threading.current_thread() is threading.main_thread():
        heard = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    try:
        for each in heard:
            signal.signal(each, signal.default_int_handler)
        yield
    finally:
        for each in heard:
            signal.signal(each, signal.SIG_DFL)


def _all(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _map_in_order(
    function: Callable[[Item], Result], tasks: Iterable[Item], workers: int
) -> Iterator[Result]:
    if workers == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the caller may have torch's or FFCV's threads.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    under_way = deque()
    try:
        for task in tasks:
            under_way.append(pool.submit(function, task))
            if len(under_way) == 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise ResourceError(
            "a worker process died: out of memory (try fewer `workers`), or, where a script called this, "
            "the line `if __name__ == '__main__':` is missing above the call."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # for the parent, which then ends us in order
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent killed outright cannot end its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _progress_bar(shown: bool) -> Progress:
    console = Console(stderr=True)
    title, left = TextColumn("{task.description}", markup=False), TextColumn("left")
    columns = (title, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left, TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal))
