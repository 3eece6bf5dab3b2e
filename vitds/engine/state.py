"""Masters, moments and counters of a DeepSpeed engine by parameter name, for every ZeRO stage and world size.

What it takes at each stage is written beside the code; tests/engine/test_resume.py proves every pair of
stages and rank counts.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from vitds import dist
from vitds.runs.checkpoint import CheckpointReader

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"


class EngineState:
    """Reads and writes an engine's state; all methods that touch tensors are called by every rank together.

    Averaged weights lie in the optimizer's state beside the moments, each rank its part, so ZeRO shards, and
    we save, all alike. Frozen parameters have neither masters nor states; ZeRO-3 shards them as it does
    others.

    Args:
        average_decay: of the moving average of the weights; 0: none is kept.
    """

    def __init__(self, engine: DeepSpeedEngine, average_decay: float = 0.0) -> None:
        self.engine, self.average_decay = engine, average_decay
        self.keys = (*MOMENTS, AVERAGE) if average_decay else MOMENTS
        self.stage = engine.zero_optimization_stage()
        self.parameters = dict(engine.module.named_parameters())
        # ZeRO wraps our AdamW; at stage 0 the engine has it as it is.
        self.inner = engine.optimizer.optimizer if self.stage else engine.optimizer
        self._make_moments()

    def _make_moments(self) -> None:
        """Make now what Adam makes at its first step: what a resume writes into, and step 0 can save."""
        # What AdamW updates: at stage 0 the parameters, else this rank's flat float32 share of each group.
        if self.stage == 0:
            held = [parameter for group in self.inner.param_groups for parameter in group["params"]]
        elif self.stage == 3:
            held = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            held = self.engine.optimizer.single_partition_of_fp32_groups
        for tensor in held:
            self.inner.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),  # where a fused AdamW wants it
                **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
            }
            if self.average_decay:
                self.inner.state[tensor][AVERAGE] = tensor.detach().clone()
        # Links each parameter to its place in the flat states, without which the safe_get functions find
        # nothing. DeepSpeed itself does it after its first step.
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def update_average(self, updates: int) -> None:
        """After `updates` steps.

        The first ones count for little: the decay grows to its value, (1 + t) / (10 + t) below it.
        """
        if not self.average_decay:
            return
        # A fixed decay of 0.9999 would keep the random first weights in the average for 10,000 steps.
        decay = min(self.average_decay, (1 + updates) / (10 + updates))
        for tensor, state in self.inner.state.items():
            if AVERAGE in state:
                # average = decay · average + (1 - decay) · weight, on whatever share of both this rank has.
                state[AVERAGE].lerp_(tensor.detach(), 1 - decay)

    def snapshot(self) -> dict[str, Tensor]:
        """This rank's share of the masters, their states and the buffers, by name, on the host.

        The names are NAME, NAME.exp_avg, NAME.exp_avg_sq (float32, full shape), and NAME.average if it is on.
        Whole tensors pass through one rank at a time, and each is kept by one rank only, so no rank holds
        all.
        """
        kept: dict[str, Tensor] = {}
        # ZeRO-3 empties a parameter and notes its true size in ds_numel.
        sizes = [
            getattr(parameter, "ds_numel", parameter.numel()) * len(self._keys(parameter))
            for parameter in self.parameters.values()
        ]
        # The same list on every rank, so each parameter is kept by exactly one.
        owners = dist.spread(sizes, dist.world_size())
        for owner, (name, parameter) in zip(owners, self.parameters.items(), strict=True):
            for key in self._keys(parameter):
                # By every rank, also those that do not keep it: from stage 1 on it is a collective.
                value = self._get(parameter, key)
                if owner == dist.rank():
                    # To the host one by one: a rank's whole share need not fit on the device as well.
                    kept[name if key is None else f"{name}.{key}"] = value.detach().to("cpu", copy=True)
        # Buffers are not sharded; rank 0's stand for all.
        if dist.is_main():
            kept |= dict(self._buffers())
        return kept

    def weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """All float32 masters, or their averages, by name, and rank 0's buffers, on every rank, on the host.

        The statistics of a BatchNorm are each rank's own; a checkpoint holds those of rank 0, so only they
        may decide a number.
        """
        # A frozen parameter has no average: it never moves.
        key = AVERAGE if averaged else None
        masters = {
            name: self._get(parameter, key if parameter.requires_grad else None).detach().cpu().clone()
            for name, parameter in self.parameters.items()
        }
        # Broadcast, for the ranks' own buffers may differ.
        return masters | dist.broadcast_object(
            {name: buffer.detach().cpu().clone() for name, buffer in self._buffers()}
        )

    def restore(self, saved: CheckpointReader, updates: int) -> None:
        """Set masters, moments and buffers from a checkpoint, and Adam's counter.

        Args:
            saved: the checkpoint.
            updates: how many steps changed the weights; Adam counts these.
        Raises: RunError if a name is missing.
        """
        for name, parameter in self.parameters.items():
            for key in self._keys(parameter):
                self._set(parameter, saved.get(name if key is None else f"{name}.{key}"), key)
        with torch.no_grad():
            for name, buffer in self._buffers():
                buffer.copy_(saved.get(name))
        for state in self.inner.state.values():
            # Adam's bias correction counts updates; skipped steps are none.
            state["step"].fill_(updates)

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Persistent buffers (BatchNorm's); the keyed masks are made anew before each forward."""
        return list(_persistent_buffers(self.engine.module).items())

    def _keys(self, parameter: nn.Parameter) -> tuple[str | None, ...]:
        """None for the weight itself, and the names of its states."""
        return (None, *self.keys) if parameter.requires_grad else (None,)

    def _get(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        if not parameter.requires_grad:
            # No optimizer has the frozen ones, so the safe_get functions find nothing.
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                return parameter.detach().float().clone()
        # Whole float32 parameters, which are their own masters.
        if self.stage == 0:
            return parameter if key is None else self.inner.state[parameter][key]
        return (
            safe_get_full_fp32_param(parameter)
            if key is None
            else safe_get_full_optimizer_state(parameter, key)
        )

    @torch.no_grad()
    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        # Masters and moments are float32 at every stage, whatever the module computes in.
        value = value.to(torch.float32)
        # Stage 3 first: there even a frozen parameter is in pieces.
        if self.stage == 3:
            self._set_partition(parameter, value, key)
        elif not parameter.requires_grad:
            parameter.copy_(value)
        elif self.stage == 0:
            self._get(parameter, key).copy_(value)
        elif key is None:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
            parameter.data.copy_(
                value
            )  # the setter changes the master only; the module's copy would follow a step late
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _set_partition(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Stage 3: pad and set the own part; DeepSpeed's full setter fails where ranks do not divide."""
        # Every rank has an equal share; where ranks do not divide, the last one ends in zeros.
        share = parameter.ds_tensor.numel()
        padded = torch.zeros(share * dist.world_size())
        padded[: value.numel()] = value.flatten()
        own = padded[dist.rank() * share : (dist.rank() + 1) * share].to(parameter.ds_tensor.device)
        if key is not None:
            safe_set_local_optimizer_state(parameter, own, key)
            return
        # Master first, then what the module computes with, which would else follow a step late.
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, own)
        parameter.ds_tensor.data.copy_(own)
        if parameter.data.numel() == value.numel():  # small parameters stay gathered on every rank
            parameter.data.copy_(value.view_as(parameter.data))

    def counters(self) -> dict[str, Any]:
        """DeepSpeed's own count of skipped steps and, for fp16, the loss scaler's numbers."""
        scaler = vars(self.engine.optimizer.loss_scaler) if self.engine.fp16_enabled() else {}
        # Its numbers alone: what else it holds is built anew.
        numbers = {key: value for key, value in scaler.items() if isinstance(value, (int, float))}
        return {"engine_skipped": self.engine.skipped_steps, "scaler": numbers}

    def set_counters(self, saved: dict[str, Any], steps: int) -> None:
        """The inverse of `counters`; micro steps are counted anew, for the accumulation may be another."""
        self.engine.skipped_steps = saved["engine_skipped"]
        self.engine.global_steps = steps
        # A whole number of accumulations, or DeepSpeed would end the next one too early.
        self.engine.micro_steps = steps * self.engine.gradient_accumulation_steps()
        for name, value in saved["scaler"].items():
            setattr(self.engine.optimizer.loss_scaler, name, value)


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            # torch has no public call for these alone; state_dict would bring all parameters too.
            if name not in child._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
