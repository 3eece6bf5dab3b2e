"""The training loop, for every method alike.

A step is R ranks x A micro steps x m chunks of K images. The method gives each rank's part of the step's
loss, already weighted, as one number a term; the parts of all ranks and micro steps add up to the loss.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from vitds import dist, rng
from vitds.batch import CropBatch
from vitds.config.tree import Settings
from vitds.data.loader import TrainLoader
from vitds.data.sheet import HostMemory
from vitds.engine.agreement import Agreed, Reading, agree
from vitds.engine.live import Live
from vitds.engine.peers import Peers
from vitds.engine.probes import Probes
from vitds.engine.progress import Progress
from vitds.engine.saving import SaveClock
from vitds.engine.signals import StopSignals
from vitds.engine.update import JointUpdate
from vitds.engine.watchdog import Watchdog
from vitds.errors import NumericsError, Stopped
from vitds.methods.base import Method
from vitds.models.stochastic import StochasticDraws
from vitds.rng import Purpose
from vitds.runs import best
from vitds.runs.checkpoint import CheckpointReader, write_checkpoint
from vitds.runs.directory import Run
from vitds.runs.lock import RunLock
from vitds.schedule import LearningRate, weight_decay

NONFINITE_IN_A_ROW = 10  # steps skipped for a loss or gradient that is not finite, before the run gives up
LAST_STEPS = 10  # of a run, of which most must have changed the weights


class Launched(NamedTuple):
    """A step that the device was given, and of which the host has not read yet.

    Attributes:
        step: its number, from 0.
        epoch: that it is in.
        rate: of learning.
        started: when, by time.perf_counter.
        waited_s: for data.
        real_images: of all ranks.
        images: the first images of this rank's last micro batch, for a message.
        reading: what all ranks agreed on.
    """

    step: int
    epoch: int
    rate: float
    started: float
    waited_s: float
    real_images: int
    images: list[int]
    reading: Reading


class StepDone(NamedTuple):
    """What one step of this rank came to.

    Attributes:
        agreed: by all ranks.
        line: of metrics.jsonl.
        did_update: whether the weights changed.
        images: the first images of this rank's last micro batch, for a message.
    """

    agreed: Agreed
    line: dict[str, Any]
    did_update: bool
    images: list[int]


class Trainer:
    """Takes one run from where it is to its end.

    Args:
        run: the run directory.
        settings: resolved; no `auto` is left.
        method: whose module `update` holds.
        update: engine, heads beside it, their state.
        rate: of every step, which also says how many there are.
        loader: the training images.
        draws: for the backbone's drop path and patch drop.
        probes: measured every eval.every_epochs epochs; None: never.
        facts: of the run, that stand in each checkpoint's manifest: rows, content_hash.
        lock: this process's hold on the run (rank 0), checked before every write.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        method: Method,
        update: JointUpdate,
        rate: LearningRate,
        loader: TrainLoader,
        draws: StochasticDraws,
        probes: Probes | None,
        facts: dict[str, Any],
        lock: RunLock | None,
    ) -> None:
        self.run = run
        self.settings = settings
        self.method = method
        self.update = update
        self.rate = rate
        self.loader = loader
        self.draws = draws
        self.probes = probes
        self.facts = facts
        self.lock = lock
        self.watchdog: Watchdog | None = None  # while it trains
        self.progress = Progress()
        self.began_at = 0  # steps that were done when this process began
        self.clock = SaveClock(settings.checkpoint, loader.steps_per_epoch)
        self.memory = HostMemory(is_pinned=update.engine.device.type == "cuda")
        self.last_read = 0.0  # when the host last learned what a step came to, by time.perf_counter

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.rate.total

    @property
    def device(self) -> torch.device:
        """That trains."""
        return self.update.engine.device

    # Resume and save ------------------------------------------------------------------------------------

    def resume(self, saved: CheckpointReader) -> None:
        """Go to a checkpoint.

        Raises: RunError if it lacks a name or a row.
        """
        facts = saved.saved.manifest
        counters = {name: facts[name] for name in ("step", "updates", "skipped", "skipped_in_a_row")}
        self.progress = Progress(**counters)
        self.began_at = self.progress.step
        self.update.restore(saved, step=self.progress.step, updates=self.progress.updates)

    def save(self, live: Live | None) -> None:
        """A checkpoint of the steps done; called by every rank.

        Args:
            live: whose lines are brought to the disk first; on rank 0.
        Raises: ResourceError if the disk is full; RunLockedError if another process has taken the run over.
        """
        with self.clock.saving(self.progress.step):
            # First of all: a process whose run was taken over must not write into it.
            if self.lock is not None:
                self.lock.check()
            if live is not None:
                live.file.sync()
            # This rank's tensors, and what the manifest has to say of them.
            parts, of_parts = self.update.snapshot()
            counters = {name: value for name, value in vars(self.progress).items() if name != "step"}
            write_checkpoint(
                self.run.checkpoints,
                self.progress.step,
                parts,
                counters | self.facts | of_parts,
                keep=self.settings.checkpoint.keep,
                keep_every_steps=self.settings.checkpoint.keep_every_steps,
            )

    # Train ----------------------------------------------------------------------------------------------

    def train(self, *, build_s: float = 0.0, peers: Peers | None = None) -> dict[str, Tensor]:
        """Run to the end.

        Args:
            build_s: seconds that making this trainer took, for the first metrics line.
            peers: the other ranks, whose end is noticed also where a collective does not notice it.
        Returns: all weights by name (their averages where those are kept), float32, on every rank.
        Raises: Stopped after a signal, everything saved. NumericsError if losses or gradients are not finite
            in too many steps.
        """
        first = self.progress.step
        updated: deque[bool] = deque(maxlen=LAST_STEPS)
        # Left in reverse order: first the loader's threads end, last the signals get their old handlers back.
        with ExitStack() as stack:
            signals = stack.enter_context(StopSignals())
            self.watchdog = stack.enter_context(closing(Watchdog(self.run.path / "log.txt", peers)))
            live = stack.enter_context(closing(self._live())) if dist.is_main() else None
            batches = stack.enter_context(closing(self.loader.batches(first, self.total)))
            # Once: probes run a backbone of their own, so nothing puts this one into evaluation.
            self.update.engine.train()
            unread: deque[Launched] = deque()
            for step in range(first, self.total):
                self.watchdog.at(step)
                unread.append(self._launch(step, batches, live, signals))
                # A late step is read when the next one was launched, so that the device need not wait.
                may_wait = self.update.is_late and not self._needs_all_read(step + 1)
                while len(unread) > may_wait:
                    done = self._settle(unread.popleft())
                    updated.append(done.did_update)
                    if live is not None:
                        # What this start took, once, in the line of its first step.
                        if done.line["step"] == first:
                            done.line.update({"time/start_s": _age_s(), "time/start_engine_s": build_s})
                        # Before any checkpoint: one of step n needs the n lines before it.
                        live.step(done.line)
                    self._give_up_if_not_finite(updated, done)
                    # Not before the step that is under way is done too; it carries the same wish.
                    if done.agreed.is_due or done.agreed.wants_stop:
                        may_wait = False
                if not unread:
                    self._save_or_stop(done.agreed, live)
        return self.update.result()

    def _needs_all_read(self, done: int) -> bool:
        """Whether after `done` steps a checkpoint is due by steps, an epoch ends, with probes, or the run."""
        return (
            self.clock.is_due_by_steps(done) or done % self.loader.steps_per_epoch == 0 or done == self.total
        )

    def _live(self) -> Live:
        return Live(
            self.run,
            self.settings,
            steps_done=self.progress.step,
            total_steps=self.total,
            steps_per_epoch=self.loader.steps_per_epoch,
        )

    def _launch(
        self, step: int, batches: Iterator[CropBatch], live: Live | None, signals: StopSignals
    ) -> Launched:
        """Forward and backward pass of an optimizer step, the agreement of all ranks on it, and where the
        device decides by itself, the update.
        """
        started = time.perf_counter()
        rate = self.rate.at(step)
        self.update.set_schedule(
            rate,
            weight_decay(self.settings.optimizer, step, self.total),
            step // self.loader.steps_per_epoch,
        )
        sums_T = torch.zeros(len(self.method.terms), dtype=torch.float64, device=self.device)
        waited = 0.0
        # Forward and backward: A micro batches, whose gradients add up in the engine.
        for micro in range(self.loader.accumulation):
            # Closes the one before. The last one is closed by `apply`, with the update.
            if micro:
                self.update.end_micro_step()
            # Waiting for data is timed by itself: it says whether the loader or the device is slow.
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            terms_T = self._losses(batch, micro, live)
            self.update.backward(terms_T)
            # Parts of a sum, so they are added and never averaged.
            sums_T += terms_T.detach()
        # Agreement: all ranks learn whether the step is sound before any of them takes it.
        norms_k = self.update.gradient_norms()
        numbers = agree(
            sums_T,
            norms_k,
            is_due=dist.is_main() and self.clock.is_due_by_time(),
            wants_stop=signals.noted is not None,
        )
        if self.update.is_late:
            self.update.apply_late(numbers[0], norms_k)
        reading = Reading(numbers, self.memory)
        images = batch.index[:8].tolist()
        return Launched(step, batch.epoch, rate, started, waited, batch.real_images, images, reading)

    def _settle(self, launched: Launched) -> StepDone:
        """What a step came to, once that is known; and its update, if the device did not take it itself."""
        step = launched.step
        agreed = Agreed.of(launched.reading.numbers(), len(self.method.terms))
        # Update: engine and heads step together, or not at all.
        if self.update.is_late:
            did_update = agreed.is_sound
            norm_line = dict(zip(("grad_norm", "grad_norm/head"), agreed.norms, strict=False))
        else:
            did_update, norm_line = self.update.apply(
                agreed.is_sound, agreed.norms, step=step, updates=self.progress.updates
            )
        self.progress = self.progress.after(did_update)
        # A teacher follows only weights that moved.
        if did_update:
            self.method.after_update(step + 1, self.total)
        now = time.perf_counter()
        # A late step was launched while the one before was under way: its own time begins when that was read.
        seconds = now - max(launched.started, self.last_read)
        self.last_read = now
        # One line of metrics.jsonl. Keys under time/ measure the machine; all others repeat bit by bit.
        line = {"step": step, "epoch": launched.epoch, "loss": sum(agreed.terms)}
        line |= {f"loss/{name}": value for name, value in zip(self.method.terms, agreed.terms, strict=True)}
        line |= {"lr": launched.rate, **norm_line, "skipped": self.progress.skipped, **self._probe()}
        # Of all ranks; real images only.
        speed = launched.real_images / seconds
        line |= {"time/step_s": seconds, "time/data_s": launched.waited_s, "time/images_per_s": speed}
        if step == self.clock.last_step:
            line["time/save_s"] = self.clock.last_s  # of the checkpoint before this step
        return StepDone(agreed, line, did_update, launched.images)

    def _losses(self, batch: CropBatch, micro: int, live: Live | None) -> Float[Tensor, "T"]:
        """This rank's part of each term in one micro step."""
        # Crops on the host become normalised images and targets on the device.
        prepared = self.method.prepare(batch, self.settings, self.device, self.update.image_dtype)
        if live is not None and batch.step == 0 and micro == 0:
            live.show_crops(prepared)
        # Drop path and patch drop read their masks from buffers: written here, before the forward pass.
        self.draws.write(batch.draws.masks)
        # Any other dropout draws from torch's generator: seeded anew, it too is a function of the step.
        torch.manual_seed(rng.seed_of(Purpose.DROPOUT, self.settings.seed, batch.step, micro, dist.rank()))
        return self.method.losses(self.update.engine, prepared, batch.step)

    def _probe(self) -> dict[str, float]:
        """probe/… numbers and their own time at the end of every eval.every_epochs-th epoch."""
        # Here progress counts the step just taken, so this is the end of an epoch and never step 0.
        every = self.settings.eval.every_epochs * self.loader.steps_per_epoch
        if self.probes is None or self.progress.step % every:
            return {}
        started = time.perf_counter()
        weights = self.update.settled_weights(self.progress.step)
        # Each batch is a sign of life, or a probe that takes longer than a step may would end the run.
        alive = partial(self.watchdog.at, self.progress.step - 1)
        found = self.probes.measure(weights, self.method, on_batch=alive)
        if self.settings.eval.choose == "best" and dist.is_main():
            epoch = self.progress.step // self.loader.steps_per_epoch
            best.offer(self.run, epoch, found["probe/top1"], weights)
        return found | {"time/probe_s": time.perf_counter() - started}

    def _save_or_stop(self, agreed: Agreed, live: Live | None) -> None:
        """Raises: Stopped if a rank was asked to stop."""
        is_over = self.progress.step == self.total
        # By steps every rank comes to the same answer by itself.
        wants_save = agreed.is_due or self.clock.is_due_by_steps(self.progress.step)
        # Between skipped steps the weights may be the cause; a checkpoint of them would push out a good one.
        if self.progress.skipped_in_a_row == 0 and (wants_save or agreed.wants_stop) or is_over:
            self.save(live)
        if agreed.wants_stop and not is_over:
            done = f"step {self.progress.step} of {self.total}"
            saved = (
                "saved"
                if self.clock.last_step == self.progress.step
                else "whose last steps were skipped and not saved"
            )
            raise Stopped(f"stopped by a signal after {done}, {saved}; the same command goes on from there")

    def _give_up_if_not_finite(self, updated: deque[bool], done: StepDone) -> None:
        """Ten skipped steps in a row are no training, and neither is an end between skipped ones.

        Args:
            updated: whether each of the last steps changed the weights.
            done: the last one.
        Raises: NumericsError.
        """
        finds_scale = self.update.loss_scale > 1  # fp16 does so by skipping steps
        is_over = self.progress.step == self.total
        # A short run is judged by all its steps; a resume within the last ten has too few to judge by.
        most_were_skipped = len(updated) == min(LAST_STEPS, self.total) and 2 * sum(updated) < len(updated)
        if self.progress.skipped_in_a_row >= NONFINITE_IN_A_ROW and not finds_scale:
            when = f"in {NONFINITE_IN_A_ROW} steps in a row"
        elif is_over and (self.progress.updates == 0 or most_were_skipped):
            when = f"in {self.progress.skipped} of {self.total} steps, most of the last ones among them"
        else:
            return
        raise NumericsError(
            f"the loss or its gradient was not finite {when}, the last step {done.line['step']} at learning "
            f"rate {done.line['lr']:.3g} with images {done.images} ...; lower optimizer.lr_peak or set "
            f"optimizer.clip_norm. A checkpoint in {self.run.checkpoints} is from before"
        )


def _age_s() -> float:
    """Seconds since this process began: imports, data, model and engine, and the first step."""
    return time.time() - psutil.Process().create_time()
