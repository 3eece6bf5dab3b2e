"""The DeepSpeed engine, which owns the backbone and a dense head.

The user's JSON says how the numbers are computed, the recipe what is computed.
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME
from pydantic import ValidationError
from torch import nn

from vitds import dist
from vitds.config.deepspeed import DsConfig, resolve_ds_config
from vitds.config.tree import Settings
from vitds.engine import late
from vitds.engine.optimizer import build_optimizer
from vitds.engine.process import wait_for_slow_ranks
from vitds.errors import SettingsError
from vitds.methods.base import Method
from vitds.models.build import checkpoint_activations
from vitds.models.patches import multiply_patches
from vitds.plan.case import reduce_bucket


def build_engine(
    method: Method, settings: Settings, ds: DsConfig, accumulation: int, device: torch.device
) -> DeepSpeedEngine:
    """Hand a method's module, built whole, to DeepSpeed.

    Args:
        method: whose module is moved to `device`.
        settings: resolved; no `auto` is left.
        ds: the user's DeepSpeed JSON.
        accumulation: A, micro steps of a step.
        device: that trains.
    Raises: SettingsError if the JSON and the recipe contradict each other, or ask for what the module cannot
        do.
    """
    module = method.module
    config = resolve_ds_config(
        ds,
        settings,
        micro_images=settings.batch.micro_images,
        accumulation=accumulation,
        ranks=dist.world_size(),
        precision=settings.engine.precision,
    )
    check_module(method, settings, ds, has_bf16_weights=config["bf16"]["enabled"])
    if settings.engine.precision == "fp16" and ds.zero_stage == 0:
        # Stage 0 keeps its float32 masters where no name leads to them. Stage 1 takes the same steps, and on
        # one rank all of them.
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": 1}
    # DeepSpeed's own bucket of 5e8 numbers is memory that a small model never fills.
    zero = config.setdefault("zero_optimization", {})
    if zero.get("reduce_bucket_size", "auto") == "auto":
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        zero["reduce_bucket_size"] = reduce_bucket(trained)
    config["zero_force_ds_cpu_optimizer"] = False  # offloaded states may be torch's
    if late.may_be_late(settings, method, zero_stage=ds.zero_stage, device=device):
        # By `apply_late`. DeepSpeed's clipping copies its limit to the card, for which the host would wait.
        config["gradient_clipping"] = 0.0
    _make_ready(method, settings, ds, device)
    # Ours and not DeepSpeed's, so that a step can be cancelled and nothing is compiled.
    optimizer = build_optimizer(
        module,
        settings.optimizer,
        lr_scales=method.lr_scales,
        held_epochs=method.held_epochs,
        on_host=ds.offloads_optimizer,
    )
    try:
        engine = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise SettingsError(f"{ds.path}: DeepSpeed refuses it: {wrong}") from error
    wait_for_slow_ranks()
    if ds.zero_stage == 3:
        gather_biases_in_float32(module)
    return engine


def _make_ready(method: Method, settings: Settings, ds: DsConfig, device: torch.device) -> None:
    """Checkpointing of activations, patches as products, compilation, and the module on its device."""
    # The student alone: a teacher runs without gradients, and so keeps nothing.
    if settings.engine.activation_checkpointing:
        checkpoint_activations(method.module.backbone, settings.backbone.name)
    # Not under ZeRO-3, whose hooks know the weight by the layer that multiplies with it.
    if device.type == "cuda" and ds.zero_stage != 3:
        for backbone in method.backbones:
            multiply_patches(backbone)
    if settings.engine.compile == "on":
        # In place, so no parameter changes its name; a checkpoint has them by name.
        for backbone in method.backbones:
            backbone.compile()
    # Before the optimizer is built: it asks where the parameters are.
    method.module.to(device)


def check_module(method: Method, settings: Settings, ds: DsConfig, *, has_bf16_weights: bool) -> None:
    """Raises: SettingsError if the module cannot be trained as the settings and the JSON ask for."""
    module = method.module
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise SettingsError(
            "backbone.frozen freezes the whole backbone, and a sharded head trains outside the engine, which "
            "has nothing "
            "left to do; leave a part out, or set head.kind=dense"
        )
    if has_bf16_weights and any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()
    ):
        raise SettingsError(
            f"{ds.place('bf16.enabled')}: bf16.enabled makes the parameters bf16, which torch's BatchNorm in "
            f"{settings.backbone.name} does not take beside float32 statistics; "
            'use "torch_autocast": {"enabled": true}'
        )
    if method.has_teacher and ds.zero_stage == 3:
        raise SettingsError(
            f"method {settings.method} has a teacher that follows the weights after each update, and ZeRO "
            f"stage 3 leaves "
            "no rank with whole weights to follow; take a DeepSpeed JSON of stage 0 to 2"
        )
    if method.has_teacher and (has_bf16_weights or settings.engine.precision == "fp16"):
        raise SettingsError(
            f"method {settings.method} has a teacher that moves by small steps, which 16-bit weights would "
            f"round away; "
            'set engine.precision=bf16 (autocast over float32 weights) or fp32, without "bf16" in the '
            "DeepSpeed JSON"
        )


def gather_biases_in_float32(module: nn.Module) -> None:
    """ZeRO-3 under autocast: leave biases out of what travels in bf16; call it after `deepspeed.initialize`.

    DeepSpeed 0.19.8 gathers small parameters in float32 after each step, but in bf16 in a process's first
    one, and its linear layer adds a bias as it is: so the first step after a resume differed from the same
    step of a run that went on.
    """
    for name, parameter in module.named_parameters():
        if name.endswith("bias") and hasattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME):
            delattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME)
