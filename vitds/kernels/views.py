"""The Python side of pixels.c: the table of view specs, the compiled library, and calls with NumPy arrays.

`vitds/kernels/pixels.c` is compiled at installation into `_pixels*.so` beside this file. Nothing here draws,
and nothing knows a setting: view specs and bytes go in, pixels come out. docs/kernels.md explains how the C
side works.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitds.errors import DataError, ResourceError, ShapeError, VitdsError
from vitds.kernels.library import load_library

# The numbers and orders from here to VIEW_SPEC are those of pixels.h.
JPEG, RAW = 0, 1  # how a picture is stored: FFCV's numbers, which a .beton holds
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

# 96 bytes without gaps: pixels.h asserts the size, and all numbers are little-endian.
VIEW_SPEC = np.dtype(
    [
        ("top", "<i4"), ("left", "<i4"), ("height", "<i4"), ("width", "<i4"),  # box in the picture, pixels
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
"""One row a view, the same bytes as ViewSpec in C, which says what each field means."""

# Arrays travel as the address of their first number.
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES = {
    "vitds_error": (ctypes.c_char_p, [_INT]),
    "vitds_scratch_new": (_POINTER, []),
    "vitds_scratch_free": (None, [_POINTER]),
    # Six tables of inputs; samples, views, side; out and its bytes, status, scratch. The order is pixels.h's.
    "vitds_views": (_INT, [*[_POINTER] * 6, *[_INT] * 3, _POINTER, _LONG, _POINTER, _POINTER]),
    "vitds_decode": (_INT, [_POINTER, _LONG, _INT, _INT, _INT, _POINTER, _LONG, _POINTER]),
}
# Of the error codes in pixels.h those that are not the caller's fault.
_OF_THE_PICTURE = range(-5, -1)  # BAD_KIND, BAD_SIZE, DAMAGED, BAD_LENGTH
_NO_MEMORY = -8


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, with argument types set.

    Raises: ResourceError if the library was not built or cannot be loaded (names the command that builds it).
    """
    return load_library(Path(__file__).parent, "_pixels", _SIGNATURES)


def error_text(code: int) -> str:
    """What an error code of the kernels means."""
    return library().vitds_error(code).decode()


def kernel_error(code: int, where: str) -> VitdsError:
    """The exception for an error code.

    It is a DataError for a picture, a ResourceError for memory, a ShapeError for view specs and arrays.

    Args:
        code: a negative number that a kernel returned or left in `status`.
        where: what it was about, e.g. "flowers.beton, image 17"; the message begins with it.
    """
    # The class decides what a caller may do: leave an image out, or give up.
    kind = DataError if code in _OF_THE_PICTURE else ResourceError if code == _NO_MEMORY else ShapeError
    return kind(f"{where}: {error_text(code)}.")


# Those that no thread uses now. They are never freed: there are as many as were in use at once.
_idle_scratches: list[int] = []


@contextmanager
def scratch() -> Iterator[int]:
    """The address of a scratch for the kernels, for one thread at a time.

    It is kept for the next caller afterwards.

    Raises: ResourceError if memory is out.
    """
    # Two threads may look here at once; a list's pop and append are whole operations under the GIL.
    try:
        address = _idle_scratches.pop()
    except IndexError:
        address = library().vitds_scratch_new()
    # NULL comes as None.
    if not address:
        raise kernel_error(_NO_MEMORY, "the pixel kernels' scratch")
    try:
        # One call at a time: who asks within the `with` gets another scratch.
        yield address
    finally:
        _idle_scratches.append(address)


