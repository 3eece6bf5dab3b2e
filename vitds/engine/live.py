"""What a person sees while a run goes on, on rank 0: a bar or a line an epoch, TensorBoard, metrics."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from vitds.batch import TrainBatch
from vitds.config.tree import Settings, Views
from vitds.errors import ResourceError
from vitds.runs.directory import Run, why_unwritten
from vitds.runs.metrics import MetricsFile, cut_back

CROPS_ON_A_PAGE = 48


class _LastingConsole(Console):
    """Goes silent where its reader leaves; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Live:
    """Shows and stores each step's numbers; made on rank 0 only.

    Args:
        run: the run directory.
        settings: of the run.
        steps_done: where the run goes on; metrics.jsonl is cut back to it and the TensorBoard file written
            anew.
        total_steps: of the whole run.
        steps_per_epoch: steps in which each image comes once.
    """

    def __init__(
        self, run: Run, settings: Settings, *, steps_done: int, total_steps: int, steps_per_epoch: int
    ) -> None:
        self.run = run
        self.settings = settings
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        # Lines from after the checkpoint go: their steps are taken again.
        kept = cut_back(run.metrics, steps_done)
        self.file = MetricsFile(run.metrics)
        self.board = None
        if settings.log.tensorboard:
            # An event file cannot be cut back, so it is written again from the lines that stay.
            shutil.rmtree(run.path / "tensorboard", ignore_errors=True)
            self.board = SummaryWriter(run.path / "tensorboard")
            for line in kept:
                self._plot(line)
        # To stderr: what is piped from standard output stays free of bars.
        self.console = _LastingConsole(stderr=True)
        # A bar for a person; where output goes to a log, a line an epoch instead.
        self.is_terminal = self.console.file.isatty() and "SLURM_JOB_ID" not in os.environ
        self.started = time.perf_counter()
        self.first_step = steps_done
        self.epoch_images = 0.0  # of the steps since the last line about an epoch
        self.epoch_s = 0.0
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} images/s{task.fields[probes]}"
            ),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.is_terminal,
        )
        # A resumed run starts its bar where it was.
        self.task = self.progress.add_task(
            "",
            total=total_steps,
            completed=steps_done,
            epoch=f"{min(steps_done // steps_per_epoch + 1, settings.epochs)}/{settings.epochs}",
            loss=float("nan"),
            speed=0.0,
            probes="",
        )
        self.progress.start()

    def say(self, text: str) -> None:
        """One line for the person, above the bar. A reader that is gone (`| head`) ends no training."""
        with contextlib.suppress(OSError):
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
        # Speed times time is the number of real images again; padded ones are no speed.
        self.epoch_images += line["time/images_per_s"] * line["time/step_s"]
        self.epoch_s += line["time/step_s"]
        speed = (
            self.epoch_images / self.epoch_s
        )  # of the epoch: its last step alone may be padding for the most part
        epoch = f"{line['epoch'] + 1}/{self.settings.epochs}"
        probes = "".join(
            f"  {_probe_name(key)} {value:.4g}" for key, value in line.items() if key.startswith("probe/")
        )
        shown = (
            {"probes": probes} if probes else {}
        )  # the last ones stay on the bar until there are newer ones
        self.progress.update(self.task, advance=1, epoch=epoch, loss=line["loss"], speed=speed, **shown)
        # The last step of an epoch: its line, and a new count.
        if (line["step"] + 1) % self.steps_per_epoch == 0:
            if not self.is_terminal:
                self.say(
                    f"epoch {epoch}  step {line['step'] + 1}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  "
                    f"{speed:,.0f} images/s  {self.epoch_s:.1f} s{probes}  "
                    f"{self._time_left(line['step'] + 1)} left"
                )
            self.epoch_images = 0.0
            self.epoch_s = 0.0

    def _time_left(self, done: int) -> str:
        """By the pace since this start, with its saving and probing."""
        # Steps of this start alone: earlier ones may have run on another machine.
        pace_s = (time.perf_counter() - self.started) / (done - self.first_step)
        return str(datetime.timedelta(seconds=round(pace_s * (self.total_steps - done))))

    def show_crops(self, batch: TrainBatch) -> None:
        """A page of what the network sees, in TensorBoard."""
        if self.board:
            # Evenly from the whole batch, so that views of all groups are among them.
            crops = batch.images[:: max(1, len(batch.images) // CROPS_ON_A_PAGE)][:CROPS_ON_A_PAGE]
            self.board.add_image("crops", make_grid(_pixels(crops, self.settings.views), nrow=8), 0)

    def _plot(self, line: dict[str, Any]) -> None:
        if self.board:
            # One event a step, which the writer's own thread takes to the disk: one a number takes three
            # times as long. None was not finite: JSON has no NaN, and a plot has no use for it.
            numbers = [
                Summary.Value(tag=key, simple_value=value)
                for key, value in line.items()
                if key not in ("step", "epoch") and value is not None
            ]
            self.board.file_writer.add_summary(Summary(value=numbers), line["step"])

    def close(self) -> None:
        """No more steps.

        What counts was synced with the last checkpoint; what a full disk did not take is cut off by the next
        start.
        """
        with contextlib.suppress(OSError):
            self.progress.stop()
        for each in filter(None, (self.file, self.board)):
            with contextlib.suppress(OSError):
                each.close()


def _probe_name(key: str) -> str:
    """probe/knn20_top1 as a person reads it."""
    return key.removeprefix("probe/").replace("_", " ")


def _pixels(images: Tensor, views: Views) -> Tensor:
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (views.mean, views.std))
    # Undoes augment.mix.normalise, for the eye.
    return (images.float() * std + mean).clamp(0, 1).cpu()
