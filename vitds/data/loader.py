"""From a .beton to batches of uint8 crops: FFCV's executor, with the order, the stopping and the errors of a training run.

    rank_positions -> which images     CutViews (operation.py) -> their pixels     CropBatch -> the engine

FFCV's own loader makes an order an epoch, waits for ever when its thread fails, and goes on running when it is left early. The
subclasses here run through the steps of a whole run, hand every exception over, and end their threads when they are closed.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from queue import Full
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from vitds.batch import CropBatch
from vitds.config.tree import Settings, Views
from vitds.data.beton import BetonFile
from vitds.data.draws import centre_views, draw_views
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
from vitds.data.order import accumulation_steps, epoch_order, page_order, rank_positions, steps_per_epoch
from vitds.errors import DataError
from vitds.kernels.views import error_text

BATCHES_AHEAD = 1  # made and waiting, beside the one that each worker makes
READ_AHEAD = 2  # batches announced to the kernel before they are made
POLL_S = 0.2  # how soon a waiting thread sees that it shall stop

_log = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """A batch to be made: images (B,), the epoch of their draws, and whatever the consumer wants back with it."""

    images: NDArray[np.int64]
    epoch: int
    ticket: Any = None


class MadeBatch(NamedTuple):
    """A batch as it lies in the ring of buffers: pixels (B, V, 3, S, S), and status (B,), 0 where an image is sound."""

    batch: MicroBatch
    pixels: NDArray[np.uint8]
    status: NDArray[np.int32]


@dataclass(frozen=True)
class EvalBatch:
    """Some images as evaluation sees them. The pixels are valid until the next batch is asked for."""

    crops: UInt8[Tensor, "B 3 S S"]
    index: Int[Tensor, " B"]
    label: Int[Tensor, " B"]


class TrainLoader:
    """The batches of one rank, for the steps of a whole run.

    Args:
        file: the training set. settings: of the run (data, views, batch, mix, seed).
        micro_images: B, images of one micro step of one rank.

    Attributes:
        steps_per_epoch: optimizer steps in which each image comes once. accumulation: A, micro steps of one step.
        damaged: images that could not be decoded and were left out so far (data.damaged skip), with the reason.

    A damaged image that is skipped comes as grey with is_real False, so its weight is 0 and nothing is mixed with it. The step's
    divisor stays the one known from the order, so that no rank has to be asked: its step counts for a little less, by 1 / G.

    Raises: SettingsError if ranks or micro batch do not divide a step.
    """

    def __init__(
        self, file: BetonFile, settings: Settings, *, rank: int, ranks: int, micro_images: int
    ) -> None:
        self.accumulation = accumulation_steps(
            settings.batch.global_images,
            chunk_images=settings.batch.chunk_images,
            ranks=ranks,
            micro_images=micro_images,
        )
        self.steps_per_epoch = steps_per_epoch(file.images, settings.batch.global_images)
        self.damaged: dict[int, str] = {}
        self._file, self._settings, self._rank, self._ranks, self._micro_images = (
            file,
            settings,
            rank,
            ranks,
            micro_images,
        )
        operation = CutViews(file, self._specs_of, views=settings.views.count, crop_px=settings.views.crop_px)
        self._loader = RunLoader(file, operation, batch_images=micro_images, workers=settings.data.workers)

    def batches(self, start_step: int, stop_step: int) -> Generator[CropBatch, None, None]:
        """`accumulation` batches for each step start_step .. stop_step - 1 of the run, in order, across epochs.

        The crops lie in a ring of buffers: **a batch is valid until the next one is asked for**; copy what is kept longer. A copy
        to a GPU that was begun on the current stream is waited for. Closing the generator, or any exception, ends its thread;
        starting another one ends the one before.

        Raises: DataError if an image cannot be decoded (names file and image) and data.damaged is fatal.
        """
        with closing(self._loader.run(self._schedule(start_step, stop_step))) as running:
            for batch, pixels, status in running:
                step, micro_step, is_real = batch.ticket
                epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
                global_images, chunk_images = (
                    self._settings.batch.global_images,
                    self._settings.batch.chunk_images,
                )
                yield CropBatch(
                    crops=torch.from_numpy(pixels),
                    index=torch.from_numpy(batch.images.copy()),
                    label=torch.from_numpy(self._file.labels[batch.images]),
                    is_real=torch.from_numpy(is_real & self._note_damaged(batch.images, status)),
                    epoch=epoch,
                    step=step,
                    first_chunk=(self._rank * self.accumulation + micro_step)
                    * (self._micro_images // chunk_images),
                    real_images=min(global_images, self._file.images - step_in_epoch * global_images),
                )

    def _schedule(self, start_step: int, stop_step: int) -> Iterator[MicroBatch]:
        """What the executor's thread makes, lazily: one epoch's order at a time."""
        for epoch in range(start_step // self.steps_per_epoch, -(-stop_step // self.steps_per_epoch)):
            first = epoch * self.steps_per_epoch
            start = max(start_step, first)
            index_TB, is_real_TB = rank_positions(
                self._order(epoch),
                global_images=self._settings.batch.global_images,
                rank=self._rank,
                ranks=self._ranks,
                micro_images=self._micro_images,
                start_step=start - first,
            )
            for micro in range(min(len(index_TB), (stop_step - start) * self.accumulation)):
                step, micro_step = divmod(micro, self.accumulation)
                yield MicroBatch(index_TB[micro], epoch, (start + step, micro_step, is_real_TB[micro]))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._settings.data.order == "pages":
            return page_order(self._file.offsets, self._settings.seed, epoch)
        return epoch_order(self._file.images, self._settings.seed, epoch)

    def _specs_of(self, images: NDArray[np.int64], epochs: NDArray[np.int64]) -> Shaped[np.ndarray, "B V"]:
        heights, widths = self._file.heights[images], self._file.widths[images]
        return draw_views(
            self._settings.views, heights, widths, seed=self._settings.seed, epoch=epochs, images=images
        )

    def _note_damaged(self, images: NDArray[np.int64], status: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(B,) False where an image is left out; each is reported once. Raises: DataError if data.damaged is fatal."""
        if status.any():
            if self._settings.data.damaged == "fatal":
                raise _damaged(self._file, images, status)
            for row in np.flatnonzero(status):
                image, text = int(images[row]), error_text(int(status[row]))
                if image not in self.damaged:
                    self.damaged[image] = text
                    _log.warning(
                        "%s: image %d is left out: %s (%d so far)",
                        self._file.path,
                        image,
                        text,
                        len(self.damaged),
                    )
        return status == 0


