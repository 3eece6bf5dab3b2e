"""Loading a compiled part of vitds: a plain shared library beside this file, called with ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitds.errors import ResourceError


def load_library(folder: Path, name: str, signatures: Mapping[str, tuple[Any, Sequence[Any]]]) -> ctypes.CDLL:
    """The library `name*.so` in a folder, with its functions' result and argument types set.

    Args:
        signatures: by function, the ctypes type of its result and those of its arguments.
    Raises: ResourceError if it was not built or cannot be loaded (names the command that builds it).
    """
    # The name goes on with Python's version and the platform: glob for it, take the first.
    found = sorted(folder.glob(f"{name}*.so"))
    if not found:
        raise ResourceError(
            f"The compiled kernels are missing: there is no {name}*.so in {folder}. "
            "Run `bash launch/setup_env.sh`."
        )
    try:
        lib = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise ResourceError(
            f"The compiled kernels cannot be loaded: {error}. Run `bash launch/setup_env.sh`."
        ) from error
    # Without its types ctypes passes int as 32 bits, and would cut an address in two.
    for function, (result, arguments) in signatures.items():
        getattr(lib, function).restype, getattr(lib, function).argtypes = result, arguments
    return lib
