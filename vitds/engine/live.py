"""What a person sees while a run goes on, on rank 0: a progress bar or a line an epoch, TensorBoard, metrics.jsonl."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from vitds.batch import TrainBatch
from vitds.config.tree import Settings, Views
from vitds.errors import ResourceError
from vitds.runs.directory import Run, why_unwritten
from vitds.runs.metrics import MetricsFile, cut_back

CROPS_ON_A_PAGE = 48


class Live:
    """Shows and stores each step's numbers; made on rank 0 only.

    Args:
        steps_done: where the run goes on; metrics.jsonl is cut back to it and the TensorBoard file written anew.
    """

    def __init__(
        self, run: Run, settings: Settings, *, steps_done: int, total_steps: int, steps_per_epoch: int
    ) -> None:
        self.run, self.settings, self.steps_per_epoch = run, settings, steps_per_epoch
        kept = cut_back(run.metrics, steps_done)
        self.file = MetricsFile(run.metrics)
        self.board = None
        if settings.log.tensorboard:
            shutil.rmtree(run.path / "tensorboard", ignore_errors=True)
            self.board = SummaryWriter(run.path / "tensorboard")
            for line in kept:
                self._plot(line)
        self.console = Console(stderr=True)
        self.is_terminal = sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ
        self.epoch_started = time.perf_counter()
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} images/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.is_terminal,
        )
        self.task = self.progress.add_task(
            "", total=total_steps, completed=steps_done, epoch=0, loss=float("nan"), speed=0.0
        )
        self.progress.start()

    def say(self, text: str) -> None:
        """One line for the person, above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def step(self, line: dict[str, Any]) -> None:
        """One step's numbers.

        Raises: ResourceError if the disk is full.
        """
        try:
            self.file.append(line)
            self._plot(line)
        except OSError as error:
            raise ResourceError(why_unwritten(self.run.metrics, error)) from error
        self.progress.update(
            self.task, advance=1, epoch=line["epoch"], loss=line["loss"], speed=line["time/images_per_s"]
        )
        if (line["step"] + 1) % self.steps_per_epoch == 0:
            seconds, self.epoch_started = time.perf_counter() - self.epoch_started, time.perf_counter()
            if not self.is_terminal:
                speed = line["time/images_per_s"]
                self.say(
                    f"epoch {line['epoch'] + 1}/{self.settings.epochs}  step {line['step'] + 1}  loss {line['loss']:.4f}  "
                    f"lr {line['lr']:.2e}  {speed:,.0f} images/s  {seconds:.1f} s"
                )

    def show_crops(self, batch: TrainBatch) -> None:
        """A page of what the network sees, in TensorBoard."""
        if self.board:
            rows = batch.images[:: max(1, len(batch.images) // CROPS_ON_A_PAGE)][:CROPS_ON_A_PAGE]
            self.board.add_image("crops", make_grid(_pixels(rows, self.settings.views), nrow=8), 0)

    def _plot(self, line: dict[str, Any]) -> None:
        if self.board:
            for key, value in line.items():
                if key not in ("step", "epoch"):
                    self.board.add_scalar(key, value, line["step"])

    def close(self) -> None:
        """No more steps. What counts was synced with the last checkpoint; what a full disk did not take is cut off by the next start."""
        self.progress.stop()
        for each in filter(None, (self.file, self.board)):
            with contextlib.suppress(OSError):
                each.close()


def _pixels(images: Tensor, views: Views) -> Tensor:
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (views.mean, views.std))
    return (images.float() * std + mean).clamp(0, 1).cpu()
