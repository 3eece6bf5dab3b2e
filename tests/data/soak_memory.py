"""Memory over a long run, for a real set; the quick version is in test_traps.py.

    python -m tests.data.soak_memory x.beton [EPOCHS]

Prints the memory of this process (its own pages, in MB) in the course of so many epochs of the pretraining
recipe's crops, and fails if it grows by more than one MB once the first twentieth of them has filled the
caches.
"""

from __future__ import annotations

import sys

import torch

from vitds.config.load import load_settings
from vitds.data.beton import open_beton
from vitds.data.loader import TrainLoader

ALLOWED_MB = 1.0


def resident_mb() -> float:
    """Anonymous memory only: pages of the mapped data file come and go as the kernel likes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


def soak(path: str, epochs: int) -> float:
    """MB that the process grew by from epoch EPOCHS / 20 on."""
    file, settings = open_beton(path), load_settings(recipe="idmm_deit_tiny", command=None, flags={})
    loader = TrainLoader(file, settings, rank=0, ranks=1, micro_images=settings.batch.chunk_images)
    marks, seen = {epochs * part // 20 for part in range(1, 21)}, []
    for number, _ in enumerate(loader.batches(0, epochs * loader.steps_per_epoch), start=1):
        epoch, within = divmod(number, loader.steps_per_epoch * loader.accumulation)
        if within == 0 and epoch in marks:
            seen.append(resident_mb())
            print(f"epoch {epoch}: {seen[-1]:.2f} MB", flush=True)
    return max(seen) - seen[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    grown_mb = soak(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 400)
    print(f"grown by {grown_mb:.2f} MB, allowed {ALLOWED_MB} MB")
    sys.exit(grown_mb > ALLOWED_MB)
