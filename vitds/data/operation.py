"""The FFCV decoder operation: an image is decoded once, or read from the map, and all its views are cut from it in C."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, no_type_check

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from vitds.data.beton import BetonFile
from vitds.data.ffcv_import import AllocationQuery, Operation, State
from vitds.errors import DataError
from vitds.kernels.views import error_text, library, scratch

PlanViews = Callable[[NDArray[np.int64], int], Shaped[np.ndarray, "B V"]]
PARTS_A_WORKER = 4  # a batch is cut into so many parts a worker, so that a slow image does not keep the others waiting
FILLING = 128  # mid-grey, where a damaged image was left out

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


class CutViews(Operation):
    """All views of each image of a batch, (B, V, 3, S, S) uint8 RGB.

    What FFCV compiles is one call of `_cut_addresses` with three addresses; it takes 0.1 s. The tables, plans and scratch lie in
    memory that this object owns for its life, so nothing in the compiled code can go stale from one epoch to the next.

    Use in `ffcv.Loader` as it is: pipelines={"image": PipelineSpec("image", decoder=CutViews(...)), "index": None, "label": None}.
    Set `epoch` before each epoch, as torch's DistributedSampler wants it. Our own loader does that (loader.py).

    Args:
        file: the .beton that the loader reads.
        plan_views: (indices (B,), epoch) -> plans (B, V); a pure function (draws.py).
        views, crop_px: V and S.
        workers: threads that share a batch. The pixels do not depend on it.
        damaged: what to do about an image that cannot be decoded. fatal: DataError. skip: its views are grey, `status` tells.

    Attributes:
        epoch: goes to plan_views. status: (B,) of the latest batch, 0 or the kernels' error code.
        failure: the exception that ended the latest batch, if one did; compiled code cannot carry it.
    """

    def __init__(
        self,
        file: BetonFile,
        plan_views: PlanViews,
        *,
        views: int,
        crop_px: int,
        workers: int = 1,
        damaged: Literal["fatal", "skip"] = "fatal",
    ) -> None:
        super().__init__()
        self.epoch = 0
        self.status = np.zeros(0, np.int32)
        self.failure: BaseException | None = None
        self._file, self._plan_views, self._damaged = file, plan_views, damaged
        self._shape = (views, 3, crop_px, crop_px)
        self._storages = file.is_jpeg.astype(np.int32)
        self._parts = 1 if workers == 1 else PARTS_A_WORKER * workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vitds-cut")
        self._callback = _CALLBACK(self._cut_addresses)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """FFCV's question for the output's shape; asked again at every epoch."""
        dtype = np.dtype(np.uint8)
        return replace(previous_state, jit_mode=True, shape=self._shape, dtype=dtype), AllocationQuery(self._shape, dtype)

    def generate_code(self) -> Callable:
        """FFCV's question for a function that numba can compile; asked again at every epoch."""
        cut = self._callback

        @no_type_check  # numba cannot compile the checks that the tests' import hook adds
        def decode(batch_indices, destination, metadata, storage_state):
            count = len(batch_indices)
            if cut(batch_indices.ctypes.data, count, storage_state[0].ctypes.data, destination.ctypes.data) != 0:
                raise ValueError("the views could not be cut; the operation's attribute `failure` says why")
            return destination[:count]

        return decode

    def cut(self, indices: NDArray[np.int64], base: int, out: NDArray[np.uint8]) -> None:
        """Fill out (B, V, 3, S, S) with the views of the images at `indices` of the file that is mapped at address `base`.

        Raises: DataError if an image cannot be decoded and `damaged` is fatal (names the file and the images).
        """
        file = self._file
        plans = np.ascontiguousarray(self._plan_views(indices, self.epoch))
        tables = [base + file.offsets[indices], file.sizes[indices]]
        tables += [self._storages[indices], file.heights[indices], file.widths[indices], plans]
        status = np.empty(len(indices), np.int32)
        addresses, (views, _, crop_px, _) = [table.ctypes.data for table in tables], self._shape

        def cut_part(part: int) -> int:
            first, last = (len(indices) * edge // self._parts for edge in (part, part + 1))
            with scratch() as memory:
                return library().vitds_batch(
                    *addresses, len(indices), views, crop_px, out.ctypes.data, out.nbytes, status.ctypes.data, first, last, memory
                )

        codes = [cut_part(0)] if self._parts == 1 else list(self._pool.map(cut_part, range(self._parts)))
        if any(codes):
            raise RuntimeError(f"the kernels refuse the batch: {error_text(min(codes))}")
        self.status = status
        if status.any():
            self._leave_out(indices, out)

    def _leave_out(self, indices: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        bad = np.flatnonzero(self.status)
        if self._damaged == "fatal":
            named = sorted({int(indices[row]): error_text(int(self.status[row])) for row in bad}.items())
            listed = "; ".join(f"image {index}: {text}" for index, text in named)
            raise DataError(
                f"{self._file.path}: {listed}. `vitds data verify {self._file.path}` lists all such images; build the file again, "
                "or train without them with `--set data.damaged=skip`"
            )
        out[bad] = FILLING

    def _cut_addresses(self, indices: int, count: int, base: int, out: int) -> int:
        """What the compiled code calls. ctypes takes the GIL for it, and the kernels give it back while they work."""
        try:
            index_B = np.frombuffer((ctypes.c_int64 * count).from_address(indices), np.int64)
            size = count * int(np.prod(self._shape))
            out_BVCSS = np.frombuffer((ctypes.c_uint8 * size).from_address(out), np.uint8).reshape(count, *self._shape)
            self.cut(index_B, base, out_BVCSS)
        except BaseException as error:  # an exception cannot pass through compiled code
            self.failure = error
            return 1
        return 0
