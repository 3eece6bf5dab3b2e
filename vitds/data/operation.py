"""The FFCV decoder operation: an image is decoded once, or read from the map, and all its views are cut."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import no_type_check

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from numpy.typing import NDArray

from vitds.data.beton import BetonFile
from vitds.data.ffcv_import import AllocationQuery, Operation, State
from vitds.errors import DataError
from vitds.kernels.views import JPEG, RAW, cut_stored, kernel_error

SpecsOf = Callable[[NDArray[np.int64], NDArray[np.int64]], Shaped[np.ndarray, "B V"]]
FILLING = 128  # where an image could not be decoded: neither black nor what was in the buffer before

_CALLBACK = ctypes.CFUNCTYPE(*[ctypes.c_int64] * 6)


class CutViews(Operation):
    """The views of each image of a batch, (B, V, 3, S, S) uint8 RGB, and its status (B,) int32.

    The status is 0, or the kernels' error code for an image that cannot be decoded, whose views are grey.

    An index beyond N is an image in a later epoch: index = epoch · N + image. So what comes out is a function
    of the indices alone, and batches may be made by several threads at once.

    Works in `ffcv.Loader` as it is, with pipelines={"image": PipelineSpec("image", decoder=CutViews(...)),
    "index": None, "label": None}. Its indices end at N, so set `epoch` before each epoch, as for torch's
    DistributedSampler. What FFCV compiles is one call of `_cut_addresses` with five addresses, in 0.1 s. All
    tables lie in memory that this object owns for its life, so nothing in the compiled code can go stale.

    Args:
        file: the .beton that the loader reads.
        specs_of: images (B,), epochs (B,) -> view specs (B, V); a pure function (draws.py).
        views: V.
        crop_px: S.

    Attributes:
        epoch: added to every index's epoch.
        failure: the exception that ended a batch, if one did; compiled code cannot carry it.
    """

    def __init__(self, file: BetonFile, specs_of: SpecsOf, *, views: int, crop_px: int) -> None:
        super().__init__()
        self.epoch = 0
        self.failure: BaseException | None = None
        self._file = file
        self._specs_of = specs_of
        self._shape = (views, 3, crop_px, crop_px)
        # Once for all images: a batch then only indexes tables.
        # Where each part of the file begins in memory: the first where FFCV maps it, the others here.
        self._others = [np.memmap(part, np.uint8, "r") for part in file.parts[1:]]
        self._storages = np.where(file.is_jpeg, JPEG, RAW).astype(np.int32)
        # Kept in an attribute: a ctypes callback that is collected is an address to nowhere.
        self._callback = _CALLBACK(self._cut_addresses)

    def declare_state_and_memory(
        self, previous_state: State
    ) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        """FFCV's question for the output's shape; asked again at every epoch."""
        # FFCV makes both (B, ...), once for each slot of the ring.
        pixels = AllocationQuery(self._shape, np.dtype(np.uint8))
        status = AllocationQuery((), np.dtype(np.int32))
        return replace(previous_state, jit_mode=True, shape=self._shape, dtype=pixels.dtype), (pixels, status)

    def generate_code(self) -> Callable:
        """FFCV's question for a function that numba can compile; asked again at every epoch."""
        # A local name: numba compiles what the function closes over, and knows no `self`.
        cut = self._callback

        @no_type_check  # numba cannot compile the checks that the tests' import hook adds
        def decode(batch_indices, destination, metadata, storage_state):
            """All views of a batch, into the slot that FFCV gives."""
            count = len(batch_indices)
            pixels, status = destination
            failed = cut(
                batch_indices.ctypes.data,
                count,
                storage_state[0].ctypes.data,
                pixels.ctypes.data,
                status.ctypes.data,
            )
            if failed != 0:
                raise ValueError("the views could not be cut; the operation's attribute `failure` says why")
            # The last batch of an evaluation may be shorter than its slot.
            return pixels[:count], status[:count]

        return decode

    def cut(
        self,
        indices: NDArray[np.int64],
        base: int,
        pixels: UInt8[np.ndarray, "B V 3 S S"],
        status: Int[np.ndarray, " B"],
    ) -> None:
        """Fill pixels and status for the images at `indices` of the file whose first part lies at `base`.

        Raises: ResourceError if memory is out, ShapeError if a view spec is wrong (names the file and the
            image).
        """
        file = self._file
        # index = epoch · N + image, as RunIterator._make wrote it.
        epochs, images = np.divmod(indices, file.images)
        # All draws of the batch, before any pixel: (B, V) of VIEW_SPEC.
        specs = self._specs_of(images, epochs + self.epoch)
        # Addresses in the maps: nothing is copied on the way to the kernels.
        bases = np.array([base, *(other.ctypes.data for other in self._others)])
        stored = (bases[file.part[images]] + file.offsets[images], file.sizes[images], self._storages[images])
        cut_stored(*stored, file.heights[images], file.widths[images], specs, pixels, status)
        # None in most batches. A damaged picture must not leave what the slot held before.
        for row in np.flatnonzero(status):
            error = kernel_error(int(status[row]), f"{file.path}, {file.describe(int(images[row]))}")
            if not isinstance(error, DataError):  # not the picture's fault, so no other one would do better
                raise error
            pixels[row] = FILLING

    def _cut_addresses(self, indices: int, count: int, base: int, pixels: int, status: int) -> int:
        """What the compiled code calls. ctypes takes the GIL for it, and frees it while the kernels work."""
        try:
            self.cut(
                _array_at(indices, np.int64, (count,)),
                base,
                _array_at(pixels, np.uint8, (count, *self._shape)),
                _array_at(status, np.int32, (count,)),
            )
        except BaseException as error:  # an exception cannot pass through compiled code
            self.failure = error
            return 1
        return 0


def _array_at(address: int, dtype: type, shape: tuple[int, ...]) -> NDArray:
    """The array that lies at an address; its memory is the caller's."""
    # No copy: FFCV's memory by its address, seen as an array for this one call.
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)
