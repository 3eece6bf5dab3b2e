"""The random numbers of each view, as a VIEW_SPEC table: a pure function of (seed, epoch, image, view).

Distributions are torchvision's (RandomResizedCrop, RandomHorizontalFlip, RandomApply(ColorJitter),
RandomGrayscale, RandomSolarize), a Gaussian blur with uniform sigma, and the policy of the paper's code (Cao,
Yu, Wu 2022, arXiv:2201.10728). Nothing here keeps state or touches a pixel.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped
from numpy.typing import ArrayLike, NDArray

from vitds import rng
from vitds.config.tree import Views
from vitds.kernels.views import BICUBIC, BILINEAR, POLICY_OPS, VIEW_SPEC
from vitds.rng import Purpose

# seed, epoch (B, 1) or (1, 1), image (B, 1), view (V,)
Key = tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

ASPECT = (3 / 4, 4 / 3)  # width : height of a crop, uniform in its logarithm
ATTEMPTS = 10  # boxes tried before the central one is taken
FILTERS = {"bilinear": BILINEAR, "bicubic": BICUBIC}
LONGEST = 64  # evaluation looks at the central part of a picture, at most so many times as long as wide

# The policy's magnitudes in the kernel's units, index 0..9; 0 is never drawn. A translation is 150 pixels of
# 331 at most, a change of a factor 0.9.
_NONE = np.zeros(10)
_SHEAR = np.linspace(0, 0.3, 10)
_TRANSLATE = np.linspace(0, 150 / 331, 10)
_CHANGE = np.linspace(0, 0.9, 10)
_MAGNITUDES = {
    "invert": _NONE,
    "cutout": np.rint(np.linspace(0, 20, 10)),
    "sharpness": _CHANGE,
    "autocontrast": _NONE,
    "posterize": np.rint(np.linspace(8, 4, 10)),
    "shear_x": _SHEAR,
    "shear_y": _SHEAR,
    "translate_x": _TRANSLATE,
    "translate_y": _TRANSLATE,
    "rotate": np.linspace(0, 30, 10),
    "equalize": _NONE,
    "contrast": _CHANGE,
    "colour": _CHANGE,
    "solarize": np.linspace(256, 0, 10),
    "brightness": _CHANGE,
}
_FACTORS = ("sharpness", "contrast", "colour", "brightness")  # 1 plus or minus the magnitude
_SIGNED = (*_FACTORS, "shear_x", "shear_y", "translate_x", "translate_y")  # rotation is positive only
# (15, 10): a row an operation without "none", a column a magnitude.
_MAGNITUDE = np.stack([_MAGNITUDES[name] for name in POLICY_OPS[1:]])
_IS_FACTOR = np.array([name in _FACTORS for name in POLICY_OPS[1:]])
_IS_SIGNED = np.array([name in _SIGNED for name in POLICY_OPS[1:]])


def draw_views(
    views: Views,
    heights: ArrayLike,
    widths: ArrayLike,
    *,
    seed: int,
    epoch: int | NDArray[np.int64],
    images: NDArray[np.int64],
) -> Shaped[np.ndarray, "B V"]:
    """The training views of some images.

    Seed, epoch, image and view are the key of every draw.

    Args:
        views: of the recipe.
        heights: (B,) of the stored pictures, in pixels.
        widths: (B,) likewise.
        seed: of the run.
        epoch: of all the images, or (B,) of each.
        images: (B,) positions in the file.
    Returns: (B, V) of VIEW_SPEC, views in group order.
    """
    # Parts of the key broadcast: (B, 1) images against (V,) views gives a draw for each of (B, V).
    image_B1 = np.asarray(images, np.int64)[:, None]
    view_V = np.arange(views.count)
    key = (seed, np.reshape(np.asarray(epoch, np.int64), (-1, 1)), image_B1, view_V)
    # A field that is not set below is 0: no colour operation, no blur, no policy.
    specs = np.zeros((len(image_B1), views.count), VIEW_SPEC)
    # Each view has the range of area of its group.
    scale_V2 = np.array([group.scale for group in views.groups for _ in range(group.views)])
    # Columns (2, B) -> two of (B, 1): one view each.
    specs["top"], specs["left"], specs["height"], specs["width"] = _draw_boxes(scale_V2, heights, widths, key)
    specs["resized_height"] = specs["resized_width"] = views.crop_px
    specs["filter"] = FILTERS[views.filter]
    specs["flip"] = _coins(Purpose.FLIP, views, "flip", key)
    _draw_colour(specs, views, key)
    specs["grey"] = _coins(Purpose.GREY, views, "grey", key)
    _draw_blur(specs, views, key)
    specs["solarise"] = _coins(Purpose.SOLARISE, views, "solarise", key)
    # Every kind of draw has a Purpose of its own, so switching one on or off leaves the others as they are.
    if views.policy == "randaugment":
        _draw_policy(specs, key)
    return specs


def centre_views(crop_px: int, heights: ArrayLike, widths: ArrayLike) -> Shaped[np.ndarray, "B V"]:
    """The evaluation view: the central S x S window of the resized picture.

    It is resized (bicubic) to a short side of S·256/224.

    Args:
        crop_px: S.
        heights: (B,) of the stored pictures, in pixels.
        widths: (B,) likewise.
    Returns: (B, 1) of VIEW_SPEC.
    """
    # (B, 2): height and width.
    size_B2 = np.stack([np.asarray(heights, np.int64), np.asarray(widths, np.int64)], axis=1)
    short_B1 = size_B2.min(axis=1, keepdims=True)
    # Of a picture that is longer than LONGEST times its width only the middle is resized.
    box_B2 = np.minimum(size_B2, LONGEST * short_B1)
    # The short side becomes S·256/224; the long one follows, rounded down as torchvision does.
    resized_B2 = round(crop_px * 256 / 224) * box_B2 // short_B1
    # The middle of what was resized, rounded as torchvision's CenterCrop does.
    window_B2 = np.rint((resized_B2 - crop_px) / 2)
    specs = np.zeros((len(size_B2), 1), VIEW_SPEC)
    specs["top"], specs["left"] = ((size_B2 - box_B2) // 2).T[..., None]
    specs["height"], specs["width"] = box_B2.T[..., None]
    specs["resized_height"], specs["resized_width"] = resized_B2.T[..., None]
    specs["out_top"], specs["out_left"] = window_B2.T[..., None]
    specs["filter"] = BICUBIC
    specs["brightness"] = specs["contrast"] = specs["saturation"] = 1
    return specs


def _uniforms(purpose: Purpose, key: Key, count: int) -> NDArray[np.float64]:
    """Numbers 0 .. count - 1 of a key's purpose, on a new last axis."""
    # (B, V, count)
    return rng.uniform(purpose, *(np.asarray(part)[..., None] for part in key), np.arange(count))


