"""The Python side of softmax.c: softmax of rows of logits in place, by the addresses of their memory."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from vitds.kernels.library import load_library

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
# The numbers are those of softmax.c.
_FINDS, _STORES = 1, 2


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel. Import torch first, so that it takes torch's OpenMP and with it torch's threads.

    Raises: ResourceError if the library was not built or cannot be loaded (names the command that builds it).
    """
    # logits, is_bf16, rows, columns, does, highest, above, threads
    arguments = [_POINTER, _INT, _LONG, _LONG, _INT, _POINTER, _POINTER, _INT]
    return load_library(Path(__file__).parent, "_softmax", {"vitds_softmax": (None, arguments)})


def softmax_rows(
    logits: int,
    *,
    is_bf16: bool,
    rows: int,
    columns: int,
    highest: int,
    above: int,
    finds: bool,
    stores: bool,
    threads: int,
) -> None:
    """Of each crop's logits in a tile the highest one and, above that, the log-sum-exp; and their softmax.

    Args:
        logits: address of rows x columns contiguous numbers, bfloat16 or float32.
        is_bf16: which of the two.
        rows: of the matrix of logits: the crops.
        columns: the tile's rows of the head.
        highest: address of a float32 number for each crop.
        above: likewise.
        finds: whether the two are found; else they are read, as they were found before.
        stores: whether logits give way to their softmax.
        threads: that share the crops.
    Raises: ResourceError if the library was not built or cannot be loaded.
    """
    # One call does either or both: forward finds and may store, backward stores alone.
    does = _FINDS * finds | _STORES * stores
    library().vitds_softmax(logits, is_bf16, rows, columns, does, highest, above, threads)
