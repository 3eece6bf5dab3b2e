"""What a backbone is, asked of the model itself on torch's meta device, where tensors have no numbers.

So nothing depends on attributes that not every model sets right (`num_features` is not the features' width in
thirteen of timm's families), a model that cannot train on these crops is refused before anything is written,
and it takes tenths of a second whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.models.create import check_name, create_model, own_words
from vitds.models.stochastic import KeyedDropPath, KeyedPatchDrop, kept_patches

# Crops of the pass that asks. A prime above any grid's side: an axis that it divides
# has whole rows of images in it.
CROPS = 211
# What patches, windows and strides of timm's models come to.
STEPS = (1, 2, 4, 7, 8, 12, 14, 16, 24, 28, 32, 48, 56, 64, 120, 256)


@dataclass(frozen=True)
class ModelFacts:
    """What a backbone makes of a crop in training.

    Attributes:
        parameters: how many numbers it trains.
        width: D, of the row of features that an image gets.
        patches: of a crop, before patch drop; 0 where the model cuts none.
        flops: of the forward pass of one crop, a multiply-add counted as two.
    """

    parameters: int
    width: int
    patches: int
    flops: int


class _NotPooled(SettingsError):
    """A model that does not end in one row of features a crop."""


def model_facts(settings: Backbone, crop_px: int) -> ModelFacts:
    """Ask a model what it makes of crops of this side.

    Raises: SettingsError for an unknown name (with near ones), or a model that cannot train so; says what it
        can.
    """
    check_name(settings.name)
    try:
        return _ask(settings, crop_px)
    except _NotPooled:
        raise  # no side and no drop would change that
    except SettingsError as error:
        remedy = _remedy(settings, crop_px)
        raise SettingsError(f"{error}; {remedy}" if remedy else str(error)) from error


def trains(settings: Backbone, crop_px: int) -> bool:
    """Whether a model can train on crops of this side; the name is one of timm's."""
    try:
        _ask(settings, crop_px)
    except SettingsError:
        return False
    return True


def published_side(name: str) -> int:
    """The side in pixels that a timm model's published weights were made for."""
    return timm.get_pretrained_cfg_value(name, "input_size")[1]


def _ask(settings: Backbone, crop_px: int) -> ModelFacts:
    """Raises: SettingsError that says what is wrong, but not what would do instead."""
    with torch.device("meta"):
        # The counter follows gradients where there are any, and stumbles over some models' own.
        model = create_model(settings, crop_px).train().requires_grad_(False)
        # Hooks first: they note what the pass below does.
        heard = _listen(model, settings.name)
        with FlopCounterMode(display=False) as counter:
            try:
                # One pass tells width, patches, operations, and whether the model takes this side at all.
                features = model(torch.zeros(CROPS, 3, crop_px, crop_px))
            except SettingsError:
                raise
            except Exception as error:  # each model has its own way to fail on a side
                raise SettingsError(
                    f"backbone {settings.name} cannot take crops of {crop_px} pixels ({own_words(error)})"
                ) from error
    # Methods need one row of features a crop: (CROPS, D).
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != CROPS:
        shape = list(features.shape[1:]) if isinstance(features, Tensor) else type(features).__name__
        raise _NotPooled(
            f"backbone {settings.name} gives {shape} for a crop, where one row of features is needed; "
            "backbone.options.global_pool says how tokens become one, where the model has it"
        )
    # A drop path that never ran would be a setting without effect.
    if not heard.branches and any(isinstance(module, KeyedDropPath) for module in model.modules()):
        raise SettingsError(f"backbone.drop_path: {settings.name} has no branch that could be left out")
    return ModelFacts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        width=features.shape[1],
        patches=heard.patches,
        # The counter has counted all crops of the pass.
        flops=counter.get_total_flops() // CROPS,
    )


@dataclass
class _Heard:
    """What a pass shows: the patches that the model cuts of a crop, how often a branch could be left out."""

    patches: int = 0
    branches: int = 0


def _listen(model: nn.Module, name: str) -> _Heard:
    """Fill the keyed modules for CROPS crops, and note what the next pass does."""
    heard = _Heard()

    def note_patches(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        # (crops, patches, D); what stays a map of four dimensions is not counted.
        if isinstance(output, Tensor) and output.dim() == 3:
            heard.patches = output.shape[1]

    def check_rows(module: KeyedDropPath, args: tuple[Tensor, ...]) -> None:
        # KeyedDropPath repeats each crop's factor over its rows, so those have to be together.
        if len(args[0]) % CROPS:
            raise SettingsError(f"backbone.drop_path: in {name} the rows of a crop are not together")
        heard.branches += 1

    def keep_patches(module: KeyedPatchDrop, args: tuple[Tensor, ...]) -> None:
        # Written here, for only now the number of patches is known that the order has to fit.
        heard.patches = args[0].shape[1] - module.prefix_tokens
        module.order = torch.zeros(CROPS, kept_patches(heard.patches, module.rate), dtype=torch.int64)

    patch_embed = getattr(model, "patch_embed", None)
    if isinstance(patch_embed, nn.Module):
        patch_embed.register_forward_hook(note_patches)
    for module in model.modules():
        if isinstance(module, KeyedDropPath):
            # As StochasticDraws.fill would write it, with nothing dropped.
            module.factor = torch.ones(CROPS)
            module.register_forward_pre_hook(check_rows)
        elif isinstance(module, KeyedPatchDrop):
            module.register_forward_pre_hook(keep_patches)
    return heard


def _remedy(settings: Backbone, crop_px: int) -> str:
    """The smallest change with which the model trains, found by trying; empty if none was found."""
    zero = {key: 0.0 for key in ("drop_path", "patch_drop") if getattr(settings, key)}
    changes = [{}, *({key: 0.0} for key in zero), *([zero] if len(zero) == 2 else [])]
    # First at this side: to switch a drop off may be enough.
    for change in changes[1:]:
        if trains(settings.model_copy(update=change), crop_px):
            return f"set {_named(change)}"
    # Then other sides, with as little changed beside as will do.
    for change in changes:
        changed = settings.model_copy(update=change)
        if sides := list(islice(_sides_that_train(changed, crop_px), 2)):
            also = f" with {_named(change)}" if change else ""
            return f"views.crop_px may be {' or '.join(map(str, sides))}{also}"
    return ""


def _named(change: dict[str, float]) -> str:
    return " and ".join(f"backbone.{key}=0" for key in change)


def _sides_that_train(settings: Backbone, crop_px: int) -> Iterator[int]:
    """Of each step the multiples below and above, nearest first; the published side last."""
    around = {side for step in STEPS[3:] for side in (crop_px // step * step, -(-crop_px // step) * step)}
    nearest = sorted(around - {0, crop_px}, key=lambda side: abs(side - crop_px))
    published = published_side(settings.name)
    for side in (*nearest, *({published} - {*nearest, crop_px})):
        if trains(settings, side):
            yield side


def side_step(settings: Backbone, near_px: int) -> int:
    """The smallest number of pixels of which a model takes any multiple; 0 if it seems to take one side only.

    Tried on the first three multiples from `near_px` on, not proven for the rest.
    """
    for step in STEPS:
        # The first multiple that is not below near_px.
        first = -(-near_px // step) * step
        if all(trains(settings, side) for side in (first, first + step, first + 2 * step)):
            return step
    return 0
