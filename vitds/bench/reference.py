"""What a person would write without vitds: a whole recipe by torchvision and PIL, one transform a view."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from vitds.config.tree import Views
from vitds.data.beton import BetonFile

FILTERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
GREY_FILL, CUTOUT_FILL = (128, 128, 128), (125, 122, 113)


def open_picture(file: BetonFile, mapped: NDArray[np.uint8], image: int) -> Image.Image:
    """An image of the file as PIL sees it; `mapped` is the file's map."""
    raw = mapped[file.offsets[image] : file.offsets[image] + file.sizes[image]].tobytes()
    if file.is_jpeg[image]:
        return Image.open(io.BytesIO(raw)).convert("RGB")
    return Image.frombytes("RGB", (int(file.widths[image]), int(file.heights[image])), raw)


class GaussianBlur:
    """PIL's blur with a uniform radius, as SimCLR's code has it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


class RandAugment:
    """The paper's code's: two of 135 (operation, magnitude 1..9) pairs, each applied with probability 1/2."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        for _ in range(2):
            operation, magnitude = random.choice(list(POLICY.values())), random.randint(1, 9)
            if random.random() < 0.5:
                picture = operation(picture, magnitude / 9)
        return picture


def _sign() -> int:
    return random.choice((-1, 1))


def _affine(
    picture: Image.Image, *matrix: float | int, resample: int = Image.Resampling.NEAREST
) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample, fillcolor=GREY_FILL)


def _cutout(picture: Image.Image, side_px: int) -> Image.Image:
    picture, (width, height) = picture.copy(), picture.size
    left, top = random.randrange(width) - side_px // 2, random.randrange(height) - side_px // 2
    picture.paste(
        CUTOUT_FILL, (max(left, 0), max(top, 0), min(left + side_px, width), min(top + side_px, height))
    )
    return picture


POLICY: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "invert": lambda picture, m: ImageOps.invert(picture),
    "cutout": lambda picture, m: _cutout(picture, round(20 * m)),
    "sharpness": lambda picture, m: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * m * _sign()),
    "autocontrast": lambda picture, m: ImageOps.autocontrast(picture),
    "posterize": lambda picture, m: ImageOps.posterize(picture, round(8 - 4 * m)),
    "shear_x": lambda picture, m: _affine(
        picture, 1, 0.3 * m * _sign(), 0, 0, 1, 0, resample=Image.Resampling.BICUBIC
    ),
    "shear_y": lambda picture, m: _affine(
        picture, 1, 0, 0, 0.3 * m * _sign(), 1, 0, resample=Image.Resampling.BICUBIC
    ),
    "translate_x": lambda picture, m: _affine(
        picture, 1, 0, picture.width * 150 / 331 * m * _sign(), 0, 1, 0
    ),
    "translate_y": lambda picture, m: _affine(
        picture, 1, 0, 0, 0, 1, picture.height * 150 / 331 * m * _sign()
    ),
    "rotate": lambda picture, m: picture.rotate(30 * m, fillcolor=GREY_FILL),
    "equalize": lambda picture, m: ImageOps.equalize(picture),
    "contrast": lambda picture, m: ImageEnhance.Contrast(picture).enhance(1 + 0.9 * m * _sign()),
    "colour": lambda picture, m: ImageEnhance.Color(picture).enhance(1 + 0.9 * m * _sign()),
    "solarize": lambda picture, m: ImageOps.solarize(picture, round(256 * (1 - m))),
    "brightness": lambda picture, m: ImageEnhance.Brightness(picture).enhance(1 + 0.9 * m * _sign()),
}


def view_transforms(views: Views) -> list[Callable[[Image.Image], Tensor]]:
    """The transform of each of the V views: picture -> float32 (3, S, S), normalised."""
    scales = [group.scale for group in views.groups for _ in range(group.views)]
    names = ("flip", "colour", "grey", "blur", "solarise")
    chances = [
        dict(zip(names, row, strict=True)) for row in zip(*map(views.of_each_view, names), strict=True)
    ]
    return [_transform(views, scale, **chance) for scale, chance in zip(scales, chances, strict=True)]


def _transform(
    views: Views,
    scale: tuple[float, float],
    *,
    flip: float,
    colour: float,
    grey: float,
    blur: float,
    solarise: float,
) -> Callable[[Image.Image], Tensor]:
    crop = T.RandomResizedCrop(views.crop_px, scale=scale, interpolation=FILTERS[views.filter])
    jitter = T.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    steps: list[Callable] = [crop]
    steps += [T.RandomApply([jitter], colour)] if colour else []
    steps += [T.RandomGrayscale(grey)] if grey else []
    steps += [T.RandomApply([GaussianBlur(views.blur_sigma)], blur)] if blur else []
    steps += [T.RandomSolarize(128, solarise)] if solarise else []
    steps += [RandAugment()] if views.policy == "randaugment" else []
    steps += [T.RandomHorizontalFlip(flip)] if flip else []
    return T.Compose([*steps, T.ToTensor(), T.Normalize(views.mean, views.std)])


class ReferenceSet(torch.utils.data.Dataset):
    """All views (V, 3, S, S) float32 of an image: one decode, V transforms."""

    def __init__(self, file: BetonFile, views: Views) -> None:
        self.file, self.mapped = file, np.memmap(file.path, np.uint8, "r")
        self.transforms = view_transforms(views)

    def __len__(self) -> int:
        return self.file.images

    def __getitem__(self, image: int) -> Tensor:
        picture = open_picture(self.file, self.mapped, image)
        return torch.stack([transform(picture) for transform in self.transforms])
