"""What `vitds fit` leaves behind: the result on the test images, and how to use the model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich.table import Table

from vitds.errors import RunError
from vitds.report.table import show
from vitds.runs.directory import read_json
from vitds.terminal import say
from vitds.use.images import Images
from vitds.use.model import Prediction
from vitds.use.run import TrainedRun

SCRATCH = "scratch"  # the run that --compare adds


@dataclass(frozen=True)
class Result:
    """A fit: its folder, and the model in it.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def runs(self) -> dict[str, TrainedRun]:
        """Name -> run, in the order of training."""
        stages = read_json(self.path / "fit.json")["stages"]
        return {Path(stage["run"]).name: TrainedRun(Path(stage["run"])) for stage in stages}

    @property
    def run(self) -> TrainedRun:
        """The last run: the model to use.

        Raises: RunError if this was a plan, or it stopped before the first run.
        """
        runs = [run for name, run in self.runs.items() if name != SCRATCH]
        if not runs:
            raise RunError(f"{self.path}: nothing was trained yet")
        return runs[-1]

    @property
    def accuracy(self) -> float | None:
        """Top-1 on the test images, in percent; None without labels."""
        return self.run.summary.get("top1")

    @property
    def report(self) -> Path:
        """The page, one HTML file."""
        return self.path / "report.html"

    def predict(self, images: Images, top: int = 3) -> list[Prediction]:
        """As Model.predict."""
        return self.run.predict(images, top)

    def embed(self, images: Images) -> Float[np.ndarray, "M D"]:
        """As Model.embed."""
        return self.run.embed(images)


def print_result(result: Result) -> None:
    """The result, and the commands that use the model."""
    model = shlex.quote(str(result.run.path))
    # Not the sources: they may be several, or a published set, and `vitds similar` looks through one file.
    train = result.run.settings.data.train_text
    here = result.path / "data" / Path(train).name  # also where the folder has moved
    images = shlex.quote(str(here) if here.exists() else train)
    if result.accuracy is not None:
        show(_table(result))
        say(f"classify:   vitds predict {model} IMAGES")
    say(f"find alike: vitds similar {model} IMAGE --in {images}")
    say(f"features:   vitds embed {model} IMAGES --out features.npz")
    say(f"export:     vitds export timm {model} --out {shlex.quote(str(result.path / 'timm'))}")
    say(f"look at:    {result.report}")


def _table(result: Result) -> Table:
    table = Table(title=f"Test images of {result.path}")
    for column, justify in (("", "left"), ("top-1 %", "right"), ("95 %", "right"), ("seconds", "right")):
        table.add_column(column, justify=justify)
    for name, run in result.runs.items():
        summary = run.summary
        if "top1" in summary:
            low, high = summary["top1_interval"]
            table.add_row(
                name, f"{summary['top1']:.1f}", f"{low:.1f} to {high:.1f}", f"{summary['seconds']:.0f}"
            )
    table.add_row("always the largest class", f"{result.run.summary['majority']:.1f}", "", "")
    return table
