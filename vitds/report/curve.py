"""RUN/curve.png: loss, its terms and the learning rate over the steps; also in TensorBoard."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from vitds import dist
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics
from vitds.terminal import say

TERMS = "loss/"  # keys of the loss's terms


def draw_curve(run: Run) -> None:
    """Draw the curve of a run's metrics; rank 0 only.

    A run is complete without it: what fails here is said.
    """
    lines = read_metrics(run.metrics) if dist.is_main() else []
    if not lines:
        return
    try:
        _draw(run, lines)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a full disk, a font cache without a home, PNG's own
        say(f"{run.path / 'curve.png'} was not drawn ({error}); the run is complete without it")


def _draw(run: Run, lines: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # at the top they cost every start 0.4 s
    from matplotlib.figure import Figure

    steps = [line["step"] for line in lines]
    terms = sorted({key for line in lines for key in line if key.startswith(TERMS)})
    # The loss is the sum of its terms: on one axis with them it would look like one more.
    panels = [["loss"], terms] if len(terms) > 1 else [["loss"]]
    figure = Figure(figsize=(8, 1.5 + 3 * len(panels)), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # needs no display
    axes = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for panel, keys in zip(axes, panels, strict=True):
        for key in keys:
            panel.plot(steps, _numbers(lines, key), label=key.removeprefix(TERMS), linewidth=1)
        panel.grid(alpha=0.3)
        panel.set_ylabel("loss" if keys == ["loss"] else "its terms")
    axes[0].set_title(run.path.name)
    axes[-1].set_xlabel("step")
    if len(panels) > 1:
        axes[1].legend(loc="upper right")
    rates = axes[0].twinx()
    rates.plot(steps, _numbers(lines, "lr"), color="0.6", linestyle=":")
    rates.set_ylabel("learning rate (dotted)")
    figure.savefig(run.path / "curve.png", dpi=110)
    if (run.path / "tensorboard").is_dir():
        with SummaryWriter(run.path / "tensorboard") as board:
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            board.add_image("curve", pixels, steps[-1], dataformats="HWC")


def _numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    """A value a line; NaN, which leaves a gap, where a step has none: it was not finite, or not measured."""
    values = (line.get(key) for line in lines)
    return [float("nan") if value is None else value for value in values]
