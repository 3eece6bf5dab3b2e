"""The Python side of pixels.c: the table of view specs, the compiled library, and calls with NumPy arrays.

`vitds/kernels/pixels.c` is compiled at installation into `_pixels*.so` beside this file. Nothing here draws, and nothing
knows a setting: specs and bytes go in, pixels come out. docs/kernels.md explains how the C side works.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitds.errors import DataError, ResourceError, ShapeError, VitdsError
from vitds.kernels.library import load_library

JPEG, RAW = 0, 1  # how a picture is stored: FFCV's numbers, which a .beton holds and pixels.c reads
BILINEAR, BICUBIC = 0, 1
COLOUR_OPS = ("none", "brightness", "contrast", "saturation", "hue")
POLICY_OPS = (
    "none",
    "invert",
    "cutout",
    "sharpness",
    "autocontrast",
    "posterize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "equalize",
    "contrast",
    "colour",
    "solarize",
    "brightness",
)

VIEW_SPEC = np.dtype(
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
        ("solarise", "<i4"),  # levels from 128 on become 255 - level, before the policy
        ("policy_op", "<i4", (2,)),  # indices into POLICY_OPS
        ("policy_value", "<f4", (2,)),  # degrees, fraction of the side, factor, bits, threshold or pixels
        ("cutout_centre", "<f4", (2,)),  # y, x as fractions of the side
    ]
)  # fmt: skip
"""One row a view, the same bytes as ViewSpec in pixels.c, which says what each field means."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES = {
    "vitds_error": (ctypes.c_char_p, [_INT]),
    "vitds_scratch_new": (_POINTER, []),
    "vitds_scratch_free": (None, [_POINTER]),
    "vitds_views": (
        _INT,
        [_POINTER, _LONG, _INT, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _LONG, _POINTER],
    ),
    "vitds_batch": (_INT, [_POINTER] * 6 + [_INT] * 3 + [_POINTER, _LONG, _POINTER, _INT, _INT, _POINTER]),
    "vitds_decode": (_INT, [_POINTER, _LONG, _INT, _INT, _INT, _POINTER, _LONG, _POINTER]),
    "vitds_normalise": (_INT, [_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT, _POINTER, _LONG]),
}
_BAD_ARGUMENT, _BAD_LENGTH, _DAMAGED, _BAD_SIZE, _BAD_KIND, _BAD_BOX, _BAD_SPEC, _NO_MEMORY = range(
    -1, -9, -1
)
_OF_THE_PICTURE = (_BAD_LENGTH, _DAMAGED, _BAD_SIZE, _BAD_KIND)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, with argument types set: its functions can be called from Python and from numba's compiled code.

    Raises: ResourceError if the library was not built or cannot be loaded (names the command that builds it).
    """
    return load_library(Path(__file__).parent, "_pixels", _SIGNATURES)


def error_text(code: int) -> str:
    """What an error code of the kernels means."""
    return library().vitds_error(code).decode()


def kernel_error(code: int, where: str) -> VitdsError:
    """The exception for an error code: DataError for a picture, ResourceError for memory, ShapeError for specs and arrays.

    Args:
        code: a negative number that a kernel returned or left in `status`.
        where: what it was about, e.g. "flowers.beton, image 17"; the message begins with it.
    """
    kind = DataError if code in _OF_THE_PICTURE else ResourceError if code == _NO_MEMORY else ShapeError
    return kind(f"{where}: {error_text(code)}.")


_idle_scratches: list[int] = []


@contextmanager
def scratch() -> Iterator[int]:
    """The address of a scratch for the kernels, for one thread at a time; kept for the next caller afterwards.

    Raises: ResourceError if memory is out.
    """
    try:
        address = _idle_scratches.pop()
    except IndexError:
        address = library().vitds_scratch_new()
    if not address:
        raise kernel_error(_NO_MEMORY, "the pixel kernels' scratch")
    try:
        yield address
    finally:
        _idle_scratches.append(address)


def _require_array(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ShapeError(
            f"{name} must be a C-contiguous {shape} array of {np.dtype(dtype)}; it is {array.shape} of {array.dtype}."
        )


def cut_views(
    sources: Sequence[bytes | NDArray[np.uint8]],
    storages: Sequence[int] | NDArray[np.int32],
    sizes: Sequence[tuple[int, int]] | NDArray[np.int32],
    specs: np.ndarray,
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
        specs: (B, V) of VIEW_SPEC.
        side_px: side S of every view.
        out: (B, V, 3, S, S) uint8, C-contiguous; made here if None.
        status: (B,) int32; made here if None.
        threads: how many threads share the batch; the result does not depend on it.

    Returns: out and status. status[b] is 0, or the error code of a sample that could not be used, whose views are then
        undefined; `kernel_error` makes an exception of it. One damaged sample does not stop the others.
    Raises: ShapeError if the arrays do not fit together or a number is out of range. ResourceError if the kernels are not built.
    """
    samples = len(sources)
    if specs.dtype != VIEW_SPEC or specs.ndim != 2 or len(specs) != samples:
        raise ShapeError(
            f"specs must be ({samples}, views) of VIEW_SPEC, one row a source; it is {specs.shape} of {specs.dtype}."
        )
    views = specs.shape[1]
    out = np.empty((samples, views, 3, side_px, side_px), np.uint8) if out is None else out
    status = np.empty(samples, np.int32) if status is None else status
    _require_array("out", out, np.uint8, (samples, views, 3, side_px, side_px))
    _require_array("status", status, np.int32, (samples,))
    stored = [
        np.frombuffer(source, np.uint8) if isinstance(source, bytes) else np.ascontiguousarray(source)
        for source in sources
    ]
    heights_widths = np.asarray(sizes, np.int32).reshape(samples, 2).T
    columns = [[one.ctypes.data for one in stored], [one.nbytes for one in stored], storages, *heights_widths]
    dtypes = [np.int64, np.int64, np.int32, np.int32, np.int32]
    tables = [np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)] + [
        np.ascontiguousarray(specs)
    ]
    _require_array("storages", tables[2], np.int32, (samples,))

    def cut(part: int) -> int:
        first, last = samples * part // threads, samples * (part + 1) // threads
        with scratch() as memory:
            addresses, outputs = (
                [table.ctypes.data for table in tables],
                (out.ctypes.data, out.nbytes, status.ctypes.data),
            )
            return library().vitds_batch(*addresses, samples, views, side_px, *outputs, first, last, memory)

    with ThreadPoolExecutor(threads) as pool:
        for code in pool.map(cut, range(threads)):
            if code:
                raise kernel_error(
                    code, f"a batch of {samples} images, {views} views, side {side_px} px, {threads} threads"
                )
    return out, status


