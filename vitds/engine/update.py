"""The DeepSpeed engine and the heads beside it: one rate, one flag, one checkpoint.

Both step, or neither does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from jaxtyping import Float
from torch import Tensor

from vitds import dist
from vitds.config.tree import Optimizer
from vitds.engine.head_shard import HeadShard, total_norm
from vitds.engine.state import EngineState
from vitds.runs.checkpoint import CheckpointReader


def set_groups(optimizer: Any, *, rate: float, weight_decay: float, epoch: int) -> None:
    """Give the parameter groups of an optimizer, or of DeepSpeed's around it, what a step has for them.

    `lr_scale` multiplies a group's rate, which is 0 in its first `held_epochs` epochs: with it AdamW leaves
    weights to the bit, where a gradient of 0 would leave its weight decay at work. A group that does not
    `decay` has none.
    """
    for group in optimizer.param_groups:
        is_held = epoch < group.get("held_epochs", 0)
        group["lr"] = 0.0 if is_held else rate * group.get("lr_scale", 1.0)
        group["weight_decay"] = weight_decay * group.get("decays", True)


class JointUpdate:
    """Everything that an optimizer step changes.

    Args:
        engine: around the method's module.
        heads: beside it.
        settings: the moving average of the engine's weights, clipping.
        is_late: whether the device alone decides on a step (`apply_late`), see engine/late.py.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        heads: Sequence[HeadShard],
        settings: Optimizer,
        *,
        is_late: bool = False,
    ) -> None:
        self.engine = engine
        self.heads = tuple(heads)
        self.clip_norm = settings.clip_norm
        self.is_late = is_late
        self.state = EngineState(engine, settings.average_decay)

    @property
    def image_dtype(self) -> torch.dtype:
        """Of the engine's input: bfloat16 or float16 where its weights are; under autocast float32."""
        if self.engine.bfloat16_enabled() or self.engine.fp16_enabled():
            return next(self.engine.module.parameters()).dtype
        return torch.float32

    def set_schedule(self, rate: float, weight_decay: float, epoch: int) -> None:
        """Learning rate and weight decay of the step, see `set_groups`."""
        # Set anew at each step: no scheduler, so a checkpoint has no schedule to save.
        for optimizer in (self.engine.optimizer, *(head.optimizer for head in self.heads)):
            set_groups(optimizer, rate=rate, weight_decay=weight_decay, epoch=epoch)

    def backward(self, terms_T: Float[Tensor, "T"]) -> None:
        """The backward pass of this rank's part of the step's loss.

        DeepSpeed divides what it gets by the micro steps and averages gradients over ranks; both are
        multiplied back in.
        """
        # The terms are parts of a sum, already weighted: neither A nor R may divide them.
        factor = self.engine.gradient_accumulation_steps() * dist.world_size()
        self.engine.backward(factor * terms_T.sum())

    def end_micro_step(self) -> None:
        """Between two backward passes of one step."""
        self.engine.step()

    def gradient_norms(self) -> Float[Tensor, "k"]:
        """Of gradients that DeepSpeed does not look at itself, before clipping, float64, on the device.

        At ZeRO stage 0 that of the engine's first, then that of each head, with the loss scale still in it.
        Called once a step by every rank; the same on all of them.
        """
        # A collective in each head, so no rank may leave it out.
        norms = [head.gradient_norm() for head in self.heads]
        # From stage 1 on gradients lie in DeepSpeed's own partitions, and it looks at them itself.
        if self.state.stage == 0:
            # The last backward pass averaged them over ranks, so every rank finds the same norm.
            gradients = [
                parameter.grad for parameter in self.engine.module.parameters() if parameter.grad is not None
            ]
            norms.insert(0, total_norm(gradients).double())
        return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64, device=self.engine.device)

    def apply(
        self, is_sound: bool, norms: Sequence[float], *, step: int, updates: int
    ) -> tuple[bool, dict[str, float]]:
        """Step, or not.

        Args:
            is_sound: what all ranks agreed on.
            norms: what `gradient_norms` found.
            step: number of the step, from 0.
            updates: how many steps changed the weights before this one.
        Returns: whether the weights changed, which DeepSpeed may refuse too; the gradient norms for the
            metrics line.
        """
        of_heads = norms if self.state.stage else norms[1:]
        # Both before the step, which counts on, and may change the scale that these gradients carry.
        before = self.engine.skipped_steps
        scale = self.loss_scale
        # The flag cancels AdamW's own step alone. engine.step() always runs, to clear gradients and count.
        self.state.inner.skip = not is_sound
        self.engine.step()
        # DeepSpeed may skip by itself, as fp16's loss scaling does, and says so by its counter only.
        did_update = is_sound and self.engine.skipped_steps == before
        # None where DeepSpeed computed no norm.
        found = {
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0) if self.state.stage else norms[0]
        }
        # Heads follow the engine, whatever they found themselves: all parts step, or none.
        for head, head_norm in zip(self.heads, of_heads, strict=True):
            head.update(did_update, norm=head_norm, step=step, loss_scale=scale)
            # Logged without the loss scale, to be compared with the engine's.
            found["grad_norm/head"] = head_norm / scale
        # After the weights have moved: the average is of what they are now.
        if did_update:
            self.state.update_average(updates + 1)
        return did_update, found

    def apply_late(self, is_unsound: Float[Tensor, ""], norms_k: Float[Tensor, "k"]) -> None:
        """Step, or not, as a number on the device says, which the host does not know.

        Args:
            is_unsound: 1 where no rank may step, else 0.
            norms_k: what `gradient_norms` found.
        """
        optimizers = [self.engine.optimizer, *(head.optimizer for head in self.heads)]
        for optimizer, norm in zip(optimizers, norms_k, strict=True):
            # torch's fused AdamW reads both in its kernels. With the first at 1 it leaves weights, moments
            # and its counter as they are; by the second it divides the gradients.
            optimizer.found_inf = is_unsound.float()
            if self.clip_norm:
                optimizer.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp(min=1).float()
        # Clears gradients and counts, as in every step.
        self.engine.step()
        for head in self.heads:
            head.optimizer.step()
            head.optimizer.zero_grad(set_to_none=True)

    @property
    def loss_scale(self) -> float:
        """Of fp16; 1 elsewhere."""
        return float(self.engine.optimizer.loss_scaler.loss_scale) if self.engine.fp16_enabled() else 1.0

    def snapshot(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """This rank's tensors by kind, and the facts that belong to them; for write_checkpoint.

        Called by every rank.
        """
        parts = {"model": self.state.snapshot()}
        ranges = None
        for head in self.heads:
            # One name: no method has two heads beside the engine.
            parts["head"] = head.snapshot()
            ranges = head.ranges
        return parts, {"head_rows": ranges, **self.state.counters()}

    def restore(self, saved: CheckpointReader, *, step: int, updates: int) -> None:
        """Set everything from a checkpoint of any number of ranks and any ZeRO stage.

        Raises: RunError if a name or a row is missing.
        """
        # `updates` and not `step`: Adam's bias correction counts the steps that changed its moments.
        self.state.restore(saved, updates)
        self.state.set_counters(saved.saved.manifest, step)
        for head in self.heads:
            head.restore(saved, updates)

    def settled_weights(self, done: int) -> dict[str, Tensor]:
        """The result as of `done` steps; lazy rows are brought up to them."""
        for head in self.heads:
            head.settle(done)
        return self.result()

    def result(self) -> dict[str, Tensor]:
        """What leaves the run, float32 by name, on every rank: weights, or averages where those are kept."""
        return self.state.weights(averaged=self.state.average_decay > 0)
