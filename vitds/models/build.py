"""timm's backbones, built whole from the seed."""

from __future__ import annotations

import difflib

import timm
import torch
from torch import nn

from vitds import rng
from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.models.stochastic import replace_stochastic
from vitds.rng import Purpose


def build_backbone(settings: Backbone, *, crop_px: int, seed: int) -> nn.Module:
    """A timm model without classifier, its weights a function of the seed alone; forward gives pooled features (M, D).

    Args:
        settings: name and options; drop_path and patch_drop are passed where the model takes them; frozen parts need no gradient.
        crop_px: image side, for models whose position embedding depends on it.
    Raises: SettingsError for an unknown name (with near ones), an option the model does not take, a side its patches do not divide, or
        a frozen part that it does not have.
    """
    if not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, timm.list_models(), 3, 0.5)
        raise SettingsError(
            f"backbone.name {settings.name!r} is no timm model; near names: {', '.join(near) or 'none'}"
        )
    options = dict(settings.options)
    if timm.get_pretrained_cfg_value(settings.name, "fixed_input_size"):
        options["img_size"] = crop_px
    for key, value in (("drop_path_rate", settings.drop_path), ("patch_drop_rate", settings.patch_drop)):
        if value:
            options[key] = value
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(rng.seed_of(Purpose.INIT, seed, 0))
        try:
            backbone = timm.create_model(settings.name, pretrained=False, num_classes=0, **options)
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            raise SettingsError(
                f"backbone {settings.name} with options {options} cannot be built: {error}"
            ) from error
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if patch is not None and "img_size" in options and any(crop_px % side for side in patch):
        raise SettingsError(
            f"views.crop_px {crop_px} is not a multiple of {settings.name}'s patch of {patch[0]} pixels"
        )
    replace_stochastic(backbone)
    for part in settings.frozen:
        freeze_part(backbone, part)
    return backbone


def freeze_part(backbone: nn.Module, part: str) -> None:
    """Parameters named `part`, or with names that begin with it and a dot, need no gradient: `blocks.1` does not mean blocks.10.

    Raises: SettingsError if there are none (names near ones).
    """
    names = [name for name, _ in backbone.named_parameters()]
    chosen = [name for name in names if f"{name}.".startswith(f"{part}.")]
    if not chosen:
        parts = {
            ".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)
        }
        near = difflib.get_close_matches(part, sorted(parts), 3, 0.5) or sorted(
            {name.split(".")[0] for name in names}
        )
        raise SettingsError(
            f"backbone.frozen {part!r}: no parameter's name begins so; there are {', '.join(near)}"
        )
    for name in chosen:
        backbone.get_parameter(name).requires_grad_(False)


def feature_width(backbone: nn.Module) -> int:
    """D, the width of the features that the model's classifier would see."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)


def patch_count(backbone: nn.Module) -> int:
    """Patches of one image, 0 where the model has no fixed grid."""
    return int(getattr(getattr(backbone, "patch_embed", None), "num_patches", 0) or 0)
