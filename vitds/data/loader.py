"""From a .beton to batches of uint8 crops: what training and evaluation read.

order.py says which images, operation.py makes their pixels in executor.py's threads, and here they become a
CropBatch or an EvalBatch.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from vitds.batch import CropBatch, Drawing
from vitds.config.tree import Settings, Views
from vitds.data.beton import BetonFile
from vitds.data.draws import centre_views, draw_views
from vitds.data.executor import MadeBatch, RunLoader
from vitds.data.operation import CutViews
from vitds.data.order import (
    MicroBatch,
    accumulation_steps,
    epoch_order,
    evaluation_batches,
    page_order,
    steps_per_epoch,
    training_batches,
)
from vitds.data.sheet import HostMemory, copied_ahead, on_sheet
from vitds.errors import DataError
from vitds.kernels.views import error_text

FAR_APART = 1 << 48  # bytes, more than any file has

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalBatch:
    """Some images as evaluation sees them. The pixels are valid until the next batch is asked for."""

    crops: UInt8[Tensor, "B 3 S S"]
    index: Int[Tensor, " B"]
    label: Int[Tensor, " B"]


class TrainLoader:
    """The batches of one rank, for the steps of a whole run.

    A damaged image that is skipped comes as grey with is_real False, so its weight is 0 and nothing is mixed
    with it. The step's divisor stays the one known from the order, so that no rank has to be asked: its step
    counts for a little less, by 1 / G.

    Args:
        file: the training set.
        settings: of the run (data, views, batch, seed).
        micro_images: B, images of one micro step of one rank.
        drawing: makes the draws of each batch, in the threads that make its crops; None: nobody does.
        device: that trains. A card gets crops and draws ahead of the step; this takes a `drawing`. None:
            batches stay on the host.

    Attributes:
        steps_per_epoch: optimizer steps in which each image comes once.
        accumulation: A, micro steps of one step.
        damaged: images that could not be decoded and were left out so far (data.damaged skip), by their
            number in the .beton, with the reason.

    Raises: SettingsError if ranks or micro batch do not divide a step.
    """

    def __init__(
        self,
        file: BetonFile,
        settings: Settings,
        *,
        rank: int,
        ranks: int,
        micro_images: int,
        drawing: Drawing | None = None,
        device: torch.device | None = None,
    ) -> None:
        batch, views = settings.batch, settings.views
        self.accumulation = accumulation_steps(
            batch.global_images, chunk_images=batch.chunk_images, ranks=ranks, micro_images=micro_images
        )
        self.steps_per_epoch = steps_per_epoch(file.images, batch.global_images)
        self.damaged: dict[int, str] = {}
        self._file = file
        self._settings = settings
        self._rank = rank
        self._ranks = ranks
        self._micro_images = micro_images
        self._drawing = drawing
        self._device = device
        self._copies = torch.cuda.Stream(device) if device and device.type == "cuda" else None
        self._memory = HostMemory(is_pinned=self._copies is not None)
        # The operation asks for draws by image and epoch: it needs no order, and any thread may run it.
        operation = CutViews(file, self._specs_of, views=views.count, crop_px=views.crop_px)
        self._loader = RunLoader(
            file,
            operation,
            batch_images=micro_images,
            workers=settings.data.threads,
            beside=self._crop_batch,
            copied_on=self._copies,
        )

    def batches(self, start_step: int, stop_step: int) -> Generator[CropBatch, None, None]:
        """`accumulation` batches for each step start_step .. stop_step - 1 of the run.

        They come in order, across epochs, and their crops lie in a ring of buffers: **a batch is valid until
        the next one is asked for**; copy what is kept longer. Where this loader does not copy to the card
        itself, a copy that was begun on the current stream is waited for. Closing the generator, or any
        exception, ends its thread; starting another one ends the one before.

        Raises: DataError if an image cannot be decoded (names file and image) and data.damaged is fatal.
        """
        # Lazy: an epoch's order is made when its first batch is due.
        order = training_batches(
            self._order,
            self._file.images,
            start_step,
            stop_step,
            global_images=self._settings.batch.global_images,
            rank=self._rank,
            ranks=self._ranks,
            micro_images=self._micro_images,
        )
        # However this ends, by an exception or by a consumer that leaves, the threads end too.
        with closing(self._loader.run(order)) as running:
            batches = self._noting_damaged(running)
            if self._copies is not None:
                batches = copied_ahead(batches, self._device, self._copies)
            yield from batches

    def _noting_damaged(self, running: Iterator[MadeBatch]) -> Iterator[CropBatch]:
        for made in running:
            self._note_damaged(made.batch.images, made.status)
            yield made.beside

    def _first_chunk(self, micro_step: int) -> int:
        """Chunks of the ranks before, then of this rank's micro steps before."""
        chunks = self._micro_images // self._settings.batch.chunk_images
        return (self._rank * self.accumulation + micro_step) * chunks

    def _crop_batch(
        self, batch: MicroBatch, pixels: UInt8[np.ndarray, "B V 3 S S"], status: NDArray[np.int32]
    ) -> CropBatch:
        """In a thread that makes crops."""
        sizes = self._settings.batch
        seen = batch.step % self.steps_per_epoch * sizes.global_images  # in this epoch, before this step
        made = CropBatch(
            # No copy: a view of the ring's slot, hence valid until the next batch.
            crops=torch.from_numpy(pixels),
            index=torch.from_numpy(batch.images.copy()),
            label=torch.from_numpy(self._file.labels[batch.images]),
            # A damaged image weighs nothing and is no partner, like one that pads.
            is_real=torch.from_numpy(batch.is_real & (status == 0)),
            epoch=batch.epoch,
            step=batch.step,
            first_chunk=self._first_chunk(batch.micro_step),
            # The last step of an epoch has what is left. From the order alone, so no rank has to ask another.
            real_images=min(sizes.global_images, self._file.images - seen),
        )
        if self._drawing is None:
            return made
        draws, sheet = on_sheet(self._drawing(made), self._memory)
        return replace(made, draws=draws, sheet=sheet)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._settings.data.order == "pages":
            # Parts lie far from one another, so that no page is in two of them.
            places = self._file.offsets + self._file.part * FAR_APART
            return page_order(places, self._settings.seed, epoch)
        return epoch_order(self._file.images, self._settings.seed, epoch)

    def _specs_of(self, images: NDArray[np.int64], epochs: NDArray[np.int64]) -> Shaped[np.ndarray, "B V"]:
        heights, widths = self._file.heights[images], self._file.widths[images]
        return draw_views(
            self._settings.views, heights, widths, seed=self._settings.seed, epoch=epochs, images=images
        )

    def _note_damaged(self, images: NDArray[np.int64], status: NDArray[np.int32]) -> None:
        """Report each image that is left out once.

        Raises: DataError if one is and data.damaged is fatal.
        """
        if status.any() and self._settings.data.damaged == "fatal":
            raise _damaged(self._file, images, status)
        for row in np.flatnonzero(status):
            image, text = int(self._file.index[images[row]]), error_text(int(status[row]))
            # Each epoch meets it again; one warning is enough.
            if image not in self.damaged:
                self.damaged[image] = text
                count, which = len(self.damaged), self._file.describe(int(images[row]))
                _log.warning("%s: %s is left out: %s (%d so far)", self._file.path, which, text, count)


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
    """One rank's share of the images in file order, one view each as draws.centre_views cuts it.

    Args:
        views: of the recipe; its crop_px is S.
        indices: positions to take, in this order; None: all. Each rank gets one run of them.
        damaged: skip leaves images that cannot be decoded out of their batch, with a warning.
    Raises: DataError if an image cannot be decoded (names file and image) and damaged is fatal.
    """
    taken = np.arange(file.images) if indices is None else np.asarray(indices, np.int64)

    def specs_of(images: NDArray[np.int64], epochs: NDArray[np.int64]) -> Shaped[np.ndarray, "B V"]:
        return centre_views(views.crop_px, file.heights[images], file.widths[images])

    operation = CutViews(file, specs_of, views=1, crop_px=views.crop_px)
    loader = RunLoader(file, operation, batch_images=batch_images, workers=workers)
    order = evaluation_batches(taken, batch_images=batch_images, rank=rank, ranks=ranks)
    with closing(loader.run(order)) as running:
        for batch, pixels, status, _ in running:
            # One view each: (B, 1, 3, S, S) -> (B, 3, S, S).
            images, crops = batch.images, pixels[:, 0]
            if status.any():
                if damaged == "fatal":
                    raise _damaged(file, images, status)
                left_out = ", ".join(file.describe(int(image)) for image in images[status != 0])
                _log.warning("%s: left out, as they cannot be decoded: %s", file.path, left_out)
                images, crops = images[status == 0], crops[status == 0]
            yield EvalBatch(
                crops=torch.from_numpy(crops),
                index=torch.from_numpy(images.copy()),
                label=torch.from_numpy(file.labels[images]),
            )


def _damaged(file: BetonFile, images: NDArray[np.int64], status: NDArray[np.int32]) -> DataError:
    # By number, each once, however often the padding repeats it.
    named = sorted({int(images[row]): error_text(int(status[row])) for row in np.flatnonzero(status)}.items())
    listed = "; ".join(f"{file.describe(image)}: {text}" for image, text in named)
    return DataError(
        f"{file.path}: {listed}. `vitds data verify {file.path}` lists all such images; build the file "
        "again, or train without them with `--set data.damaged=skip`"
    )
