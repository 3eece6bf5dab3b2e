"""Predictions as rows of a table."""

from __future__ import annotations

from vitds.use.model import Prediction
from vitds.use.tables import Row

TOP = 3
_PLACES = ("", *(f"_{place}" for place in range(2, TOP + 1)))
SCHEMA = {
    "file": "text",
    **{
        f"{name}{place}": kind
        for place in _PLACES
        for name, kind in (("class", "text"), ("probability", "number"))
    },
    "reason": "text",
}  # file class probability class_2 probability_2 class_3 probability_3 reason


def row_of(prediction: Prediction) -> Row:
    """The row of one image; None stands where there is no value, no reason where the image was read."""
    row: Row = {**dict.fromkeys(SCHEMA), "file": prediction.file, "reason": prediction.reason}
    for place, name, probability in zip(_PLACES, prediction.classes, prediction.probabilities, strict=False):
        row |= {f"class{place}": name, f"probability{place}": probability}
    return row
