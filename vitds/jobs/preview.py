"""`vitds data preview F.beton --recipe R --out P.png`: what the network will see in its first step, made by the training's own parts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from vitds.batch import TrainBatch
from vitds.config.load import load_settings
from vitds.config.tree import Settings, Views
from vitds.data.beton import BetonFile, open_beton
from vitds.data.draws import draw_views
from vitds.data.images import decode_stored
from vitds.data.loader import TrainLoader
from vitds.data.preview import ImagePreview, draw_preview
from vitds.errors import ResourceError
from vitds.methods import method_class

IMAGES = 4  # on the page


def preview(file: str | Path, *, recipe: str, out: str | Path = "preview.png") -> Path:
    """Draw the first images of a run's first step: original, each view, and each view after mixing with its targets' weights.

    Raises: DataError, SettingsError as open_beton and load_settings. ResourceError if the picture cannot be written.
    """
    data = open_beton(file)
    settings = load_settings(recipe=recipe, command=None, flags={})
    loader = TrainLoader(data, settings, rank=0, ranks=1, micro_images=settings.batch.chunk_images)
    with closing(loader.batches(0, 1)) as batches:
        batch = next(batches)
        mixed = method_class(settings.method).prepare(batch, settings, torch.device("cpu"))
        crops, index = batch.crops[:IMAGES].numpy().copy(), batch.index[:IMAGES].numpy()
    trained, targets = (
        _pixels(mixed, settings.views, len(batch.index)),
        _captions(mixed, settings, data, len(batch.index)),
    )
    plans = draw_views(
        settings.views,
        data.heights[index],
        data.widths[index],
        seed=settings.seed,
        epoch=batch.epoch,
        images=index,
    )
    boxes = np.stack([plans[name] for name in ("top", "left", "height", "width")], axis=-1)
    images = [
        ImagePreview(
            _name(data, image),
            _original(data, image),
            boxes[row],
            crops[row],
            trained[:, row],
            tuple(view[row] for view in targets),
        )
        for row, image in enumerate(index.tolist())
    ]
    names = [(group.name, number) for group in settings.views.groups for number in range(group.views)]
    groups = [number for number, group in enumerate(settings.views.groups) for _ in range(group.views)]
    title = f"{data.path.name}, recipe {recipe}: seed {settings.seed}, epoch {batch.epoch}, step {batch.step}; mixing: {settings.mix.kind}"
    page = draw_preview(images, [f"{name} {number}" for name, number in names], groups, title)
    try:
        page.save(out)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"--out {out}: the picture cannot be written ({error}). Give a path that ends in .png"
        ) from None
    print(f"{out}: {len(images)} images of {data.path.name}, {page.width} x {page.height} pixels")
    return Path(out)


def _pixels(mixed: TrainBatch, views: Views, images: int) -> np.ndarray:
    """(V, B, 3, S, S) uint8: the normalised rows of one chunk back as pixels."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (views.mean, views.std))
    pixels = ((mixed.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.unflatten(0, (views.count, images)).numpy()


def _captions(mixed: TrainBatch, settings: Settings, file: BetonFile, images: int) -> list[list[str]]:
    """[view][image]: the targets and their weights. Label smoothing takes its share of both alike."""
    kept = 1 - settings.head.label_smoothing

    def target(number: int) -> str:
        return f"image {number}" if not method_class(settings.method).needs_labels or number < 0 else file.manifest.classes[number]

    rows = zip(mixed.targets.a.tolist(), mixed.targets.b.tolist(), mixed.targets.lam.tolist(), strict=True)
    words = [f"{kept * lam:.2f} of {target(a)}\n{kept * (1 - lam):.2f} of {target(b)}" for a, b, lam in rows]
    return [words[start : start + images] for start in range(0, len(words), images)]


def _name(file: BetonFile, image: int) -> str:
    label = int(file.labels[image])
    return f"image {image}\n{file.manifest.classes[label]}" if label >= 0 else f"image {image}"


def _original(file: BetonFile, image: int) -> np.ndarray:
    with file.path.open("rb") as stream:
        stream.seek(int(file.offsets[image]))
        data = stream.read(int(file.sizes[image]))
    return decode_stored(data, bool(file.is_jpeg[image]), int(file.heights[image]), int(file.widths[image]))
