"""FFCV's executor, with the stopping and the errors of a training run: positions in, pixels out.

FFCV's own loader makes an order an epoch, waits for ever when its thread fails, and goes on running when it
is left early. The subclasses here run through the batches of a whole run, hand every exception over, and end
their threads when they are closed.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from queue import Full
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vitds.data.beton import BetonFile
from vitds.data.ffcv_import import (
    IS_CUDA,
    EpochIterator,
    Graph,
    OSCacheContext,
    PipelineSpec,
    Reader,
    ffcv,
    uncompiled,
)
from vitds.data.operation import CutViews
from vitds.data.order import MicroBatch

_log = logging.getLogger(__name__)

BATCHES_AHEAD = 1  # made and waiting, beside the one that each worker makes
READ_AHEAD = 2  # batches announced to the kernel before they are made
POLL_S = 0.2  # how soon a waiting thread sees that it shall stop


class MadeBatch(NamedTuple):
    """A batch as it lies in the ring of buffers.

    Attributes:
        batch: what was asked for.
        pixels: (B, V, 3, S, S).
        status: (B,) 0 where an image is sound, else the kernels' error code.
        beside: what RunLoader's `beside` made of them.
    """

    batch: MicroBatch
    pixels: NDArray[np.uint8]
    status: NDArray[np.int32]
    beside: Any


class RunLoader(ffcv.Loader):
    """An ffcv.Loader for one output, the views, whose batches are given instead of an order an epoch.

    FFCV's constructor is not called: it makes tables of N Python sets (585 MB and 3.3 s at 1.28 million
    images) and compiles a reader of samples (0.6 s), neither of which our operation uses. Nor is anything
    else compiled by numba: there is no loop over samples left outside the kernels, and each compilation would
    cost 0.1 s and 1.3 MB that are never given back.
    """

    def __init__(
        self,
        file: BetonFile,
        operation: CutViews,
        *,
        batch_images: int,
        workers: int,
        beside: Callable[[MicroBatch, NDArray[np.uint8], NDArray[np.int32]], Any] = lambda *made: None,
        copied_on: torch.cuda.Stream | None = None,
    ) -> None:
        # What the workers make of each batch, its pixels and its status.
        self.beside = beside
        # The stream on which a batch is copied to a card; None: the consumer's current one.
        self.copied_on = copied_on
        # These are the attributes that FFCV's generate_code and EpochIterator read.
        self.file = file
        self.batch_size = batch_images
        self.num_workers = workers
        # As many in work as there are workers, and BATCHES_AHEAD beside them.
        self.batches_ahead = BATCHES_AHEAD + workers
        self.reader = Reader(str(file.path))
        # FFCV asks it for a context each epoch; ours is the map of the whole file.
        self.memory_manager = MappedFile(self.reader)
        self.operation = operation
        places = {name: place for place, name in enumerate(self.reader.handlers)}
        pipeline = {"image": PipelineSpec("image", decoder=operation)}
        self.graph = Graph(pipeline, self.reader.handlers, places, self.reader.metadata, memory_read=None)
        # The pipeline is one call of C: numba has nothing to make faster.
        with uncompiled():
            self.generate_code()
        # One iteration at a time: the ring of buffers is the loader's only one.
        self._running: RunIterator | None = None

    def run(self, batches: Iterable[MicroBatch]) -> RunIterator:
        """Start making these batches; ends what this loader was making before."""
        if self._running is not None:
            self._running.close()
        self._running = RunIterator(self, read_ahead(self.file, batches))
        return self._running


def read_ahead(file: BetonFile, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """The same batches; the kernel hears of each of them READ_AHEAD batches early.

    So it fetches all images of a batch at once. Without it, a worker that meets pages that are not in memory
    waits for them one image after the other.
    """
    coming: deque[MicroBatch] = deque()
    with ExitStack() as stack:
        streams = [stack.enter_context(part.open("rb")).fileno() for part in file.parts]
        for batch in batches:
            # Lists of Python ints, which posix_fadvise takes.
            columns = (column[batch.images].tolist() for column in (file.part, file.offsets, file.sizes))
            for part, offset, size in zip(*columns, strict=True):
                os.posix_fadvise(streams[part], offset, size, os.POSIX_FADV_WILLNEED)
            # Asked for first, handed on READ_AHEAD batches later: the disk works in between.
            coming.append(batch)
            if len(coming) > READ_AHEAD:
                yield coming.popleft()
        yield from coming


class MappedFile:
    """FFCV's memory manager, as far as it is used: the map of the file's first part, which is
    every epoch's context too.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.ptrs = self.sizes = np.zeros(0, np.uint64)  # of FFCV's reader of samples, which is not compiled

    def schedule_epoch(self, batches: list) -> OSCacheContext:
        return OSCacheContext(self)


