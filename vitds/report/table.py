"""A table on standard output, whatever is behind that."""

from __future__ import annotations

from rich.console import Console, RenderableType

from vitds.terminal import say


def show(what: RenderableType) -> None:
    """Print a table, or whatever else rich draws; a reader that is gone or an old encoding ends nothing.

    Text is printed as it is: classes and files may have [brackets] or :colons: in their names.
    """
    console = Console(markup=False, emoji=False)
    with console.capture() as drawn:
        console.print(what)
    say(drawn.get(), end="")
