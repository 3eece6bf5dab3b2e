"""A table on standard output, whatever is behind that."""

from __future__ import annotations

from rich.console import Console, RenderableType

from vitds.terminal import say

WIDE = 1_000  # columns


def show(what: RenderableType) -> None:
    """Print a table, or whatever else rich draws; a reader that is gone or an old encoding ends nothing.

    Text is printed as it is: classes and files may have [brackets] or :colons: in their names. Where no
    terminal sets a width, a row is one line, for `grep` and the like.
    """
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDE
    with console.capture() as drawn:
        console.print(what)
    say(drawn.get(), end="")
