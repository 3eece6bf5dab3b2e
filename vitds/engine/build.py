"""The DeepSpeed engine: DeepSpeed owns the backbone and a dense head; the user's JSON says how, the recipe what."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import ValidationError
from torch import nn

from vitds import dist
from vitds.config.deepspeed import DsConfig, resolve_ds_config
from vitds.config.tree import Optimizer, Settings
from vitds.errors import SettingsError


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose next steps can be called off: the loop's joint flag over engine and sharded head works at every ZeRO stage."""

    skip = False

    def step(self, closure: Any = None) -> Any:
        """torch's step, or nothing."""
        return None if self.skip else super().step(closure)


class SkippableCPUAdam(DeepSpeedCPUAdam):
    """The same for optimizer states in host memory."""

    skip = False

    def step(self, closure: Any = None) -> Any:
        """DeepSpeed's step, or nothing."""
        return None if self.skip else super().step(closure)


def build_optimizer(module: nn.Module, settings: Optimizer, *, on_host: bool = False) -> SkippableAdamW | SkippableCPUAdam:
    """AdamW with one parameter group: weight decay on everything, as the paper's code has it (METHOD 3.4)."""
    common = dict(lr=settings.lr_peak, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    if on_host:
        return SkippableCPUAdam(module.parameters(), adamw_mode=True, **common)
    return SkippableAdamW(module.parameters(), **common)


def build_engine(module: nn.Module, settings: Settings, ds: DsConfig, accumulation: int, device: torch.device) -> DeepSpeedEngine:
    """Hand a module, built whole, to DeepSpeed.

    Args:
        settings: resolved; no `auto` is left.
    Raises: SettingsError if the JSON and the recipe contradict each other.
    """
    config = resolve_ds_config(
        ds,
        settings,
        micro_images=settings.batch.micro_images,
        accumulation=accumulation,
        ranks=dist.world_size(),
        precision=settings.engine.precision,
    )
    torch.use_deterministic_algorithms(settings.engine.deterministic)
    if settings.engine.activation_checkpointing:
        module.backbone.set_grad_checkpointing(True)
    if settings.engine.compile == "on":
        module.backbone.compile()
    module.to(device)
    optimizer = build_optimizer(module, settings.optimizer, on_host=ds.offloads_optimizer)
    try:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise SettingsError(f"{ds.path}: DeepSpeed refuses it: {wrong}") from error
