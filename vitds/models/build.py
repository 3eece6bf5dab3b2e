"""Backbones built whole from the seed."""

from __future__ import annotations

import difflib

from torch import nn

from vitds import rng
from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.models.create import create_model
from vitds.models.facts import model_facts
from vitds.rng import Purpose


def build_backbone(settings: Backbone, *, crop_px: int, seed: int) -> nn.Module:
    """A timm model without classifier; forward gives pooled features (M, D).

    Its attribute `facts` is a ModelFacts: width, patches, parameters, operations.

    Args:
        settings: name and options; drop_path and patch_drop are passed where the model takes them; frozen
            parts need no gradient.
        crop_px: side of the crops it will see, in pixels.
        seed: its weights are a function of it alone.
    Raises: SettingsError for an unknown name (with near ones), options or a side with which the model does
        not train (says what would do), or a frozen part that it does not have.
    """
    facts = model_facts(settings, crop_px)
    with rng.seeded_torch(Purpose.INIT, seed, 0):
        backbone = create_model(settings, crop_px)
    backbone.facts = facts
    for part in settings.frozen:
        freeze_part(backbone, part)
    return backbone


def freeze_part(backbone: nn.Module, part: str) -> None:
    """Parameters named `part`, or with names that begin with it and a dot, need no gradient.

    So `blocks.1` does not mean blocks.10.

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


def patch_count(backbone: nn.Module) -> int:
    """Patches of one crop, 0 where the model cuts none."""
    return backbone.facts.patches
