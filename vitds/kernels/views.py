"""The Python side of pixels.c: the table of plans, the compiled library, and calls with NumPy arrays.

`vitds/kernels/pixels.c` is compiled at installation into `_pixels*.so` beside this file. Nothing here draws, and nothing
knows a setting: plans and bytes go in, pixels come out. docs/kernels.md explains how the C side works.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitds.errors import ResourceError, ShapeError

RAW, JPEG = 0, 1
BILINEAR, BICUBIC = 0, 1
COLOUR_OPS = ("none", "brightness", "contrast", "saturation", "hue")
POLICY_OPS = (
    "none", "invert", "cutout", "sharpness", "autocontrast", "posterize", "shear_x", "shear_y", "translate_x", "translate_y",
    "rotate", "equalize", "contrast", "colour", "solarize", "brightness",
)

VIEW_PLAN = np.dtype(
    [
        ("top", "<i4"), ("left", "<i4"), ("height", "<i4"), ("width", "<i4"),  # source box in pixels, inside the picture
        ("resized_height", "<i4"), ("resized_width", "<i4"),  # the whole box is resized to this
        ("out_top", "<i4"), ("out_left", "<i4"),  # and this side x side window of it is kept
        ("filter", "<i4"), ("flip", "<i4"),
        ("colour_order", "u1", (4,)),  # indices into COLOUR_OPS
        ("brightness", "<f4"), ("contrast", "<f4"), ("saturation", "<f4"),  # factors, 0 to 3
        ("hue", "<f4"),  # turns, -0.5 to 0.5
        ("grey", "<i4"),
        ("blur_sigma", "<f4"),  # pixels of the view, 0 for none
        ("policy_op", "<i4", (2,)),  # indices into POLICY_OPS
        ("policy_value", "<f4", (2,)),  # degrees, fraction of the side, factor, bits, threshold or pixels
        ("cutout_centre", "<f4", (2,)),  # y, x as fractions of the side
    ]
)  # fmt: skip
"""One row a view, the same bytes as ViewPlan in pixels.c, which says what each field means."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES = {
    "vitds_error": (ctypes.c_char_p, [ctypes.c_int]),
    "vitds_scratch_new": (_POINTER, []),
    "vitds_scratch_free": (None, [_POINTER]),
    "vitds_views": (ctypes.c_int, [_POINTER, _LONG, _INT, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _LONG, _POINTER]),
    "vitds_batch": (ctypes.c_int, [_POINTER] * 6 + [_INT] * 3 + [_POINTER, _LONG, _POINTER, _INT, _INT, _POINTER]),
    "vitds_decode": (ctypes.c_int, [_POINTER, _LONG, _INT, _INT, _INT, _POINTER, _LONG, _POINTER]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, with argument types set: its functions can be called from Python and from numba's compiled code.

    Raises: ResourceError if the library was not built or cannot be loaded (names the command that builds it).
    """
    found = sorted(Path(__file__).parent.glob("_pixels*.so"))
    if not found:
        raise ResourceError(f"the pixel kernels are not built: no _pixels*.so in {Path(__file__).parent}. Run `bash launch/setup_env.sh`.")
    try:
        lib = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise ResourceError(f"the pixel kernels cannot be loaded: {error}. Run `bash launch/setup_env.sh`.") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def error_text(code: int) -> str:
    """What an error code of the kernels means."""
    return library().vitds_error(code).decode()


_idle_scratches: list[int] = []


@contextmanager
def scratch() -> Iterator[int]:
    """The address of a scratch for the kernels, for one thread at a time; kept for the next caller afterwards."""
    address = _idle_scratches.pop() if _idle_scratches else library().vitds_scratch_new()
    if not address:
        raise ResourceError("out of memory for the pixel kernels' scratch.")
    try:
        yield address
    finally:
        _idle_scratches.append(address)


def cut_views(
    sources: Sequence[bytes | NDArray[np.uint8]],
    storages: Sequence[int] | NDArray[np.int32],
    sizes: Sequence[tuple[int, int]] | NDArray[np.int32],
    plans: NDArray[np.void],
    side_px: int,
    out: NDArray[np.uint8] | None = None,
    status: NDArray[np.int32] | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Cut and colour all views of a batch of stored pictures.

    Args:
        sources: B stored pictures: JPEG bytes, or raw RGB of height * width * 3 bytes.
        storages: (B,) RAW or JPEG.
        sizes: (B, 2) height and width in pixels.
        plans: (B, V) of VIEW_PLAN.
        side_px: side S of every view.
        out: (B, V, 3, S, S) uint8, C-contiguous; made here if None.
        status: (B,) int32; made here if None.
        threads: how many threads share the batch; the result does not depend on it.

    Returns: out and status. status[b] is 0, or the error code of a sample that could not be used, whose views in `out` are then
        undefined; `require_good` turns it into an exception. One damaged sample does not stop the others.
    Raises: ShapeError if the arrays do not fit together. ResourceError if the kernels are not built.
    """
    samples = len(sources)
    if plans.dtype != VIEW_PLAN or plans.ndim != 2 or len(plans) != samples:
        raise ShapeError(f"plans must be ({samples}, views) of VIEW_PLAN, one row a source; got {plans.shape} of {plans.dtype}.")
    shape = (samples, plans.shape[1], 3, side_px, side_px)
    out = np.empty(shape, np.uint8) if out is None else out
    status = np.empty(samples, np.int32) if status is None else status
    for name, array, dtype, wanted in (("out", out, np.uint8, shape), ("status", status, np.int32, (samples,))):
        if array.dtype != dtype or array.shape != wanted or not array.flags.c_contiguous:
            raise ShapeError(f"{name} must be a contiguous {wanted} array of {np.dtype(dtype)}; got {array.shape} of {array.dtype}.")
    views = [np.frombuffer(source, np.uint8) if isinstance(source, bytes) else np.ascontiguousarray(source) for source in sources]
    addresses = np.array([view.ctypes.data for view in views], np.int64)
    lengths = np.array([view.nbytes for view in views], np.int64)
    storages, sizes, plans = np.asarray(storages, np.int32), np.asarray(sizes, np.int32).reshape(samples, 2), np.ascontiguousarray(plans)
    heights, widths = np.ascontiguousarray(sizes[:, 0]), np.ascontiguousarray(sizes[:, 1])
    tables = [array.ctypes.data for array in (addresses, lengths, storages, heights, widths, plans)]

    def cut(part: int) -> int:
        first, last = samples * part // threads, samples * (part + 1) // threads
        with scratch() as memory:
            return library().vitds_batch(
                *tables, samples, plans.shape[1], side_px, out.ctypes.data, out.nbytes, status.ctypes.data, first, last, memory
            )

    if threads == 1:
        codes = [cut(0)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            codes = list(pool.map(cut, range(threads)))
    for code in codes:
        if code:
            raise ShapeError(f"the batch cannot be cut: {error_text(code)} ({samples} samples, {plans.shape[1]} views, side {side_px} px).")
    return out, status