def _require_array(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    # C follows addresses and knows no shapes: what does not fit would read or write elsewhere.
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ShapeError(
            f"{name} must be a C-contiguous {shape} array of {np.dtype(dtype)}; "
            f"it is {array.shape} of {array.dtype}."
        )


def cut_stored(
    addresses: NDArray[np.int64],
    lengths: NDArray[np.int64],
    storages: NDArray[np.int32],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    specs: np.ndarray,
    out: NDArray[np.uint8],
    status: NDArray[np.int32],
) -> None:
    """Cut and colour all views of a batch of pictures that lie somewhere in memory.

    A sample that cannot be used does not stop the others.

    Args:
        addresses: (B,) where each stored picture begins: JPEG bytes, or raw RGB of height * width * 3 bytes.
        lengths: (B,) its bytes.
        storages: (B,) JPEG or RAW.
        heights: (B,) pixels.
        widths: (B,) pixels.
        specs: (B, V) of VIEW_SPEC.
        out: (B, V, 3, S, S), C-contiguous: the views.
        status: (B,) becomes 0, or the error code of a sample that could not be used, whose views are then
            undefined; `kernel_error` makes an exception of it.
    Raises: ShapeError if the arrays do not fit together or a number is out of range. ResourceError if the
        kernels are not built or memory is out.
    """
    # Everything is checked here, where a message can still name it.
    samples = len(addresses)
    if specs.dtype != VIEW_SPEC or specs.ndim != 2 or len(specs) != samples:
        raise ShapeError(
            f"specs must be ({samples}, views) of VIEW_SPEC, one row a source; "
            f"it is {specs.shape} of {specs.dtype}."
        )
    # V and S come from the tables themselves, so they cannot contradict them.
    views, side_px = specs.shape[1], out.shape[-1]
    for name, table in {"addresses": addresses, "lengths": lengths}.items():
        _require_array(name, table, np.int64, (samples,))
    for name, table in {"storages": storages, "heights": heights, "widths": widths}.items():
        _require_array(name, table, np.int32, (samples,))
    _require_array("out", out, np.uint8, (samples, views, 3, side_px, side_px))
    _require_array("status", status, np.int32, (samples,))
    # A reference to each, or the copy of specs could be gone before C reads it.
    tables = (addresses, lengths, storages, heights, widths, np.ascontiguousarray(specs))
    inputs = [table.ctypes.data for table in tables]
    # Results go straight into the caller's memory, such as the loader's ring of buffers.
    outputs = (out.ctypes.data, out.nbytes, status.ctypes.data)
    with scratch() as memory:
        # ctypes frees the GIL for the call, so other threads train, draw or cut meanwhile.
        code = library().vitds_views(*inputs, samples, views, side_px, *outputs, memory)
    # Only what is wrong with the batch as a whole: a picture's own error is in its status.
    if code:
        raise kernel_error(code, f"a batch of {samples} images, {views} views, side {side_px} px")


def cut_views(
    sources: Sequence[bytes | NDArray[np.uint8]],
    storages: Sequence[int] | NDArray[np.int32],
    sizes: Sequence[tuple[int, int]] | NDArray[np.int32],
    specs: np.ndarray,
    side_px: int,
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """`cut_stored` for pictures that are Python's own.

    Args:
        sources: B stored pictures.
        storages: (B,) JPEG or RAW.
        sizes: (B, 2) height and width in pixels.
        specs: (B, V) of VIEW_SPEC.
        side_px: side S of every view.

    Returns: the views (B, V, 3, S, S), and each sample's status (B,).
    Raises: as cut_stored.
    """
    stored = [_as_array(source) for source in sources]  # kept until the kernels have read them
    # int64, the width of a pointer in pixels.h.
    addresses = np.array([one.ctypes.data for one in stored], np.int64)
    lengths = np.array([one.nbytes for one in stored], np.int64)
    heights, widths = np.array(sizes, np.int32).reshape(-1, 2).T.copy()  # two rows without gaps
    # (B, V, 3, S, S), planes: as the network takes them, with no transposition to come.
    out = np.empty((*specs.shape, 3, side_px, side_px), np.uint8)
    # Not filled: the kernel writes each one.
    status = np.empty(len(stored), np.int32)
    cut_stored(addresses, lengths, np.asarray(storages, np.int32), heights, widths, specs, out, status)
    return out, status


def decode(source: bytes | NDArray[np.uint8], storage: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The whole stored picture, (H, W, 3) uint8 RGB, as the kernels see it.

    Args:
        source: JPEG bytes, or raw RGB of height * width * 3 bytes.
        storage: JPEG or RAW.
        size: height and width in pixels, as recorded.
    Raises: DataError if it is damaged, of another size, or a JPEG without a direct way to RGB.
    """
    stored = _as_array(source)
    # (H, W, 3), as pictures are stored, and not in planes like views.
    out = np.empty((*size, 3), np.uint8)
    with scratch() as memory:
        code = library().vitds_decode(
            stored.ctypes.data, stored.nbytes, storage, *size, out.ctypes.data, out.nbytes, memory
        )
    if code:
        raise kernel_error(code, f"a picture of {size[0]} x {size[1]} px in {stored.nbytes} bytes")
    return out


def _as_array(source: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    # No copy of bytes; an array is copied only where it has gaps.
    return np.frombuffer(source, np.uint8) if isinstance(source, bytes) else np.ascontiguousarray(source)
