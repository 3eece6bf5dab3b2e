"""Names that people give: the nearest valid one to a mistyped one, and those that cannot be written down."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Said of a name that `is_text` refuses.
NO_TEXT = (
    "is no UTF-8 text, which the files of a run cannot hold; rename the file or folder "
    "(or set LC_ALL=C.UTF-8)"
)


def nearest(word: str, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name most like `word`, or None where none is `cutoff` like it (1: equal)."""
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`did you mean NAME?`; where none is near, all of them: `one of: A, B`."""
    names = sorted(names)
    near = nearest(word, names)
    return f"did you mean {near}?" if near else f"one of: {', '.join(names)}"


def is_text(name: str) -> bool:
    """False of a file's name that is no UTF-8: settings, manifests and safetensors cannot hold or open it."""
    try:
        name.encode()
    except UnicodeEncodeError:  # Python holds the bytes that are no letters as lone surrogates
        return False
    return True
