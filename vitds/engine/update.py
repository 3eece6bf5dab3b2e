"""The DeepSpeed engine and the heads beside it: one rate, one flag, one checkpoint.

Both step, or neither does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from jaxtyping import Float
from torch import Tensor

from vitds import dist
from vitds.engine.head_shard import HeadShard, total_norm
from vitds.engine.state import EngineState
from vitds.runs.checkpoint import CheckpointReader


@dataclass(frozen=True)
class Norms:
    """Norms of the gradients that DeepSpeed does not look at itself, before clipping.

    Attributes:
        engine: of all of them at ZeRO stage 0 in fp32; None elsewhere, where DeepSpeed finds and skips what
            is not finite.
        heads: of each sharded head, with the loss scale still in it.
    """

    engine: float | None
    heads: tuple[float, ...]

    @property
    def are_finite(self) -> bool:
        """Whether nothing seen here stands against a step."""
        return all(math.isfinite(norm) for norm in (self.engine or 0.0, *self.heads))


class JointUpdate:
    """Everything that an optimizer step changes.

    Args:
        engine: around the method's module.
        heads: beside it.
        average_decay: of the moving average of the engine's weights; 0: none.
    """

    def __init__(self, engine: DeepSpeedEngine, heads: Sequence[HeadShard], average_decay: float) -> None:
        self.engine = engine
        self.heads = tuple(heads)
        self.state = EngineState(engine, average_decay)

    @property
    def has_small_weights(self) -> bool:
        """Whether the engine's weights are bfloat16 or float16, and so its inputs must be."""
        return self.engine.bfloat16_enabled() or self.engine.fp16_enabled()

    def set_rate(self, rate: float) -> None:
        """The learning rate of the step; a parameter group's `lr_scale` multiplies it."""
        optimizers = (self.engine.optimizer, *(head.optimizer for head in self.heads))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def backward(self, terms_T: Float[Tensor, "T"]) -> None:
        """The backward pass of this rank's part of the step's loss.

        DeepSpeed divides what it gets by the micro steps and averages gradients over ranks; both are
        multiplied back in.
        """
        factor = self.engine.gradient_accumulation_steps() * dist.world_size()
        self.engine.backward(factor * terms_T.sum())

    def end_micro_step(self) -> None:
        """Between two backward passes of one step."""
        self.engine.step()

    def gradient_norms(self) -> Norms:
        """Look at the gradients of the whole step; called once a step by every rank."""
        heads = tuple(head.gradient_norm() for head in self.heads)
        if self.state.stage:
            return Norms(None, heads)
        gradients = [
            parameter.grad for parameter in self.engine.module.parameters() if parameter.grad is not None
        ]
        return Norms(float(total_norm(gradients)), heads)

    def apply(
        self, is_sound: bool, norms: Norms, *, step: int, updates: int
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
        before = self.engine.skipped_steps
        scale = self.loss_scale
        self.state.inner.skip = not is_sound
        self.engine.step()
        did_update = is_sound and self.engine.skipped_steps == before
        norm = float(self.engine.get_global_grad_norm() or 0.0) if norms.engine is None else norms.engine
        found = {"grad_norm": norm}
        for head, head_norm in zip(self.heads, norms.heads, strict=True):
            head.update(did_update, norm=head_norm, step=step, loss_scale=scale)
            found["grad_norm/head"] = head_norm / scale
        if did_update:
            self.state.update_average(updates + 1)
        return did_update, found

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
            parts["head"] = head.snapshot()
            ranges = head.ranges
        return parts, {"head_rows": ranges, **self.state.counters()}

    def restore(self, saved: CheckpointReader, *, step: int, updates: int) -> None:
        """Set everything from a checkpoint of any number of ranks and any ZeRO stage.

        Raises: RunError if a name or a row is missing.
        """
        self.state.restore(saved, updates)
        self.state.set_counters(saved.saved.manifest, step)
        for head in self.heads:
            head.restore(saved, updates)

    def settled_weights(self, done: int) -> dict[str, Tensor]:
        """The engine's float32 weights by name, on every rank; lazy rows are brought up to `done` steps."""
        for head in self.heads:
            head.settle(done)
        return self.state.weights()

    def result(self) -> dict[str, Tensor]:
        """What leaves the run: the weights, or their averages where those are kept."""
        return self.state.weights(averaged=self.state.average_decay > 0)
