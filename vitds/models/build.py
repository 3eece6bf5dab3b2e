"""Backbones built whole from the seed."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn

from vitds import rng
from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.models.create import create_model, own_words
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
    # timm draws from torch's generators: built whole and in one go, a seed gives every rank the same.
    with rng.seeded_torch(Purpose.INIT, seed, 0):
        backbone = create_model(settings, crop_px)
    # A plain attribute: not a buffer, so it is in no checkpoint.
    backbone.facts = facts
    backbone.register_forward_pre_hook(_channels_last)
    _try_one_crop(backbone, settings.name, crop_px)
    # Before the optimizer is built, which leaves out what needs no gradient.
    for part in settings.frozen:
        freeze_part(backbone, part)
    return backbone


def _channels_last(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Crops (M, 3, S, S) with the channels of a pixel side by side in memory.

    Convolutions keep the order that comes in, and are quicker in this one, on CPUs by up to 45 %
    (docs/benchmarks.md). The order of the weights is left alone: DeepSpeed lays them out anew.
    """
    return tuple(crops.contiguous(memory_format=torch.channels_last) for crops in given)


def _try_one_crop(backbone: nn.Module, name: str, crop_px: int) -> None:
    """A pass with numbers: on the meta device an index beyond a table's end is not seen (MViT v2 has one).

    Raises: SettingsError if it fails.
    """
    # A plan builds without numbers, and there is nothing to compute with.
    if next(backbone.parameters()).is_meta:
        return
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, crop_px, crop_px))
    except Exception as error:  # each model has its own way to fail on a side
        raise SettingsError(
            f"backbone {name} cannot take crops of {crop_px} pixels ({own_words(error)}); try another "
            "views.crop_px: multiples of 32 suit most models"
        ) from error
    backbone.train()  # as timm makes it; what a model keeps for evaluation is dropped


def freeze_part(backbone: nn.Module, part: str) -> None:
    """Parameters named `part`, or with names that begin with it and a dot, need no gradient.

    So `blocks.1` does not mean blocks.10.

    Raises: SettingsError if there are none (names near ones).
    """
    names = [name for name, _ in backbone.named_parameters()]
    # The dot on both sides keeps `blocks.1` from meaning blocks.10.
    chosen = [name for name in names if f"{name}.".startswith(f"{part}.")]
    if not chosen:
        # All beginnings of names, up to each dot, to suggest a near one.
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


def checkpoint_activations(backbone: nn.Module, name: str) -> None:
    """From now on the backward pass computes the activations of its blocks again, in place of keeping them.

    Raises: SettingsError if the model has no way to do so.
    """
    try:
        backbone.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:  # timm's models say so by either
        raise SettingsError(
            f"engine.activation_checkpointing: timm's {name} cannot do it; set it to false, and fewer "
            "batch.micro_images where memory is short"
        ) from error


def patch_count(backbone: nn.Module) -> int:
    """Patches of one crop, 0 where the model cuts none."""
    return backbone.facts.patches
