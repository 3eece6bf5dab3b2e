"""Python's arguments in a message, `split` or `split=train`, as the flags that a command has for them,
--split and --split train.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitds.errors import VitdsError

RENAMED = {"side_px": "side", "among": "in"}  # arguments whose flag is called otherwise


@contextmanager
def as_flags(command: Callable[..., None]) -> Iterator[None]:
    """Errors from within speak of the command's flags; other words between backticks stay as they are.

    Args:
        command: the function behind the command; its keyword-only parameters are its flags.
    """
    parameters = inspect.signature(command).parameters.values()
    flags = {
        parameter.name.rstrip("_") for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }

    def flag(found: re.Match[str]) -> str:
        """What a message has in place of an argument's name: the flag, where the command has one."""
        name, value = RENAMED.get(found[1], found[1]), found[2]
        if name not in flags:
            return found[0]
        return f"--{name}" if value in (None, "True") else f"--{name} {shlex.quote(value)}"

    try:
        yield
    except VitdsError as error:
        error.args = (re.sub(r"`(\w+)(?:=([^`]*))?`", flag, str(error)),)
        raise
