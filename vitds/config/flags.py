"""The flags of the training commands, once: command line, Python functions and job all take these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from vitds.errors import VitdsError


@dataclass(frozen=True)
class TrainFlags:
    """What `vitds pretrain` and `vitds finetune` take.

    Args:
        recipe: a name from `vitds recipes`, or a YAML file (default: the embedded digits' recipe)
        data: the .beton file to train on
        test: the .beton file to evaluate on at the end
        run: the run directory (default runs/RECIPE-N, the next free number)
        init: a run directory, checkpoint or weights file to begin from; without it training starts from
            scratch
        ds_config: a DeepSpeed JSON file, or the name of a packaged one: zero0 to zero3, zero2_offload,
            zero3_offload, large_1gpu, large_8gpu, large_64gpu (default zero0)
        epochs: passes over the images (default the recipe's)
        seed: of every random draw (default the recipe's)
        set: one setting, as in --set optimizer.lr_peak=1e-3; may be repeated
    """

    recipe: str | None = None
    data: str | None = None
    test: str | None = None
    run: str | None = None
    init: str | None = None
    ds_config: str | None = None
    epochs: int | None = None
    seed: int | None = None
    set: tuple[str, ...] = ()


@contextmanager
def as_arguments() -> Iterator[None]:
    """Errors from within speak of Python's arguments, `argument epochs`, and not of flags."""
    names = "|".join(field.name for field in fields(TrainFlags))
    try:
        yield
    except VitdsError as error:
        error.args = (re.sub(rf"(?<![\w-])--({names})\b", r"argument \1", str(error)),)
        raise
