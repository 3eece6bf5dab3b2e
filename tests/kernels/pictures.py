"""Real photographs for the kernels' tests, and the shortest way from a picture to one view of it."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from vitds.kernels.views import BICUBIC, BILINEAR, COLOUR_OPS, POLICY_OPS, RAW, VIEW_SPEC, cut_views

FLOWERS = Path(__file__).parents[3] / "shared/data/flowers102-256/train.tar"
FILTERS = {"bilinear": (BILINEAR, Image.Resampling.BILINEAR), "bicubic": (BICUBIC, Image.Resampling.BICUBIC)}


@functools.cache
def photographs() -> list[NDArray[np.uint8]]:
    """(H, W, 3) each: scikit-learn's two, and 24 of Oxford's flowers where they are present."""
    pictures = list(load_sample_images().images)
    if FLOWERS.exists():
        with tarfile.open(FLOWERS) as tar:
            files = [member for member in tar.getmembers() if member.isfile()][::85]
            pictures += [np.asarray(Image.open(io.BytesIO(tar.extractfile(file).read()))) for file in files]
    return pictures


def photograph_parts(side_px: int) -> list[NDArray[np.uint8]]:
    """A square from the middle of each photograph."""
    parts = []
    for picture in photographs():
        top, left = (picture.shape[0] - side_px) // 2, (picture.shape[1] - side_px) // 2
        parts.append(np.ascontiguousarray(picture[top : top + side_px, left : left + side_px]))
    return parts


def whole_spec(height: int, width: int, side_px: int, /, **fields: Any) -> np.ndarray:
    """(1,) of VIEW_SPEC: the whole picture resized to side_px and nothing else, unless `fields` say so."""
    spec = np.zeros(1, VIEW_SPEC)
    spec["height"], spec["width"] = height, width
    spec["resized_height"] = spec["resized_width"] = side_px
    for name in ("brightness", "contrast", "saturation"):
        spec[name] = 1
    for name, value in fields.items():
        spec[name] = value
    return spec


def cut(picture: NDArray[np.uint8], specs: np.ndarray, side_px: int) -> NDArray[np.uint8]:
    """(V, S, S, 3): the views of a raw picture."""
    views, status = cut_views([picture], [RAW], [picture.shape[:2]], specs[None], side_px)
    assert status.tolist() == [0]
    return np.ascontiguousarray(views[0].transpose(0, 2, 3, 1))


def colour(name: str, value: float) -> dict[str, Any]:
    """The spec's fields for one colour operation."""
    return {"colour_order": (COLOUR_OPS.index(name), 0, 0, 0), name: value}


def policy(name: str, value: float = 0.0, centre: tuple[float, float] = (0.5, 0.5)) -> dict[str, Any]:
    """The spec's fields for one policy operation."""
    return {"policy_op": (POLICY_OPS.index(name), 0), "policy_value": (value, 0), "cutout_centre": centre}


def assert_close(
    got: NDArray[np.uint8], wanted: NDArray[np.float64], *, mean: float, percentile_99: float, largest: float
) -> None:
    """Levels apart: on average, for all but a hundredth of the pixels, and at most."""
    apart = np.abs(got.astype(np.float64) - wanted)
    figures = (apart.mean(), np.percentile(apart, 99), apart.max())
    assert all(
        figure <= limit for figure, limit in zip(figures, (mean, percentile_99, largest), strict=True)
    ), figures