def on_device_of_this_thread() -> Callable[[], None]:
    """What a new thread does first: take this thread's card.

    A thread begins on card 0. FFCV asks for a stream there, which makes every other rank hold a context of
    half a gigabyte on the first one's card.
    """
    if not IS_CUDA:
        return lambda: None
    card = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(card)


def unpinned_note(memory: Mapping[str, Mapping[int, Any]]) -> str | None:
    """What to say where memory that was to be pinned is not; FFCV tries, and passes over a failure.

    Args:
        memory: as FFCV's Graph.allocate_memory returns it: by kind and node a buffer or several.
    """
    given = [buffers for nodes in memory.values() for buffers in nodes.values() if buffers is not None]
    arrays = [each for buffers in given for each in (buffers if isinstance(buffers, tuple) else (buffers,))]
    unpinned = sum(array.nbytes for array in arrays if not torch.from_numpy(array).is_pinned())
    if not unpinned:
        return None
    return (
        f"{unpinned / 1e6:.0f} MB of the loader's memory could not be pinned, so copies to the card wait for "
        "the host; `ulimit -l` may be low, or the host's memory full"
    )


class RunIterator(EpochIterator):
    """FFCV's thread, fed with batches. Exceptions reach the consumer, and it can be closed at any time.

    Each worker makes a batch at a time. The queue holds batches that are made or being made, in order. The
    ring has FFCV's batches_ahead + 2 slots: of the batches in the queue, of the one that waits to be put
    there, and of the one that the consumer has.
    """

    def __init__(self, loader: RunLoader, batches: Iterable[MicroBatch]) -> None:
        self._batches = batches
        self._slots = loader.batches_ahead + 2
        # On GPUs an event a slot, after which its copy to the device is done.
        self._copied: list[torch.cuda.Event | None] = [None] * self._slots
        self._given = 0
        # Before super().__init__, which starts the thread that uses them.
        self._pool = ThreadPoolExecutor(
            loader.num_workers, thread_name_prefix="vitds-cut", initializer=on_device_of_this_thread()
        )
        super().__init__(loader, order=())  # allocates the ring and starts the thread
        if IS_CUDA and (note := unpinned_note(self.memory_allocations)):
            _log.warning(note)

    def run(self) -> None:
        """The thread: one slot of the ring after the other is filled by the next free worker."""
        try:
            # In order: slots come round in the order in which the consumer gives them back.
            for slot, batch in zip(cycle(range(self._slots)), self._batches, strict=False):
                # The future is queued at once, so batches come out in order whichever worker is first.
                if not self._hand_over(self._pool.submit(self._make, slot, batch)):
                    return
            # The end, as FFCV says it.
            self._hand_over(None)
        except BaseException as error:  # of the order; the consumer's to see, whatever it is
            failed: Future[MadeBatch] = Future()
            failed.set_exception(error)
            self._hand_over(failed)

    def _make(self, slot: int, batch: MicroBatch) -> MadeBatch:
        # Its last copy to the GPU may still be reading this memory.
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        # FFCV passes indices and nothing else to an operation, so the epoch travels in them.
        indices = batch.epoch * self.loader.file.images + batch.images
        try:
            # Views of the slot's memory: the kernels have written there directly.
            ((pixels, status),) = self.run_pipeline(0, indices, slot, None)
        except ValueError as error:
            # Compiled code can only say that something failed; the operation keeps what it was.
            raise self.loader.operation.failure or error from None
        return MadeBatch(batch, pixels, status, self.loader.beside(batch, pixels, status))

    def _hand_over(self, item: Future[MadeBatch] | None) -> bool:
        """Put an item where the consumer takes it; False if the iterator was closed meanwhile."""
        # Not one put without a limit: where the consumer has left, nobody would ever wake this thread.
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=POLL_S)
                return True
            except Full:
                continue
        return False

    def __next__(self) -> MadeBatch:
        if self.closed:
            raise RuntimeError(
                "this iteration was closed, by its owner or because its loader was started again"
            )
        if self._given and IS_CUDA:  # the slot may be written again when copies from it are done
            self._copied[(self._given - 1) % self._slots] = torch.cuda.Event()
            self._copied[(self._given - 1) % self._slots].record(self.loader.copied_on)
        item = self.output_queue.get()
        if item is None:
            self.close()
            raise StopIteration
        self._given += 1
        try:
            # Waits until it is made; raises here what a worker raised.
            return item.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads and wait for them; batches in work are finished, those that wait are not begun."""
        self.terminate_event.set()
        self.closed = True
        # Soon: the thread looks at the event every POLL_S.
        if self.is_alive():
            self.join()
        self._pool.shutdown(cancel_futures=True)
        # The ring, the map and the open file go now, and not at some collection.
        self.memory_allocations = self.memory_context = self.storage_state = self._batches = None