def _coins(purpose: Purpose, views: Views, name: str, key: Key) -> NDArray[np.bool_]:
    """(B, V) true with the probability `name` of each view's group."""
    chance_V = np.array(views.of_each_view(name))
    if not chance_V.any():  # a purpose's draws have keys of their own, so leaving them out changes no others
        return np.zeros(np.broadcast_shapes(*map(np.shape, key)), bool)
    return rng.uniform(purpose, *key) < chance_V


def _draw_boxes(
    scale_V2: NDArray[np.float64], heights: ArrayLike, widths: ArrayLike, key: Key
) -> tuple[NDArray[np.int64], ...]:
    """Top, left, height, width (B, V) of the crops, as torchvision's RandomResizedCrop.get_params.

    All attempts are drawn at once, and the first that fits its picture is taken.
    """
    H, W = np.asarray(heights, np.int64)[:, None], np.asarray(widths, np.int64)[:, None]
    # (B, V, 22): ten areas, ten aspects, and one corner for whichever attempt is taken.
    number = _uniforms(Purpose.CROP, key, 2 * ATTEMPTS + 2)
    part, aspect, corner = np.split(number, [ATTEMPTS, 2 * ATTEMPTS], axis=-1)
    # (V, 1) each, against the attempts on the last axis.
    low, high = scale_V2.T[..., None]
    area = (H * W)[..., None] * (low + (high - low) * part)
    # Uniform in the logarithm: 3:4 and 4:3 are equally likely.
    aspect = np.exp(np.log(ASPECT[0]) + np.log(ASPECT[1] / ASPECT[0]) * aspect)
    # area = width · height and aspect = width / height
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (0 < width) & (width <= W[..., None]) & (0 < height) & (height <= H[..., None])
    # argmax of booleans is the first true one.
    first, any_fits = fits.argmax(axis=-1)[..., None], fits.any(axis=-1)
    # None fits: the largest central box of an allowed aspect.
    widest = np.minimum(W, np.rint(H * ASPECT[1]).astype(np.int64))
    highest = np.minimum(H, np.rint(W / ASPECT[0]).astype(np.int64))
    width = np.where(any_fits, np.take_along_axis(width, first, -1)[..., 0], widest)
    height = np.where(any_fits, np.take_along_axis(height, first, -1)[..., 0], highest)
    # Any corner with which the box lies inside; + 1, for the last one counts too.
    top = np.where(any_fits, (corner[..., 0] * (H - height + 1)).astype(np.int64), (H - height) // 2)
    left = np.where(any_fits, (corner[..., 1] * (W - width + 1)).astype(np.int64), (W - width) // 2)
    return top, left, height, width


def _draw_colour(specs: Shaped[np.ndarray, "B V"], views: Views, key: Key) -> None:
    """Factors and order of the colour jitter.

    An operation without strength has order 0, and so has each of a view whose coin says no.
    """
    chance_V1 = np.array(views.of_each_view("colour"))[:, None]
    strength_4 = np.array([views.brightness, views.contrast, views.saturation, views.hue])
    if not (chance_V1.any() and strength_4.any()):
        specs["brightness"] = specs["contrast"] = specs["saturation"] = 1
        return
    number = _uniforms(Purpose.COLOUR, key, 9)  # the coin, four for the order, four for the strengths
    # The order of four random numbers is a random order of four operations.
    order = number[..., 1:5].argsort(axis=-1)
    # From [0, 1) to [-strength, strength)
    change = strength_4 * (2 * number[..., 5:9] - 1)
    # (B, V, 4) in the drawn order: the view's coin, and each operation's strength.
    is_applied = (number[..., :1] < chance_V1) & (strength_4 > 0)[order]
    # + 1: the kernel's 0 is "none".
    specs["colour_order"] = np.where(is_applied, order + 1, 0)
    specs["brightness"], specs["contrast"], specs["saturation"] = np.moveaxis(1 + change[..., :3], -1, 0)
    specs["hue"] = change[..., 3]


def _draw_blur(specs: Shaped[np.ndarray, "B V"], views: Views, key: Key) -> None:
    """Sigma of the blur, uniform in its range; 0 where a view's coin says no."""
    chance_V = np.array(views.of_each_view("blur"))
    if not chance_V.any():
        return
    # (B, V, 2) -> two of (B, V)
    coin, place = np.moveaxis(_uniforms(Purpose.BLUR, key, 2), -1, 0)
    low, high = views.blur_sigma
    specs["blur_sigma"] = np.where(coin < chance_V, low + (high - low) * place, 0)


def _draw_policy(specs: Shaped[np.ndarray, "B V"], key: Key) -> None:
    """Two of 135 (operation, magnitude) pairs, each applied with probability 1/2.

    Two cutouts in one view share their centre.
    """
    number = _uniforms(Purpose.POLICY, key, 8)  # two pairs, two coins, two signs, the cutout's centre
    # 15 operations times 9 magnitudes.
    pair = (135 * number[..., 0:2]).astype(np.int64)
    operation, magnitude = pair // 9, pair % 9 + 1
    value = _MAGNITUDE[operation, magnitude]
    # Half of the signed ones change sign. A factor is 1 plus that, so 0.1 to 1.9.
    value = np.where(_IS_SIGNED[operation] & (number[..., 4:6] < 0.5), -value, value) + _IS_FACTOR[operation]
    specs["policy_op"] = np.where(number[..., 2:4] < 0.5, operation + 1, 0)
    specs["policy_value"] = value
    specs["cutout_centre"] = number[..., 6:8]
