"""Loading a compiled part of vitds: a plain shared library beside this file, called with ctypes."""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitds.errors import ResourceError


def find_library(folder: Path, name: str) -> Path | None:
    """The library `name*.so` that this Python's build made, else the first; None where there is none.

    A wheel's libraries serve any Python, and are called after the one that built them.
    """
    own = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    return own if own.exists() else min(folder.glob(f"{name}*.so"), default=None)


def load_library(folder: Path, name: str, signatures: Mapping[str, tuple[Any, Sequence[Any]]]) -> ctypes.CDLL:
    """The library of `find_library`, with its functions' result and argument types set.

    Args:
        signatures: by function, the ctypes type of its result and those of its arguments.
    Raises: ResourceError if it was not built or cannot be loaded (names the command that builds it).
    """
    path = find_library(folder, name)
    if path is None:
        raise ResourceError(
            f"The compiled kernels are missing: there is no {name}*.so in {folder}. "
            "Run `bash launch/setup_env.sh`."
        )
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise ResourceError(
            f"The compiled kernels cannot be loaded: {error}. Run `bash launch/setup_env.sh`."
        ) from error
    # Without its types ctypes passes int as 32 bits, and would cut an address in two.
    for function, (result, arguments) in signatures.items():
        getattr(lib, function).restype, getattr(lib, function).argtypes = result, arguments
    return lib
