"""Text on pictures, in any script that a font of this machine has; other letters as their code points
(U+4E2D).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from PIL import ImageDraw, ImageFont

LINE_PX = 14
ASCII_FONT = ImageFont.load_default(LINE_PX - 2)  # comes with Pillow, and has no letters but Latin ones


class Lettering:
    """Writes on one picture.

    Attributes:
        escaped: letters that were written as code points, as no font has all of their line.
    """

    def __init__(self, pen: ImageDraw.ImageDraw) -> None:
        self._pen = pen
        self.escaped: set[str] = set()

    def write(self, corner: tuple[int, int], lines: str, width_px: int) -> None:
        """Lines of text below `corner`, black; what is wider than `width_px` ends in dots."""
        left, top = corner
        for line in lines.split("\n"):
            font = _font_for(line)
            if font is None:
                self.escaped.update(letter for letter in line if not letter.isascii())
                line = escaped(line)
                font = ASCII_FONT
            self._pen.text((left, top), _cut(line, font, width_px), "black", font)
            top += LINE_PX


def wrapped(text: str, width_px: int) -> list[str]:
    """The text in lines of at most `width_px`, broken between words."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def escaped(text: str) -> str:
    """The text with every letter beyond ASCII as its code point."""
    return "".join(letter if letter.isascii() else f"U+{ord(letter):04X} " for letter in text).rstrip()


def _width(text: str) -> float:
    font = _font_for(text)
    return font.getlength(text) if font else ASCII_FONT.getlength(escaped(text))


def _cut(line: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    if font.getlength(line) <= width_px:
        return line
    kept = next(
        n for n in range(len(line) - 1, -1, -1) if n == 0 or font.getlength(f"{line[:n]}...") <= width_px
    )
    return f"{line[:kept]}..."


def _font_for(text: str) -> ImageFont.FreeTypeFont | None:
    """The first font that has all letters of a text; None if there is none."""
    needed = frozenset(ord(letter) for letter in text if not letter.isascii() and not letter.isspace())
    if not needed:
        return ASCII_FONT
    path = next((path for path in _font_files() if needed <= _letters_of(path)), None)
    return ImageFont.truetype(path, ASCII_FONT.size) if path else None


def _font_files() -> Iterator[str]:
    """DejaVu Sans, which comes with matplotlib, then whatever this machine has."""
    from matplotlib import font_manager  # at the top it costs every start 0.4 s

    yield font_manager.findfont("DejaVu Sans")
    yield from sorted(font_manager.findSystemFonts())


@functools.cache
def _letters_of(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except Exception:  # a font file that is damaged, or of a kind that FreeType does not read
        return frozenset()
