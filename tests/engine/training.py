"""Small real trainings that tests start on real ranks: the recipe's whole path, from .beton to weights."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.errors import Stopped
from vitds.jobs.finetune import finetune
from vitds.jobs.pretrain import pretrain
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

# 52 images in steps of 24: three steps an epoch, the last with 4 real images. Six chunks of 4 divide over 1, 2 and 3 ranks.
SMALL: dict[str, Any] = {
    "views.crop_px": 16,
    "views.groups": '[{name: global, views: 2, scale: [0.14, 1.0]}, {name: local, views: 1, scale: [0.05, 0.4]}]',
    "batch.global_images": 24,
    "mix.chunk_images": 4,
    "backbone.name": "vit_tiny_patch16_224",
    "backbone.options": "{patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}",
    "backbone.drop_path": 0.2,
    "optimizer.lr_peak": 1e-2,
    "engine.precision": "fp32",
    "engine.compile": "off",
    "log.tensorboard": "false",
    "eval.knn_k": "[5]",
}


def small_run(run: str, data: tuple[str, str], *, stage: int | str = 0, method: str = "idmm", epochs: int = 2, **changes: Any) -> Run:
    """Train on this rank; changes are settings with `__` for the dot: head__kind="sharded"."""
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    if method == "supervised":
        settings["views.groups"] = "[{name: train, views: 1, scale: [0.3, 1.0]}]"
    job = pretrain if method == "idmm" else finetune
    words = [f"{key}={value}" for key, value in settings.items()]
    return job(run=run, data=data[0], test=data[1], epochs=epochs, ds_config=f"zero{stage}", set=words)


def small_losses(run: str, data: tuple[str, str], **options: Any) -> list[float]:
    """The loss of each step of a small run."""
    return [line["loss"] for line in read_metrics(small_run(run, data, **options).metrics)]


def untimed(run: Path) -> list[str]:
    """The lines of metrics.jsonl without their `time/` keys, as text."""
    lines = read_metrics(run / "metrics.jsonl")
    return [json.dumps({key: value for key, value in line.items() if not key.startswith("time/")}) for line in lines]


def stopped_run(run: str, data: tuple[str, str], *, after_lines: int, **options: Any) -> str:
    """A small run that gets SIGUSR1 on its first rank once metrics.jsonl has so many lines; returns what Stopped says."""
    if dist.is_main():
        signal_after_lines(Path(run), after_lines)
    try:
        small_run(run, data, **options)
    except Stopped as stop:
        return str(stop)
    return "ran to its end"


def signal_after_lines(run: Path, lines: int) -> None:
    """Send this process SIGUSR1 as soon as the run's metrics have so many lines."""

    def watch() -> None:
        while len(read_metrics(run / "metrics.jsonl")) < lines:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=watch, daemon=True).start()
