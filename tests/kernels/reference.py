"""What each pixel kernel means, in NumPy floats, as plainly as may be.

Pictures are (H, W, 3), levels 0 to 255, results unrounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float64]

GREY_SHARES = np.array([0.2989, 0.587, 0.114])


def rounded(picture: Picture) -> Picture:
    """To whole levels between 0 and 255."""
    return np.clip(np.floor(picture + 0.5), 0, 255)


def filter_weight(name: str, x: float) -> float:
    """The triangle, or the cubic with a = -1/2, at x."""
    x = abs(x)
    if name == "bilinear":
        return max(0.0, 1 - x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_matrix(length: int, resized: int, name: str) -> NDArray[np.float64]:
    """(resized, length): PIL's antialiased resize along one direction."""
    scale = length / resized
    stretch = max(scale, 1.0)
    matrix = np.array(
        [
            [filter_weight(name, (x + 0.5 - (i + 0.5) * scale) / stretch) for x in range(length)]
            for i in range(resized)
        ]
    )
    return matrix / matrix.sum(1, keepdims=True)


def resize(picture: Picture, height: int, width: int, name: str) -> Picture:
    """Whole levels between the directions, as in the kernels: bilinear goes down first, bicubic across."""
    down, across = resize_matrix(picture.shape[0], height, name), resize_matrix(picture.shape[1], width, name)
    if name == "bilinear":
        return np.einsum("xw,ywc->yxc", across, rounded(np.einsum("yh,hwc->ywc", down, picture)))
    return np.einsum("yh,hxc->yxc", down, rounded(np.einsum("xw,hwc->hxc", across, picture)))


def grey_of(picture: Picture) -> Picture:
    """(H, W, 1)"""
    return (picture @ GREY_SHARES)[..., None]


def brightness(picture: Picture, factor: float) -> Picture:
    return np.clip(picture * factor, 0, 255)


def contrast(picture: Picture, factor: float) -> Picture:
    return np.clip(picture * factor + (1 - factor) * grey_of(picture).mean(), 0, 255)


def saturation(picture: Picture, factor: float) -> Picture:
    return np.clip(picture * factor + (1 - factor) * grey_of(picture), 0, 255)


def hue(picture: Picture, turns: float) -> Picture:
    """By way of hue, saturation and value, with the division that the kernel avoids."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    top, chroma = picture.max(-1), np.ptp(picture, -1)
    safe = np.where(chroma == 0, 1, chroma)
    sixths = np.where(
        top == red,
        (green - blue) / safe,
        np.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = np.where(chroma == 0, 0, sixths) + 6 * turns
    channels = [(n + sixths) % 6 for n in (5, 3, 1)]
    return np.stack([top - chroma * np.clip(np.minimum(k, 4 - k), 0, 1) for k in channels], -1)


def greyscale(picture: Picture) -> Picture:
    return np.repeat(grey_of(picture), 3, -1)


def blur(picture: Picture, sigma: float) -> Picture:
    """Gaussian of radius ceil(3 sigma), mirrored at the edge pixels."""
    radius = int(np.ceil(3 * np.float32(sigma)))
    bell = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    bell /= bell.sum()
    padded = np.pad(picture, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    down = sum(weight * padded[k : k + len(picture)] for k, weight in enumerate(bell))
    return sum(weight * down[:, k : k + picture.shape[1]] for k, weight in enumerate(bell))


def invert(picture: Picture) -> Picture:
    return 255 - picture


def cutout(picture: Picture, square: int, centre: tuple[float, float]) -> Picture:
    out, side = picture.copy(), len(picture)
    top, left = (int(np.float32(fraction) * side) - square // 2 for fraction in centre)
    out[max(top, 0) : max(top + square, 0), max(left, 0) : max(left + square, 0)] = (125, 122, 113)
    return out


def sharpness(picture: Picture, factor: float) -> Picture:
    smooth = picture.copy()
    height, width = picture.shape[:2]
    weights = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    if height > 2 and width > 2:
        parts = [
            weights[y, x] * picture[y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3)
        ]
        smooth[1:-1, 1:-1] = rounded(sum(parts))
    return np.clip(picture * factor + smooth * (1 - factor), 0, 255)


def autocontrast(picture: Picture) -> Picture:
    low, high = picture.min((0, 1)), picture.max((0, 1))
    return np.where(high > low, (picture - low) * 255 / np.maximum(high - low, 1), picture)


def equalize(picture: Picture) -> Picture:
    out = picture.copy()
    for channel in range(3):
        counts = np.bincount(picture[..., channel].astype(int).ravel(), minlength=256)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        if step:
            ranks = step // 2 + np.concatenate([[0], np.cumsum(counts)[:-1]])
            out[..., channel] = np.clip(ranks // step, 0, 255)[picture[..., channel].astype(int)]
    return out


def posterize(picture: Picture, bits: int) -> Picture:
    return np.floor(picture / 2 ** (8 - bits)) * 2 ** (8 - bits)


def solarize(picture: Picture, threshold: float) -> Picture:
    return np.where(picture < threshold, picture, 255 - picture)


def cubic_at(line: NDArray[np.float64], at: float) -> NDArray[np.float64]:
    """(W, 3) at a place between its pixels, by PIL's cubic (a = -1), the ends repeated."""
    place = int(np.floor(at))
    d = at - place
    weights = (2 * d * d - d - d**3, 1 - 2 * d * d + d**3, d + d * d - d**3, d**3 - d * d)
    return sum(weight * line[np.clip(place - 1 + k, 0, len(line) - 1)] for k, weight in enumerate(weights))


def shear_x(picture: Picture, slope: float) -> Picture:
    """out[y, x] = picture at (y, x + slope * (y + 1/2)); 128 from outside."""
    out, width = np.full(picture.shape, 128.0), picture.shape[1]
    for y in range(len(picture)):
        shift = float(np.float32(slope)) * (y + 0.5)
        for x in range(width):
            if 0 <= x + 0.5 + shift < width:
                out[y, x] = np.clip(cubic_at(picture[y], x + shift), 0, 255)
    return out


def shear_y(picture: Picture, slope: float) -> Picture:
    return shear_x(picture.swapaxes(0, 1), slope).swapaxes(0, 1)


def translate_x(picture: Picture, fraction: float) -> Picture:
    """out[y, x] = picture[y, x + the nearest whole number of fraction * width]; 128 from outside."""
    out, width = np.full(picture.shape, 128.0), picture.shape[1]
    shift = int(np.floor(float(np.float32(fraction)) * width + 0.5))
    for x in range(width):
        if 0 <= x + shift < width:
            out[:, x] = picture[:, x + shift]
    return out


def translate_y(picture: Picture, fraction: float) -> Picture:
    return translate_x(picture.swapaxes(0, 1), fraction).swapaxes(0, 1)


def rotate(picture: Picture, degrees: float) -> Picture:
    """Counter-clockwise about the centre, nearest pixel; 128 from outside.

    Places are whole 65536ths of a pixel, as in PIL.
    """
    side = len(picture)
    angle = np.deg2rad(float(np.float32(degrees)))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # (y, x) to (y, x)
    first = np.floor((side / 2 - turn @ np.full(2, side / 2 - 0.5)) * 65536 + 0.5)
    steps = np.floor(turn * 65536 + 0.5)
    out = np.full(picture.shape, 128.0)
    for y in range(side):
        for x in range(side):
            from_y, from_x = ((first + steps @ (y, x)) // 65536).astype(int)
            if 0 <= from_y < side and 0 <= from_x < side:
                out[y, x] = picture[from_y, from_x]
    return out