def eval_batches(
    file: BetonFile,
    views: Views,
    *,
    batch_images: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 1,
    indices: NDArray[np.int64] | None = None,
    damaged: Literal["fatal", "skip"] = "fatal",
) -> Generator[EvalBatch, None, None]:
    """One rank's share of the images in file order as evaluation sees them: short side S·256/224 bicubic, centre crop (METHOD 4.5).

    Args:
        views: of the recipe; its crop_px is S.
        indices: positions to take, in this order; None: all. Each rank gets one run of them; fewer images than ranks leave some none.
        damaged: skip leaves images that cannot be decoded out of their batch, with a warning.
    Raises: DataError if an image cannot be decoded (names file and image) and damaged is fatal.
    """
    taken = np.arange(file.images) if indices is None else np.asarray(indices, np.int64)
    own = taken[len(taken) * rank // ranks : len(taken) * (rank + 1) // ranks]

    def specs_of(images: NDArray[np.int64], epochs: NDArray[np.int64]) -> Shaped[np.ndarray, "B V"]:
        return centre_views(views.crop_px, file.heights[images], file.widths[images])

    operation = CutViews(file, specs_of, views=1, crop_px=views.crop_px)
    loader = RunLoader(file, operation, batch_images=batch_images, workers=workers)
    schedule = (
        MicroBatch(own[start : start + batch_images], epoch=0) for start in range(0, len(own), batch_images)
    )
    with closing(loader.run(schedule)) as running:
        for (images, _, _), pixels, status in running:
            crops = pixels[:, 0]
            if status.any():
                if damaged == "fatal":
                    raise _damaged(file, images, status)
                _log.warning(
                    "%s: left out, as they cannot be decoded: images %s",
                    file.path,
                    images[status != 0].tolist(),
                )
                images, crops = images[status == 0], crops[status == 0]
            yield EvalBatch(
                torch.from_numpy(crops),
                torch.from_numpy(images.copy()),
                torch.from_numpy(file.labels[images]),
            )


def _damaged(file: BetonFile, images: NDArray[np.int64], status: NDArray[np.int32]) -> DataError:
    named = sorted({int(images[row]): error_text(int(status[row])) for row in np.flatnonzero(status)}.items())
    listed = "; ".join(f"image {image}: {text}" for image, text in named)
    return DataError(
        f"{file.path}: {listed}. `vitds data verify {file.path}` lists all such images; build the file again, "
        "or train without them with `--set data.damaged=skip`"
    )


class RunLoader(ffcv.Loader):
    """An ffcv.Loader for one output, the views, whose batches are given instead of an order an epoch.

    FFCV's constructor is not called: it makes tables of N Python sets (585 MB and 3.3 s at 1.28 million images) and compiles a
    reader of samples (0.6 s), neither of which our operation uses. Nor is anything else compiled by numba: there is no loop over
    samples left outside the kernels, and each compilation would cost 0.1 s and 1.3 MB that are never given back.
    """

    def __init__(self, file: BetonFile, operation: CutViews, *, batch_images: int, workers: int) -> None:
        self.file, self.batch_size, self.num_workers = file, batch_images, workers
        self.batches_ahead = BATCHES_AHEAD + workers
        self.reader = Reader(str(file.path))
        self.memory_manager = MappedFile(self.reader)
        self.operation = operation
        places = {name: place for place, name in enumerate(self.reader.handlers)}
        pipeline = {"image": PipelineSpec("image", decoder=operation)}
        self.graph = Graph(pipeline, self.reader.handlers, places, self.reader.metadata, memory_read=None)
        with uncompiled():
            self.generate_code()
        self._running: RunIterator | None = None

    def run(self, schedule: Iterable[MicroBatch]) -> RunIterator:
        """Start making the scheduled batches; ends what this loader was making before."""
        if self._running is not None:
            self._running.close()
        self._running = RunIterator(self, read_ahead(self.file, schedule))
        return self._running


def read_ahead(file: BetonFile, schedule: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """The same batches; the kernel is told of each READ_AHEAD batches before it is needed, and fetches all its images at once.

    Without it, a worker that meets pages that are not in memory waits for them one image after the other.
    """
    coming: deque[MicroBatch] = deque()
    with file.path.open("rb") as stream:
        for batch in schedule:
            for offset, size in zip(
                file.offsets[batch.images].tolist(), file.sizes[batch.images].tolist(), strict=True
            ):
                os.posix_fadvise(stream.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
            coming.append(batch)
            if len(coming) > READ_AHEAD:
                yield coming.popleft()
        yield from coming


class MappedFile:
    """FFCV's memory manager, as far as it is used: the file's map, which is at the same time the context of every epoch."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.ptrs = self.sizes = np.zeros(0, np.uint64)  # of FFCV's reader of samples, which is not compiled

    def schedule_epoch(self, batches: list) -> OSCacheContext:
        return OSCacheContext(self)


class RunIterator(EpochIterator):
    """FFCV's thread, fed by a schedule: workers make a batch each, exceptions reach the consumer, it can be closed at any time.

    The queue holds batches that are made or being made, in order. The ring has FFCV's batches_ahead + 2 slots: of the batches in
    the queue, of the one that waits to be put there, and of the one that the consumer has.
    """

    def __init__(self, loader: RunLoader, schedule: Iterable[MicroBatch]) -> None:
        self._schedule = schedule
        self._slots = loader.batches_ahead + 2
        self._copied: list[torch.cuda.Event | None] = [None] * self._slots
        self._given = 0
        self._pool = ThreadPoolExecutor(loader.num_workers, thread_name_prefix="vitds-cut")
        super().__init__(loader, order=())  # allocates the ring and starts the thread

    def run(self) -> None:
        """The thread: one slot of the ring after the other is filled by the next free worker."""
        try:
            for slot, batch in zip(cycle(range(self._slots)), self._schedule, strict=False):
                if not self._hand_over(self._pool.submit(self._make, slot, batch)):
                    return
            self._hand_over(None)
        except BaseException as error:  # of the schedule; the consumer's to see, whatever it is
            failed: Future[MadeBatch] = Future()
            failed.set_exception(error)
            self._hand_over(failed)

    def _make(self, slot: int, batch: MicroBatch) -> MadeBatch:
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        try:
            ((pixels, status),) = self.run_pipeline(
                0, batch.epoch * self.loader.file.images + batch.images, slot, None
            )
        except ValueError as error:
            raise self.loader.operation.failure or error from None
        return MadeBatch(batch, pixels, status)

    def _hand_over(self, item: Future[MadeBatch] | None) -> bool:
        """Put an item where the consumer takes it; False if the iterator was closed meanwhile."""
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
            self._copied[(self._given - 1) % self._slots].record()
        item = self.output_queue.get()
        if item is None:
            self.close()
            raise StopIteration
        self._given += 1
        try:
            return item.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads and wait for them; batches in work are finished, those that wait are not begun."""
        self.terminate_event.set()
        self.closed = True
        if self.is_alive():
            self.join()
        self._pool.shutdown(cancel_futures=True)
        # The ring, the map and the open file go now, and not at some collection.
        self.memory_allocations = self.memory_context = self.storage_state = self._schedule = None
