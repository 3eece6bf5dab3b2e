"""RUN/curve.png: loss and learning rate over the steps, and the same picture in the run's TensorBoard."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from vitds import dist
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics


def draw_curve(run: Run) -> None:
    """Draw the curve of a run's metrics; rank 0 only."""
    if not dist.is_main():
        return
    lines = read_metrics(run.metrics)
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # needs no display
    losses = figure.subplots()
    for key in [key for key in lines[0] if key == "loss" or key.startswith("loss/")]:
        losses.plot(steps, [line[key] for line in lines], label=key, linewidth=1)
    losses.set(xlabel="step", ylabel="loss", title=run.path.name)
    losses.grid(alpha=0.3)
    rates = losses.twinx()
    rates.plot(steps, [line["lr"] for line in lines], color="0.6", linestyle=":", label="learning rate")
    rates.set_ylabel("learning rate")
    losses.legend(loc="upper right")
    figure.savefig(run.path / "curve.png", dpi=110)
    if (run.path / "tensorboard").is_dir():
        with SummaryWriter(run.path / "tensorboard") as board:
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            board.add_image("curve", pixels, steps[-1], dataformats="HWC")
