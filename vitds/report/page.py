"""The page of a run: one HTML file that needs nothing else. It only lays out what it is given."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from vitds.report.curves import charts
from vitds.report.lines import legend_mark
from vitds.report.overview import overview
from vitds.report.scatter import class_marks, scatter, together
from vitds.report.theory import theory_of_run
from vitds.runs.directory import Run

# Of one run; theory only where it was measured.
SECTIONS = {
    "result": "Result",
    "data": "Data and split",
    "curves": "Curves",
    "theory": "Alignment and similarities",
    "crops": "What the network saw",
    "neighbours": "Nearest neighbours",
    "classes": "Classes and confusions",
    "looks": "Where it looks",
    "map": "Map of the features",
}
# What jobs/gallery.py gives; nothing of it where the images are not at hand.
PICTURES = ("crops", "query", "k", "bank_images", "neighbours", "confusions", "looks", "map", "missing")
SECTIONS_OF_SEVERAL = {"runs": "Runs", "curves": "Curves"}


def page_of_run(run: Run, pictures: dict[str, Any]) -> str:
    """The HTML of one run.

    Args:
        run: finished.
        pictures: of jobs/gallery.py.
    Raises: RunError if a file of the run cannot be read.
    """
    facts, theory = overview(run, pictures), theory_of_run(run)
    found = pictures.get("map")
    drawing, points = scatter(found) if found else (None, None)
    test = facts["data"].get("test") if facts["data"] else None
    odd = {each["kind"]: each["count"] for each in (test or {"findings": ()})["findings"]}
    return _rendered(
        f"{'/'.join(run.path.absolute().parts[-2:])}: {facts['command_name']}",
        [run],
        {id: name for id, name in SECTIONS.items() if id != "theory" or theory},
        several=None,
        result=None,
        run=facts,
        theory=theory,
        pictures=dict.fromkeys(PICTURES) | pictures,
        missing=f"Not shown here, as the images are not at hand: {pictures.get('missing')}.",
        copies=odd.get("leak", 0),
        look_alikes=odd.get("near_duplicate", 0),
        map=drawing,
        points=points,
        map_legend=class_marks(found) if found else [],
        together=together(found) if found else None,
    )


def page_of_runs(runs: Sequence[Run], table: dict[str, Any]) -> str:
    """The HTML of several runs beside each other.

    Args:
        runs: finished.
        table: of jobs/report.py: `keys` of the settings that differ, `rows`, `groups`.
    """
    return _rendered(f"{len(runs)} runs", runs, SECTIONS_OF_SEVERAL, several=table, result=None)


@dataclass(frozen=True)
class ResultTable:
    """What stands on top of an experiment's page.

    Attributes:
        title: of the page.
        caption: of the table: what the figures are.
        columns: headings; the first is of the rows' names.
        rows: as text.
        notes: paragraphs below it.
        picture: PNG, drawn from the same figures; None for none.
    """

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    picture: bytes | None = None

    @property
    def picture_url(self) -> str:
        """For the page, which asks for no other file."""
        return f"data:image/png;base64,{base64.b64encode(self.picture or b'').decode()}"


def page_of_experiment(result: ResultTable, runs: Sequence[Run], table: dict[str, Any]) -> str:
    """The HTML of an experiment: its result, all runs, and the curves of some.

    Args:
        result: the table on top.
        runs: whose curves are drawn.
        table: of all runs, as for page_of_runs.
    """
    sections = {"experiment": "Result", **SECTIONS_OF_SEVERAL}
    return _rendered(result.title, runs, sections, several=table, result=result)


def _rendered(title: str, runs: Sequence[Run], sections: dict[str, str], **parts: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # at the top it costs every start 0.3 s

    # What is missing from `parts` is a fault of ours and no empty place on the page; `is defined` asks.
    environment = Environment(
        loader=PackageLoader("vitds", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    names = [str(run.path) for run in runs]
    return environment.get_template("page.html").render(
        title=title,
        contents=list(sections.items()),
        style=Markup(style),
        script=Markup(script),
        # The browser runs this script and no other one, whatever else may stand on the page.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=charts(runs, names),
        legend=[(legend_mark(order), name) for order, name in enumerate(names)],
        **parts,
    )
