"""Draw docs/images/results.png, held-out accuracy over processor minutes: python docs/results/picture.py

A line joins rows of one way to train a narrow ResNet-18, of different lengths. All are of a core with AVX2.
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
    "labels alone, 96 px, Muon": ("flowers_15min_avx2", "flowers_60min_avx2"),
    "half of the time DIET at 48 px, then labels at 96 px, Muon": (
        "flowers_15min_avx2_diet",
        "flowers_60min_avx2_diet",
    ),
    "labels alone, 64 px, AdamW": ("flowers_20min_narrow", "flowers_60min_narrow"),
    "half of the time IDMM, then labels, 64 px, AdamW": ("flowers_20min_idmm", "flowers_60min_idmm"),
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
    axes.set_xlim(13, 80)
    axes.set_xticks([15, 20, 30, 40, 60], labels=["15", "20", "30", "40", "60"])
    axes.minorticks_off()
    axes.set_xlabel("processor minutes of one core with AVX2, all stages")
    axes.set_ylabel("held-out top-1, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(PICTURE)
    print(PICTURE)
