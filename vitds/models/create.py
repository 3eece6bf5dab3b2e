"""timm's models with the options that a recipe gives, on whatever device torch makes tensors on."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from functools import cache

import timm
import torch
from torch import nn

from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.models.stochastic import replace_stochastic


def check_name(name: str) -> None:
    """Refuse a name that timm does not have.

    Raises: SettingsError (gives near names).
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        raise SettingsError(
            f"backbone.name {name!r} is no timm model; near names: {', '.join(near) or 'none'}"
        )


def create_model(settings: Backbone, crop_px: int) -> nn.Module:
    """A timm model without classifier, with keyed drop path and patch drop.

    Its weights come from torch's generator.

    Args:
        settings: the name is one of timm's; drop_path and patch_drop are passed on where they are not 0.
        crop_px: side of the crops, for models that are built for one side.
    Raises: SettingsError for an option that the model does not take, a side that its patches do not divide,
        or a patch drop that cannot be keyed.
    """
    # A copy: settings are frozen, and options are added.
    options = dict(settings.options)
    if takes_side(settings.name):
        options["img_size"] = crop_px
    # Only what is switched on: not every model takes these arguments.
    for key, value in (("drop_path_rate", settings.drop_path), ("patch_drop_rate", settings.patch_drop)):
        if value:
            options[key] = value
    try:
        # num_classes=0: no classifier, so forward ends with pooled features.
        backbone = timm.create_model(settings.name, pretrained=False, num_classes=0, **options)
    except Exception as error:  # each model has its own way to refuse an option or a side
        raise SettingsError(
            f"backbone {settings.name} with options {options} cannot be built: {own_words(error)}"
        ) from error
    # timm's convolution over patches leaves out what does not divide, without a word.
    embed = getattr(backbone, "patch_embed", None) or getattr(backbone, "stem", None)
    patch = getattr(embed, "patch_size", None)
    patch_px = patch[0] if isinstance(patch, tuple | list) else patch
    if patch_px and "img_size" in options and crop_px % patch_px:
        raise SettingsError(
            f"views.crop_px {crop_px} is not a multiple of {settings.name}'s patch of {patch_px} pixels"
        )
    replace_stochastic(backbone)
    return backbone


@cache
def takes_side(name: str) -> bool:
    """Whether a timm model is built for one side: its class, or a class above, has the argument `img_size`.

    timm's own mark `fixed_input_size` is missing on some of them.
    """
    with torch.device("meta"):
        # On the meta device: the class is wanted, and no memory.
        kind = type(timm.create_model(name, pretrained=False))
    # Down to nn.Module and without `object`: some classes hand their arguments on to the class above.
    return any("img_size" in inspect.signature(each.__init__).parameters for each in kind.__mro__[:-1])


def own_words(error: Exception) -> str:
    """The beginning of what an error of timm's or torch's says, or its class where it is a bare assert."""
    return textwrap.shorten(str(error), 120, placeholder=" ...") or type(error).__name__