def decode(source: bytes | NDArray[np.uint8], storage: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The whole stored picture, (H, W, 3) uint8 RGB, as the kernels see it.

    Raises: DataError if it is damaged, of another size, or a JPEG without a direct way to RGB.
    """
    stored = np.frombuffer(source, np.uint8) if isinstance(source, bytes) else np.ascontiguousarray(source)
    out = np.empty((*size, 3), np.uint8)
    with scratch() as memory:
        code = library().vitds_decode(
            stored.ctypes.data, stored.nbytes, storage, *size, out.ctypes.data, out.nbytes, memory
        )
    if code:
        raise kernel_error(code, f"a picture of {size[0]} x {size[1]} px in {stored.nbytes} bytes")
    return out


def normalise(
    views: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: type[np.float32] | type[np.uint16] = np.float32,
) -> NDArray[np.float32] | NDArray[np.uint16]:
    """(level / 255 - mean) / std of each channel.

    Args:
        views: (..., 3, S, S) uint8, C-contiguous.
        mean, std: of the three channels, in units of 255 levels.
        dtype: np.float32, or np.uint16 for the bits of bfloat16, which NumPy lacks (`torch.from_numpy(x).view(torch.bfloat16)`).

    Returns: an array of the views' shape.
    Raises: ShapeError if views is not (..., 3, S, S) of uint8.
    """
    _require_array("views", views, np.uint8, (*views.shape[:-3], 3, *views.shape[-2:]))
    out = np.empty(views.shape, dtype)
    pixels = views.shape[-1] * views.shape[-2]
    images = views.size // (3 * pixels)
    moments = np.array([mean, std], np.float32)
    addresses = [row.ctypes.data for row in moments]
    code = library().vitds_normalise(
        views.ctypes.data,
        views.nbytes,
        images,
        pixels,
        *addresses,
        int(dtype is np.uint16),
        out.ctypes.data,
        out.nbytes,
    )
    if code:
        raise kernel_error(code, f"views of {views.shape}")
    return out
