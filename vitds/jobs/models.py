"""`vitds models [PATTERN]`: timm's models, what they make of a crop, and which sides they take."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import timm
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.models.facts import model_facts, published_side, side_step, trains
from vitds.report.table import show
from vitds.terminal import say


@dataclass(frozen=True)
class ModelRow:
    """One line of the table.

    Attributes:
        parameters: how many numbers it trains.
        width: D, of the features.
        side_step: crops may have any multiple of it as side, in pixels; 0 where only the published side
            works.
        published_px: side of its published weights.
        gflop: of one forward pass of one crop, a multiply-add counted as two.
        side_px: of that crop.
        drop_path: whether it takes backbone.drop_path above 0.
    """

    name: str
    parameters: int
    width: int
    side_step: int
    published_px: int
    gflop: float
    side_px: int
    drop_path: bool


def print_models(pattern: str, *, side_px: int | None = None, as_json: bool = False) -> list[ModelRow]:
    """Print a line a model, by name.

    Args:
        pattern: of names, with * for anything.
        side_px: at which operations are counted; None takes the side of each model's published weights.
        as_json: print one JSON object and nothing else.
    Raises: SettingsError if no model's name fits the pattern.
    """
    names = timm.list_models(pattern)
    if not names:
        raise SettingsError(
            f"no timm model's name fits {pattern!r}; * stands for anything, as in '*vit*tiny*'"
        )
    console = Console(stderr=True)
    rows = [
        model_row(name, side_px)
        for name in track(names, "asking the models", console=console, transient=True)
    ]
    if as_json:
        say(json.dumps({"rows": [asdict(row) for row in rows]}))
    else:
        _print_table(rows)
    return rows


def model_row(name: str, side_px: int | None = None) -> ModelRow:
    """What a timm model with default options is, asked of it."""
    settings = Backbone(name=name, drop_path=0)
    published_px = published_side(name)
    facts = model_facts(settings, side_px or published_px)
    return ModelRow(
        name=name,
        parameters=facts.parameters,
        width=facts.width,
        side_step=side_step(settings, published_px // 2),
        published_px=published_px,
        gflop=facts.flops / 1e9,
        side_px=side_px or published_px,
        drop_path=trains(settings.model_copy(update={"drop_path": 0.1}), published_px),
    )


def _print_table(rows: list[ModelRow]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))  # narrow: timm's names are long
    table.add_column("model", overflow="fold")
    for column in ("params", "width", "sides", "GFLOP", "at px", "drop path"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.parameters / 1e6:.2f}M",
            str(row.width),
            sides_text(row.side_step, row.published_px),
            f"{row.gflop:.3g}",
            str(row.side_px),
            "yes" if row.drop_path else "no",
        )
    show(table)


def sides_text(step: int, published_px: int) -> str:
    """Which sides a model takes, in a few letters: n stands for any whole number."""
    if not step:
        return f"{published_px} px"
    return "n px" if step == 1 else f"{step}n px"
