"""Whole views as a recipe draws them, from box to flip, against torchvision's float operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tests.kernels.pictures import FILTERS, cut, photographs
from tests.kernels.test_colour import TORCHVISION, gaussian_blur
from vitds.config.load import load_settings
from vitds.data.draws import draw_views
from vitds.kernels.views import COLOUR_OPS, POLICY_OPS

FILTER_NAMES = {number: name for name, (number, _) in FILTERS.items()}
POLICY = {  # those that torchvision has in float
    "invert": lambda x, value: F.invert(x),
    "sharpness": F.adjust_sharpness,
    "autocontrast": lambda x, value: F.autocontrast(x),
    "contrast": F.adjust_contrast,
    "colour": F.adjust_saturation,
    "brightness": F.adjust_brightness,
}


def float_view(picture: np.ndarray, spec: np.void, side_px: int) -> Tensor:
    """(S, S, 3) in levels, rounded nowhere on the way."""
    x = torch.tensor(picture).permute(2, 0, 1).float() / 255
    x = x[:, spec["top"] : spec["top"] + spec["height"], spec["left"] : spec["left"] + spec["width"]]
    x = F.resize(
        x, [side_px, side_px], F.InterpolationMode(FILTER_NAMES[int(spec["filter"])]), antialias=True
    ).clamp(0, 1)
    for index in spec["colour_order"]:
        if index:
            x = TORCHVISION[COLOUR_OPS[index]](x, float(spec[COLOUR_OPS[index]]))
    x = F.rgb_to_grayscale(x, 3) if spec["grey"] else x
    x = gaussian_blur(x, float(spec["blur_sigma"])) if spec["blur_sigma"] else x
    x = F.solarize(x, 128 / 255) if spec["solarise"] else x
    for op, value in zip(spec["policy_op"], spec["policy_value"], strict=True):
        if op:
            x = POLICY[POLICY_OPS[op]](x, float(value))
    return (F.horizontal_flip(x) if spec["flip"] else x).permute(1, 2, 0) * 255


@pytest.mark.parametrize("recipe", ["idmm_deit_tiny", "finetune_deit_tiny_224"])
def test_whole_views_of_a_recipe_are_torchvisions_in_float(recipe: str) -> None:
    views = load_settings(recipe=recipe, command=None, flags={}).views
    apart = []
    for number, picture in enumerate(photographs()):
        specs = draw_views(
            views, *np.array(picture.shape[:2])[:, None], seed=0, epoch=number, images=np.array([number])
        )[0]
        known = np.isin(specs["policy_op"], [0, *(POLICY_OPS.index(name) for name in POLICY)])
        specs["policy_op"] = np.where(known, specs["policy_op"], 0)
        for view, spec in zip(cut(picture, specs, views.crop_px), specs, strict=True):
            apart.append(np.abs(view - float_view(picture, spec, views.crop_px).numpy()).ravel())
    apart = np.concatenate(apart)
    assert apart.mean() <= 0.5 and np.percentile(apart, 99) <= 3
