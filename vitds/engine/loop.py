"""The training loop, for pretraining and fine-tuning alike.

A step is R ranks x A micro steps x m chunks of K images. Its loss is the sum over all rows of weight · row loss (vitds/batch.py).
DeepSpeed divides what it gets by A and averages gradients over ranks, so it is given, for the rows of one micro step,
R·A·Σ_rank(w·l) with a dense head and A·Σ_all(w·l) with a sharded one, where each rank holds the loss of all ranks' rows.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds import dist, rng
from vitds.batch import CropBatch, Targets, TrainBatch
from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.loader import TrainLoader
from vitds.engine.build import build_engine
from vitds.engine.first_rows import set_rows_from_features
from vitds.engine.head_shard import HeadShard
from vitds.engine.live import Live
from vitds.engine.probes import Probes
from vitds.engine.schedule import learning_rate, save_is_due, warmup_steps
from vitds.engine.state import EngineState
from vitds.engine.watchdog import Watchdog
from vitds.errors import NumericsError, RunError, Stopped
from vitds.heads.dense import DenseHead
from vitds.methods import idmm, supervised
from vitds.models.build import patch_count
from vitds.models.stochastic import StochasticDraws
from vitds.rng import Purpose
from vitds.runs.checkpoint import CheckpointReader, newest_sound, write_checkpoint
from vitds.runs.directory import Run
from vitds.runs.lock import RunLock

METHODS = {"idmm": idmm, "supervised": supervised}
NONFINITE_IN_A_ROW = 10  # steps skipped for a loss or gradient that is not finite, before the run gives up
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class TrainModule(nn.Module):
    """What the engine owns: the backbone, and a dense head where there is one (CONTRACT: model, head, loss).

    forward(images, targets) returns a loss a row (M,) with a dense head, features (M, D) without.
    """

    def __init__(self, backbone: nn.Module, head: DenseHead | None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Float[Tensor, "M 3 S S"], targets: Targets) -> Float[Tensor, "M ..."]:
        """See the class."""
        features = self.backbone(images)
        return features if self.head is None else self.head(features, targets)


class Trainer:
    """Trains one run from its newest checkpoint to its end.

    Args:
        settings: resolved; no `auto` is left. file: the training images. module: the backbone, built whole, head still None.
        rows: N instances or C classes. lock: this process's hold on the run (rank 0), checked before every write.
        test_file: for the kNN probe. class_head: weights of a trained class head to begin with.
    """

    def __init__(
        self, run: Run, settings: Settings, ds: DsConfig, file: BetonFile, module: TrainModule, rows: int, device: torch.device,
        lock: RunLock | None, test_file: BetonFile | None = None, class_head: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        built_from = time.perf_counter()
        self.run, self.settings, self.file, self.rows, self.device, self.lock = (
            run,
            settings,
            file,
            rows,
            device,
            lock,
        )
        self.method = METHODS[settings.method]
        self.loader = TrainLoader(
            file,
            settings,
            rank=dist.rank(),
            ranks=dist.world_size(),
            micro_images=settings.batch.micro_images,
        )
        self.accumulation = self.loader.accumulation
        self.total = settings.epochs * self.loader.steps_per_epoch
        self.warmup = warmup_steps(
            settings.schedule.warmup_epochs, settings.epochs, self.loader.steps_per_epoch
        )
        self.draws = StochasticDraws(
            module.backbone,
            seed=settings.seed,
            rows_per_chunk=settings.views.count * settings.batch.chunk_images,
            patches=patch_count(module.backbone),
        )
        self.saved, self.problems = newest_sound(run.checkpoints)
        self.width = width = module.backbone.num_features
        self.head: HeadShard | None = None
        if settings.head.kind == "sharded":
            rates = np.array([self._rate(step) for step in range(self.total)]) if settings.head.lazy else None
            self.head = HeadShard(rows, width, settings, device, rates)
        else:
            module.head = DenseHead(rows, width, seed=settings.seed, **settings.head.form)
            if class_head is not None:
                module.head.load_state_dict(class_head)
        if settings.head.init == "features" and self.saved is None:
            set_rows_from_features(
                module.backbone, self.head.module if self.head else module.head, file, settings, device
            )
        self.engine = build_engine(module, settings, ds, self.accumulation, device)
        self.state = EngineState(self.engine, settings.optimizer.average_decay)
        self.probes = Probes(settings, file, test_file, device) if settings.eval.every_epochs else None
        self.done = self.started_at = self.updates = self.skipped = self.skipped_in_a_row = 0
        self.signal: int | None = None
        self.saved_at, self.saved_step, self.save_s, self.saving_s = time.monotonic(), -1, 0.0, 0.0
        self.live: Live | None = None
        self.build_s = time.perf_counter() - built_from

    # Resume ------------------------------------------------------------------------------------------------------------------

    def resume(self) -> list[str]:
        """Go to the newest sound checkpoint, if there is one; returns what was wrong with newer ones.

        Raises: RunError if the training file is not the one that the checkpoint was trained on.
        """
        if self.saved is None:
            return self.problems
        facts = self.saved.manifest
        if (facts["content_hash"], facts["rows"]) != (self.file.manifest.content_hash, self.rows):
            raise RunError(
                f"{self.run.path} was trained on {facts['rows']} rows with content {facts['content_hash'][:12]}, {self.file.path} has "
                f"{self.rows} with {self.file.manifest.content_hash[:12]}. Pass --data with the run's own file, or start a new run."
            )
        reader = CheckpointReader(self.saved)
        self.updates, self.skipped, self.skipped_in_a_row = (
            facts["updates"],
            facts["skipped"],
            facts["skipped_in_a_row"],
        )
        self.state.write(reader, self.updates)
        self.state.set_counters(facts, facts["step"])
        if self.head is not None:
            self.head.write(reader, self.updates)
        self.done = self.started_at = facts["step"]
        return self.problems

    def save(self) -> None:
        """A checkpoint of the steps done; called by every rank.

        Raises: ResourceError if the disk is full; RunLockedError if another process has taken the run over.
        """
        began = time.monotonic()
        if self.lock is not None:
            self.lock.check()
        if self.live is not None:
            self.live.file.sync()
        parts = {"model": self.state.read()}
        if self.head is not None:
            parts["head"] = self.head.read()
        facts = {
            "updates": self.updates,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rows": self.rows,
            "content_hash": self.file.manifest.content_hash,
            "head_rows": None if self.head is None else self.head.ranges,
            **self.state.counters(),
        }
        rules = self.settings.checkpoint
        write_checkpoint(
            self.run.checkpoints,
            self.done,
            parts,
            facts,
            keep=rules.keep,
            keep_every_steps=rules.keep_every_steps,
        )
        self.saved_at, self.saved_step = time.monotonic(), self.done
        self.save_s = self.saved_at - began
        self.saving_s += self.save_s

    # Train -------------------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Tensor]:
        """Run to the end; returns all weights by name (their averages where those are kept), float32, on every rank.

        Raises: Stopped after a signal, everything saved. NumericsError if the loss stays not finite.
        """
        if dist.is_main():
            self.live = Live(
                self.run,
                self.settings,
                steps_done=self.done,
                total_steps=self.total,
                steps_per_epoch=self.loader.steps_per_epoch,
            )
        handlers, watchdog = self._listen(), Watchdog(self.run.path / "log.txt")
        batches = self.loader.batches(self.done, self.total)
        self.engine.train()
        try:
            while self.done < self.total:
                watchdog.at(self.done)
                wants_save, wants_stop = self._step(batches)
                is_good = (
                    self.skipped_in_a_row == 0
                )  # amid skipped steps the weights may be the cause; they push no good ones out
                if (wants_save and is_good) or wants_stop or self.done == self.total:
                    self.save()
                if wants_stop and self.done < self.total:
                    raise Stopped(
                        f"stopped by a signal after step {self.done} of {self.total}, saved; the same command goes on from there"
                    )
        finally:
            watchdog.close()
            batches.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.live is not None:
                self.live.close()
        return self.state.weights(averaged=self.settings.optimizer.average_decay > 0)

    def _step(self, batches: Iterator[CropBatch]) -> tuple[bool, bool]:
        """One optimizer step; returns whether a checkpoint and whether a stop is due, agreed by all ranks."""
        started = time.perf_counter()
        step, waited = self.done, 0.0
        rate = self._rate(step)
        for group in (
            *self.engine.optimizer.param_groups,
            *(self.head.optimizer.param_groups if self.head else ()),
        ):
            group["lr"] = rate * group.get("lr_scale", 1.0)
        groups = len(self.settings.views.groups)
        sums = torch.zeros(groups, dtype=torch.float64, device=self.device)
        for micro in range(self.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            mixed = self.method.prepare(batch, self.settings, self.device)
            if self.live is not None and step == 0 and micro == 0:
                self.live.show_crops(mixed)
            losses, targets = self._forward(batch, mixed, micro)
            weighted = losses * targets.weight
            scale = self.accumulation * (1 if self.head else dist.world_size())
            self.engine.backward(scale * weighted.sum())
            sums.index_add_(0, targets.group, weighted.detach().double())
            if micro < self.accumulation - 1:
                self.engine.step()
        group_losses, is_sound, wants_save, wants_stop = self._agree(sums)
        norms = self._update(is_sound, step, rate, batch)
        self.done += 1
        seconds = time.perf_counter() - started
        probed = self._probe()
        if self.live is not None:
            line = {"step": step, "epoch": batch.epoch, "loss": sum(group_losses)}
            line |= {
                f"loss/{group.name}": loss
                for group, loss in zip(self.settings.views.groups, group_losses, strict=True)
            }
            line |= {"lr": rate, **norms, "skipped": self.skipped, **probed}
            line |= {
                "time/step_s": seconds,
                "time/data_s": waited,
                "time/images_per_s": batch.real_images / seconds,
            }
            if step == self.saved_step:
                line["time/save_s"] = self.save_s  # of the checkpoint before this step
            if step == self.started_at:
                # From the process's first moment; besides this step and the engine's making it is imports, data, and the model.
                line |= {
                    "time/start_s": time.time() - psutil.Process().create_time(),
                    "time/start_engine_s": self.build_s,
                }
            self.live.step(line)
        return wants_save, wants_stop

    def _rate(self, step: int) -> float:
        return learning_rate(
            step, lr_peak=self.settings.optimizer.lr_peak, warmup=self.warmup, total=self.total
        )

    def _probe(self) -> dict[str, float]:
        """probe/… numbers and their own time at the end of every eval.every_epochs-th epoch."""
        every = self.settings.eval.every_epochs * self.loader.steps_per_epoch
        if self.probes is None or self.done % every:
            return {}
        started = time.perf_counter()
        if self.head is not None and self.head.lazy:
            self.head.lazy.settle(self.done)
        found = self.probes.measure(self.state.weights(), self.head)
        return found | {"time/probe_s": time.perf_counter() - started}

    def _forward(self, batch: CropBatch, mixed: TrainBatch, micro: int) -> tuple[Tensor, Targets]:
        """The loss of each row that this rank holds, and the rows' targets."""
        images, chunk_images = mixed.images, self.settings.batch.chunk_images
        self.draws.fill(batch.step, batch.first_chunk, len(batch.index) // chunk_images)
        torch.manual_seed(rng.seed_of(Purpose.DROPOUT, self.settings.seed, batch.step, micro, dist.rank()))
        if self.engine.bfloat16_enabled() or self.engine.fp16_enabled():
            images = images.to(next(self.engine.module.parameters()).dtype)
        output = self.engine(images, mixed.targets)
        if self.head is None:
            return output, mixed.targets
        return self.head(output, mixed.targets, batch.step)

    def _agree(self, sums: Tensor) -> tuple[list[float], bool, bool, bool]:
        """One all-reduce a step: the groups' losses, whether all is finite on every rank, and whether to save or stop."""
        rules = self.settings.checkpoint
        since_s = time.monotonic() - self.saved_at
        is_due = dist.is_main() and save_is_due(
            since_s, every_minutes=rules.every_minutes, last_save_s=self.save_s
        )
        is_unsound = not math.isfinite(self._own_gradient_norm())
        flags = torch.tensor(
            [float(is_unsound), float(is_due), float(self.signal is not None)],
            dtype=torch.float64,
            device=self.device,
        )
        shared = (
            sums if self.head is None or dist.is_main() else torch.zeros_like(sums)
        )  # a sharded head's losses are on every rank
        *losses, unsound, due, stop = dist.all_reduce_sum(torch.cat([shared, flags])).tolist()
        periods = rules.every_steps, rules.every_epochs * self.loader.steps_per_epoch
        is_due_by_steps = any(period and (self.done + 1) % period == 0 for period in periods)
        return losses, unsound == 0 and all(map(math.isfinite, losses)), due > 0 or is_due_by_steps, stop > 0

    def _own_gradient_norm(self) -> float:
        """The norm of gradients that DeepSpeed does not look at: all of them at stage 0 in fp32, and the sharded head's."""
        norm = self.head.gradient_norm() if self.head else 0.0
        if self.state.stage == 0:
            gradients = [
                parameter.grad for parameter in self.engine.module.parameters() if parameter.grad is not None
            ]
            self.backbone_norm = float(torch.nn.utils.get_total_norm(gradients))
            return norm + self.backbone_norm
        return norm

    def _update(self, is_sound: bool, step: int, rate: float, batch: CropBatch) -> dict[str, float]:
        """Engine and sharded head both step, or neither; returns the gradient norms.

        Raises: NumericsError after NONFINITE_IN_A_ROW skipped steps.
        """
        before, scale = self.engine.skipped_steps, self._loss_scale()
        self.state.inner.skip = not is_sound
        self.engine.step()
        did_step = is_sound and self.engine.skipped_steps == before
        norms = {
            "grad_norm": self.backbone_norm
            if self.state.stage == 0
            else float(self.engine.get_global_grad_norm() or 0.0)
        }
        if self.head is not None:
            norms["grad_norm/head"] = self.head.update(did_step, scale)
        self.updates += did_step
        if did_step and self.state.average_decay:
            self.state.update_average(self.updates)
        self.skipped += not did_step
        self.skipped_in_a_row = 0 if did_step else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= NONFINITE_IN_A_ROW and scale <= 1.0:
            raise NumericsError(
                f"the loss or its gradient was not finite in {NONFINITE_IN_A_ROW} steps in a row, the last step {step} at learning rate "
                f"{rate:.3g} with images {batch.index[:8].tolist()} ...; lower optimizer.lr_peak or set optimizer.clip_norm. "
                f"The last checkpoint in {self.run.checkpoints} is from before."
            )
        return norms

    def _loss_scale(self) -> float:
        return float(self.engine.optimizer.loss_scaler.loss_scale) if self.engine.fp16_enabled() else 1.0

    # Signals -----------------------------------------------------------------------------------------------------------------

    def _listen(self) -> dict[int, Any]:
        """Note TERM, INT and USR1 for the step's end; a second one ends at once. Returns the handlers that were there."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        """A second Ctrl-C, not the TERM that DeepSpeed's launcher sends along with the first, ends at once."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
