"""Draw docs/images/results.png, held-out accuracy over processor minutes: python docs/results/picture.py

A line joins rows of one network and one way to train it, of different lengths, on one kind of processor: with
AVX-512 for Muon, with AVX2 for AdamW.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

from docs.results.render import FOLDER
from vitds.jobs.result_rows import read_row

PICTURE = FOLDER.parent / "images" / "results.png"
LINES = {
    "narrow ResNet-18 from scratch, 96 px, Muon": ("flowers_15min_96", "flowers_50min_96"),
    "narrow ResNet-18 from scratch, 64 px, Muon": ("flowers_15min_scratch", "flowers_60min_scratch"),
    "narrow ResNet-18 from scratch, AdamW, on AVX2": ("flowers_20min_narrow", "flowers_60min_narrow"),
    "narrow ResNet-18, half of the time IDMM, AdamW, on AVX2": ("flowers_20min_idmm", "flowers_60min_idmm"),
}
MARKERS = "os^v"


def draw(path: Path) -> None:
    """Each row with its 95 % interval over the held-out images."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.subplots()
    for marker, (label, names) in zip(MARKERS, LINES.items(), strict=False):
        rows = [read_row(FOLDER / f"{name}.json") for name in names]
        minutes = [row.seconds / 60 for row in rows]
        means = [row.held_out.mean for row in rows]
        below, above = zip(*(row.held_out.interval for row in rows), strict=True)
        reach = [
            [mean - low for mean, low in zip(means, below, strict=True)],
            [high - mean for mean, high in zip(means, above, strict=True)],
        ]
        axes.errorbar(minutes, means, reach, marker=marker, capsize=3, label=label)
    axes.set_xscale("log")
    axes.set_xlim(9, 72)
    axes.set_xticks([10, 20, 30, 40, 60], labels=["10", "20", "30", "40", "60"])
    axes.minorticks_off()
    axes.set_xlabel("processor minutes of one core, all stages")
    axes.set_ylabel("held-out top-1, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(PICTURE)
    print(PICTURE)
