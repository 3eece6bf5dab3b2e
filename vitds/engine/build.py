"""The DeepSpeed engine: DeepSpeed owns the backbone and a dense head; the user's JSON says how, the recipe what."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME
from pydantic import ValidationError
from torch import nn

from vitds import dist
from vitds.config.deepspeed import DsConfig, resolve_ds_config
from vitds.config.tree import Optimizer, Settings
from vitds.errors import SettingsError
from vitds.plan.case import reduce_bucket


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose next steps can be called off: the loop's joint flag over engine and sharded head works at every ZeRO stage."""

    skip = False

    def step(self, closure: Any = None) -> Any:
        """torch's step, or nothing."""
        return None if self.skip else super().step(closure)


def parameter_groups(module: nn.Module, head_lr_scale: float) -> list[dict[str, Any]]:
    """One group, weight decay on everything, as the paper's code has it (METHOD 3.4); the head in a second one if its rate is another."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if head_lr_scale == 1.0:
        return [{"params": list(trained.values())}]
    head = [parameter for name, parameter in trained.items() if name.startswith("head.")]
    others = [parameter for name, parameter in trained.items() if not name.startswith("head.")]
    return [
        group
        for group in ({"params": others}, {"params": head, "lr_scale": head_lr_scale})
        if group["params"]
    ]


def build_optimizer(
    module: nn.Module, settings: Optimizer, *, head_lr_scale: float = 1.0, on_host: bool = False
) -> SkippableAdamW:
    """AdamW; the loop multiplies the rate of a group that has an `lr_scale` by it.

    Args:
        on_host: states are offloaded to host memory. torch's fused AdamW then does what DeepSpeed's CPU Adam does, one vectorised
            pass over memory, and needs no compiler at the first start.
    """
    common = dict(
        lr=settings.lr_peak, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    return SkippableAdamW(parameter_groups(module, head_lr_scale), fused=on_host, **common)


def build_engine(
    module: nn.Module, settings: Settings, ds: DsConfig, accumulation: int, device: torch.device
) -> DeepSpeedEngine:
    """Hand a module, built whole, to DeepSpeed.

    Args:
        settings: resolved; no `auto` is left.
    Raises: SettingsError if the JSON and the recipe contradict each other, bf16 parameters meet a BatchNorm, or nothing is left to train.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise SettingsError(
            "backbone.frozen freezes the whole backbone, and a sharded head trains outside the engine, which has nothing left to do; "
            "leave a part out, or set head.kind=dense"
        )
    config = resolve_ds_config(
        ds,
        settings,
        micro_images=settings.batch.micro_images,
        accumulation=accumulation,
        ranks=dist.world_size(),
        precision=settings.engine.precision,
    )
    if config["bf16"]["enabled"] and any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()
    ):
        raise SettingsError(
            f"{ds.place('bf16.enabled')}: bf16.enabled makes the parameters bf16, which torch's BatchNorm in {settings.backbone.name} does "
            'not take beside float32 statistics; use "torch_autocast": {"enabled": true}'
        )
    if settings.engine.precision == "fp16" and ds.zero_stage == 0:
        # Stage 0 keeps its float32 masters where no name leads to them. Stage 1 takes the same steps, and on one rank all of them.
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": 1}
    zero = config.setdefault("zero_optimization", {})
    if zero.get("reduce_bucket_size", "auto") == "auto":
        zero["reduce_bucket_size"] = reduce_bucket(
            sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        )
    config["zero_force_ds_cpu_optimizer"] = False  # offloaded states may be torch's
    torch.use_deterministic_algorithms(settings.engine.deterministic)
    if settings.engine.activation_checkpointing:
        module.backbone.set_grad_checkpointing(True)
    if settings.engine.compile == "on":
        module.backbone.compile()
    module.to(device)
    optimizer = build_optimizer(
        module, settings.optimizer, head_lr_scale=settings.head.lr_scale, on_host=ds.offloads_optimizer
    )
    try:
        engine = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise SettingsError(f"{ds.path}: DeepSpeed refuses it: {wrong}") from error
    if ds.zero_stage == 3:
        gather_biases_in_float32(module)
    return engine


def gather_biases_in_float32(module: nn.Module) -> None:
    """ZeRO-3 under autocast: leave biases out of what travels in bf16; call it after `deepspeed.initialize`.

    DeepSpeed 0.19.8 gathers small parameters in float32 after each step, but in bf16 in a process's first one, and its linear layer adds a
    bias as it is: so the first step after a resume differed from the same step of a run that went on.
    """
    for name, parameter in module.named_parameters():
        if name.endswith("bias") and hasattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME):
            delattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME)
