"""Which image comes when: one permutation of 0..N-1 an epoch, of which ranks take slices.

The permutation is a pure function of (seed, epoch). It is padded to whole steps of G images with its first
images once more, which are not real (weight 0). A step's G images are cut in order into chunks of K. Rank r
takes chunks [r·A·m, (r+1)·A·m), its micro step a the a-th m of them. So the images of a step are the same for
any number of ranks, and an epoch may start at any step without reading what came before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitds import rng
from vitds.errors import SettingsError
from vitds.rng import Purpose

PAGE_BYTES = 8 << 20  # what a network disk reads well in one go
PAGES_A_RUN = 16  # 128 MiB: about 4,500 photographs of 256 px as JPEG, 500 as raw pixels


class MicroBatch(NamedTuple):
    """The images that one rank works on at once, and where in the run they come.

    Attributes:
        images: (B,) positions in the file.
        is_real: (B,) False for the repeats that pad the last step of an epoch.
        epoch: part of the key of the images' draws.
        step: optimizer step since the start of the run.
        micro_step: 0..A-1, within the step.
    """

    images: NDArray[np.int64]
    is_real: NDArray[np.bool_]
    epoch: int
    step: int
    micro_step: int


def steps_per_epoch(images: int, global_images: int) -> int:
    """Steps in which each of the N images comes once; the last one may be padded."""
    # Rounded up.
    return -(-images // global_images)


def accumulation_steps(global_images: int, *, chunk_images: int, ranks: int, micro_images: int) -> int:
    """A, the micro steps of one rank in one step: G / (R · micro_images).

    Raises: SettingsError if ranks or micro batch do not divide the step into whole chunks (lists what would).
    """
    # A chunk is never cut: ranks share out whole ones.
    chunks = global_images // chunk_images
    if chunks % ranks:
        fits = [count for count in range(1, chunks + 1) if chunks % count == 0]
        raise SettingsError(
            f"{ranks} ranks cannot share the {chunks} chunks of a step (batch.global_images {global_images} "
            f"/ batch.chunk_images {chunk_images}) evenly. Start {fits} ranks, or change batch.global_images "
            "or batch.chunk_images"
        )
    own = chunks // ranks
    if micro_images % chunk_images or own % (micro_images // chunk_images):
        fits = [chunk_images * m for m in range(1, own + 1) if own % m == 0]
        raise SettingsError(
            f"batch.micro_images {micro_images} does not cut a rank's {own} chunks of {chunk_images}; "
            f"it may be {fits}"
        )
    return global_images // (ranks * micro_images)


def epoch_order(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch: a permutation of 0..N-1, every one equally likely."""
    return rng.permutation(images, Purpose.ORDER, seed, epoch)


def page_order(
    offsets: NDArray[np.int64],
    seed: int,
    epoch: int,
    *,
    page_bytes: int = PAGE_BYTES,
    pages_a_run: int = PAGES_A_RUN,
) -> NDArray[np.int64]:
    """An order that reads a large file in runs of whole pages.

    It is for sets larger than memory on a disk with slow random access. The file is cut into pages of
    page_bytes; an image belongs to the page its bytes begin in. The pages come in random order. pages_a_run
    of them in a row make a run, within which the images come in random order. So at most one run of the file
    (and its neighbour) is in use at a time. The price is mixing: an image meets only images of its own run in
    an epoch, and those of its own page in every epoch (neighbours in the file, often of one class). FFCV's
    quasi-random order has the same idea, but keeps generator state; this one is a function of its arguments.

    Args:
        offsets: (N,) where each image's bytes begin in the file.
    Returns: (N,) a permutation of 0..N-1.
    """
    # page: for each image the number of its page among those that hold any.
    pages, page = np.unique(np.asarray(offsets) // page_bytes, return_inverse=True)
    # A permutation says which page comes at a place; its inverse, at which place a page comes.
    place = np.argsort(rng.permutation(len(pages), Purpose.ORDER, seed, epoch, 0))
    # (N,) the run that each image comes in.
    run = place[page] // pages_a_run
    # By run, then by a random word: lexsort takes the last key as the first to sort by.
    return np.lexsort((rng.words(Purpose.ORDER, seed, epoch, 1, np.arange(len(offsets))), run))


def rank_positions(
    order: NDArray[np.int64],
    *,
    global_images: int,
    rank: int,
    ranks: int,
    micro_images: int,
    start_step: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The images of one rank from step start_step of the epoch to its end, a row a micro step.

    Args:
        order: (N,) the epoch's permutation.
        start_step: step within the epoch, 0..steps_per_epoch.
    Returns: ((T, B) index, (T, B) is_real) with T = A times the steps left, B = micro_images.
    """
    own = global_images // ranks
    # Only what is left of the epoch.
    steps = np.arange(start_step, steps_per_epoch(len(order), global_images))
    # (steps, 1) + (own,) -> places in the order of this rank's images: one run of them in each step.
    place = steps[:, None] * global_images + rank * own + np.arange(own)
    # Places beyond the end pad the last step: the epoch's first images come again, but do not count. Not one
    # image over and over: a backbone's BatchNorm sees these rows too.
    is_real = place < len(order)
    index = order[place % len(order)]
    # (steps, own) -> (T, B): cut in order, so a micro batch is a run as well.
    return index.reshape(-1, micro_images), is_real.reshape(-1, micro_images)


def training_batches(
    order_of: Callable[[int], NDArray[np.int64]],
    images: int,
    start_step: int,
    stop_step: int,
    *,
    global_images: int,
    rank: int,
    ranks: int,
    micro_images: int,
) -> Iterator[MicroBatch]:
    """What one rank works on in steps start_step .. stop_step - 1 of the run.

    It is lazy: one epoch's order at a time.

    Args:
        order_of: an epoch's order, (N,), as epoch_order or page_order make it.
        images: N.
    """
    accumulation = global_images // (ranks * micro_images)
    steps = steps_per_epoch(images, global_images)
    # From the epoch that start_step lies in to the one that ends with stop_step or after it.
    for epoch in range(start_step // steps, -(-stop_step // steps)):
        first = epoch * steps
        # A resume begins within an epoch, all others at their first step.
        start = max(start_step, first)
        index_TB, is_real_TB = rank_positions(
            order_of(epoch),
            global_images=global_images,
            rank=rank,
            ranks=ranks,
            micro_images=micro_images,
            start_step=start - first,
        )
        # The last epoch may be left before its end.
        for micro in range(min(len(index_TB), (stop_step - start) * accumulation)):
            step, micro_step = divmod(micro, accumulation)
            yield MicroBatch(index_TB[micro], is_real_TB[micro], epoch, start + step, micro_step)


def evaluation_batches(
    images: NDArray[np.int64], *, batch_images: int, rank: int, ranks: int
) -> Iterator[MicroBatch]:
    """One rank's share of the given images, each once, in the given order; the last batch may be short.

    Each rank gets one run of them. Where there are fewer images than ranks, some ranks get none.
    """
    # Runs differ by one image at most, and none is left out or repeated.
    own = images[len(images) * rank // ranks : len(images) * (rank + 1) // ranks]
    for step, start in enumerate(range(0, len(own), batch_images)):
        batch = own[start : start + batch_images]
        yield MicroBatch(batch, np.ones(len(batch), bool), epoch=0, step=step, micro_step=0)
