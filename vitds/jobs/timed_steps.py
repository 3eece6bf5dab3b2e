"""A short training in a folder that is removed again, timed step by step: for `vitds bench step` and `vitds
plan --hours`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.engine.memory import explains_out_of_memory, module_sizes
from vitds.engine.process import noise_into
from vitds.engine.resolve import resolve_settings
from vitds.errors import Stopped
from vitds.jobs.train import build_trainer
from vitds.models.build import build_backbone
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics


class TimedSteps(NamedTuple):
    """What was measured.

    Attributes:
        settings: resolved.
        accumulation: A, micro steps of a step.
        outside_s: each step's seconds outside forward and backward; on a GPU, which runs behind, outside the
            calls.
        whole_s: each step's seconds.
    """

    settings: Settings
    accumulation: int
    outside_s: list[float]
    whole_s: list[float]


def train_steps(
    settings: Settings,
    ds: DsConfig,
    file: BetonFile,
    rows: int,
    device: torch.device,
    *,
    steps: int | None = None,
) -> TimedSteps:
    """Train for a moment.

    Args:
        settings: with their `auto`.
        ds: a DeepSpeed JSON.
        file: the images.
        rows: of the method's classifier: N may be more than the file's images.
        device: that trains.
        steps: to stop after; None: at the end of the run.
    Raises: Stopped after a signal.
    """
    inside_s: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which notes the seconds of each call."""

        def call(*words: Any) -> Any:
            began = time.perf_counter()
            result = function(*words)
            inside_s.append(time.perf_counter() - began)
            return result

        return call

    with tempfile.TemporaryDirectory() as folder, noise_into(Path(folder) / "log.txt"):
        backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
        resolved = resolve_settings(
            settings, backbone, ds=ds, device=device, rows=rows, images=max(rows, file.images)
        )
        with explains_out_of_memory(module_sizes(backbone, resolved), resolved, ds, rows, device):
            trainer = build_trainer(Run(Path(folder)), resolved, ds, file, backbone, rows, device)
            trainer.rate = replace(trainer.rate, total=min(trainer.total, steps or trainer.total))
            trainer.method.losses = timed(trainer.method.losses)
            trainer.update.backward = timed(trainer.update.backward)
            # Nothing of it is kept, and a checkpoint of a large backbone has gigabytes.
            trainer.save = lambda live: None
            try:
                trainer.train()
            except Stopped:
                raise Stopped(
                    "stopped by a signal while a few steps were timed; the same command times them again"
                ) from None
        whole_s = [line["time/step_s"] for line in read_metrics(Path(folder) / "metrics.jsonl")]
    accumulation = trainer.loader.accumulation
    calls = 2 * accumulation
    outside_s = [took - sum(inside_s[step * calls : (step + 1) * calls]) for step, took in enumerate(whole_s)]
    return TimedSteps(resolved, accumulation, outside_s, whole_s)
