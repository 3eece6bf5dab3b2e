"""The rows of docs/results.md: docs/results/NAME.json says how a row was made and what came out.

`vitds reproduce` makes a row again. docs/results/add.py writes rows and the page.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from vitds.config.methods import Command
from vitds.errors import DataError

ROWS = Path(__file__).parents[1] / "results"  # a link to docs/results in a checkout, a folder in a wheel
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@checked_dataclass(frozen=True, config=_STRICT)
class RowStage:
    """One training of a row: the words that start it.

    Attributes:
        command: pretrain or finetune.
        recipe: by its name.
        epochs: of it.
        set: further settings, KEY=VALUE.
        data: the file that it is trained on, if that is not all that is not held out.
    """

    command: Command
    recipe: str
    epochs: int
    set: tuple[str, ...] = ()
    data: str | None = None


@checked_dataclass(frozen=True, config=_STRICT)
class RowFigure:
    """Top-1 in percent.

    Attributes:
        seeds: of the runs.
        mean: over the seeds.
        deviation: over the seeds; None of one.
        interval: 95 %, of the mean.
        majority: of always answering the most frequent class.
        top1: of each seed; older rows have none.
    """

    seeds: tuple[int, ...]
    mean: float
    deviation: float | None
    interval: tuple[float, float]
    majority: float
    top1: tuple[float, ...] = ()


@checked_dataclass(frozen=True, config=_STRICT)
class Row:
    """A row of the results.

    Attributes:
        title: as the page has it.
        table: in which of the page's tables it stands.
        set: the published set, as `vitds data build` knows it.
        side: short side in pixels that it was built with; None for the images' own.
        stages: in order; each begins from the weights of the one before.
        seconds: of one seed, all stages.
        held_out: top-1 on images held out of the training images.
        test: top-1 on the official test images.
        losses: for each stage the training loss of the first seed, means of twenty parts of the run; older
            rows have none.
    """

    title: str
    table: str
    set: str
    side: int | None
    stages: tuple[RowStage, ...]
    seconds: float | None = None
    held_out: RowFigure | None = None
    test: RowFigure | None = None
    losses: tuple[tuple[float, ...], ...] = ()


ROW_JSON: TypeAdapter[Row] = TypeAdapter(Row)


def read_row(path: Path) -> Row:
    """Raises: DataError if the file is missing or is no row (names the file and what is wrong)."""
    try:
        return ROW_JSON.validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is no row of results: {place}: {first['msg']}") from None


def _text(figure: RowFigure) -> str:
    spread = "" if figure.deviation is None else f" ± {figure.deviation:.1f}"
    low, high = figure.interval
    seeds = f"{len(figure.seeds)} seed{'s' * (len(figure.seeds) != 1)}"
    return f"{figure.mean:.1f}{spread} % ({low:.1f} to {high:.1f}), {seeds}"


def stored_text(row: Row) -> str:
    """What a row says, as `33.3 ± 0.4 % (28.4 to 37.5), 3 seeds`."""
    if row.test is not None:
        return _text(row.test)
    if row.held_out is not None:
        return f"not measured on the test images; on held-out ones {_text(row.held_out)}"
    return "not run yet"
