"""Small .beton files of real photographs (scikit-learn's two), and what a loader must deliver from them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from vitds.config.tree import Batch, Data, Mix, Settings, ViewGroup, Views
from vitds.data.beton import BetonFile, open_beton
from vitds.data.draws import draw_views
from vitds.data.manifest import MANIFEST_VERSION, Manifest
from vitds.data.writer import BetonWriter
from vitds.kernels.views import JPEG, RAW, cut_views

PHOTOGRAPHS = load_sample_images().images
SIZES = (
    (64, 96),
    (120, 80),
    (33, 47),
    (97, 61),
    (50, 50),
    (20, 150),
    (71, 53),
    (80, 120),
    (41, 43),
    (101, 37),
)
VIEWS = Views(
    crop_px=32,
    groups=(
        ViewGroup(name="large", views=2, scale=(0.14, 1.0)),
        ViewGroup(name="small", views=1, scale=(0.05, 0.4)),
    ),
    colour=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grey=0.2,
    blur=0.5,
)


def picture(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """A part (height, width, 3) of one of the photographs; each number another."""
    photograph = PHOTOGRAPHS[number % 2]
    top, left = number * 37 % (photograph.shape[0] - 160), number * 61 % (photograph.shape[1] - 160)
    part = Image.fromarray(photograph[top : top + 160, left : left + 160]).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.asarray(part)


def write_file(
    path: Path, *, images: int = 10, storage: str = "jpg", sizes: Sequence[tuple[int, int]] = SIZES
) -> BetonFile:
    """A .beton of `images` pictures of the given sizes in turn, with labels 0, 1, 2 in turn."""
    shapes = [sizes[number % len(sizes)] for number in range(images)]
    with BetonWriter(path, images) as writer:
        for number, (height, width) in enumerate(shapes):
            pixels = picture(number, height, width)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "jpeg", quality=90)
            stored = data.getvalue() if storage == "jpg" else pixels.tobytes()
            writer.add(stored, is_jpeg=storage == "jpg", height=height, width=width, label=number % 3)
        manifest = Manifest(
            version=MANIFEST_VERSION,
            images=images,
            file_bytes=writer.finish(bytes(32)),
            classes=("a", "b", "c"),
            storage=storage,
            side_px=None,
            quality=90,
            width_px=(min(width for _, width in shapes), max(width for _, width in shapes)),
            height_px=(min(height for height, _ in shapes), max(height for height, _ in shapes)),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            content_hash="",
            sources=("scikit-learn",),
            split=None,
            findings={},
        )
        writer.publish(manifest)
    return open_beton(path)


def spoil(file: BetonFile, image: int, part: str = "middle") -> None:
    """Overwrite a part of an image's JPEG data, as a bad disk would.

    Args:
        part: the head, or the middle of what begins as a sound JPEG of its size.
    """
    start, size = int(file.offsets[image]), int(file.sizes[image])
    with file.path.open("r+b") as stream:
        stream.seek(start if part == "head" else start + size // 2)
        stream.write(b"\xff\xd9" * (size // 4))


def settings_for(
    *, views: Views = VIEWS, images_a_step: int = 4, chunk: int = 2, seed: int = 5, **data: object
) -> Settings:
    """A run's settings with small batches, unmixed, as the loader gives them; `data` are keys of
    settings.data.
    """
    return Settings(
        seed=seed,
        views=views,
        mix=Mix(kind="none"),
        batch=Batch(global_images=images_a_step, chunk_images=chunk),
        data=Data.model_validate(data),
    )


def expected_views(file: BetonFile, settings: Settings, image: int, epoch: int) -> NDArray[np.uint8]:
    """(V, 3, S, S): the views of one image of one epoch, cut one at a time from the file's bytes."""
    raw = file.path.read_bytes()[int(file.offsets[image]) : int(file.offsets[image] + file.sizes[image])]
    size = (int(file.heights[image]), int(file.widths[image]))
    spec = draw_views(
        settings.views, [size[0]], [size[1]], seed=settings.seed, epoch=epoch, images=np.array([image])
    )
    crops, status = cut_views(
        [raw], [JPEG if file.is_jpeg[image] else RAW], [size], spec, settings.views.crop_px
    )
    assert status.tolist() == [0]
    return crops[0]
