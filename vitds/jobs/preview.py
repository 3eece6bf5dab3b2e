"""`vitds data preview`: what the network will see in its first step, made by the training's own parts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from vitds.batch import TrainBatch
from vitds.config.load import load_settings
from vitds.config.methods import readers
from vitds.config.recipes import DEFAULT_RECIPES, list_recipes, read_recipe
from vitds.config.tree import Batch, Settings, Views
from vitds.data.beton import BetonFile, labelled, open_beton
from vitds.data.digits import NAME as DIGITS
from vitds.data.draws import draw_views
from vitds.data.images import decode_stored
from vitds.data.loader import TrainLoader
from vitds.data.preview import ImagePreview, draw_preview
from vitds.errors import ResourceError, SettingsError, UsageError
from vitds.methods import method_class


def preview(
    file: str | Path,
    *,
    recipe: str | None = None,
    out: str | Path = "preview.png",
    images: int = 4,
    seed: int | None = None,
    set: Sequence[str] = (),
) -> Path:
    """Draw the first images of a run's first step: original, each view, and each view after mixing with its
    targets' weights.

    Args:
        file: a .beton file.
        recipe: a recipe's name or a YAML file; None is that of the embedded digits, and for them alone.
        out: the picture to write; the name's ending says its format.
        images: how many, from the first of the step; no more than the step or the file has.
        seed: in place of the recipe's.
        set: settings in place of the recipe's, `key=value`.
    Raises: DataError, SettingsError as open_beton and load_settings. SettingsError if no recipe is given for
        other images than the digits. UsageError for less than one image. ResourceError if the picture cannot
        be written.
    """
    if images < 1:
        raise UsageError(f"`images={images}`: must be at least 1.")
    data = open_beton(file)
    recipe = recipe or _default_recipe(data)
    settings = load_settings(recipe=recipe, command=None, assignments=tuple(set), flags={"seed": seed})
    if method_class(settings.method).needs_labels and (data.labels >= 0).any():
        data = labelled(data)
    drawn = first_step(data, settings, images)
    names = [f"{group.name} {number}" for group in settings.views.groups for number in range(group.views)]
    groups = [number for number, group in enumerate(settings.views.groups) for _ in range(group.views)]
    page, escaped = draw_preview(drawn, names, groups, f"{data.path.name}, {_title(settings, recipe)}")
    try:
        page.save(out)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"`out={out}`: the picture cannot be written ({error}). Give a path that ends in .png"
        ) from None
    print(f"{out}: {len(drawn)} images of {data.path.name}, {page.width} x {page.height} pixels")
    if escaped:
        print(
            f"{out}: no font of this machine has {' '.join(sorted(escaped))}; such letters stand there as "
            "code points (U+4E2D). Install a font, such as Debian's package fonts-noto-cjk for Chinese, "
            "Japanese and Korean"
        )
    return Path(out)


def first_step(data: BetonFile, settings: Settings, images: int) -> list[ImagePreview]:
    """The first images of a run's first step, as cut and as trained on.

    Args:
        images: how many; fewer if the step has fewer.
    """
    loader = TrainLoader(data, settings, rank=0, ranks=1, micro_images=_micro_images(settings.batch, images))
    with closing(loader.batches(0, 1)) as batches:
        batch = next(batches)
        mixed = method_class(settings.method).prepare(batch, settings, torch.device("cpu"))
        shown = min(images, int(batch.is_real.sum()))  # what pads a step stands behind its real images
        crops, index = batch.crops[:shown].numpy().copy(), batch.index[:shown].numpy()
    trained = _by_view(_pixels(mixed, settings.views), settings)
    targets = _by_view(np.array(_captions(mixed, settings, data)), settings)
    specs = draw_views(
        settings.views,
        data.heights[index],
        data.widths[index],
        seed=settings.seed,
        epoch=batch.epoch,
        images=index,
    )
    boxes = np.stack([specs[name] for name in ("top", "left", "height", "width")], axis=-1)
    return [
        ImagePreview(
            _name(data, image),
            stored_pixels(data, image),
            boxes[row],
            crops[row],
            trained[:, row],
            tuple(targets[:, row]),
        )
        for row, image in enumerate(index.tolist())
    ]


def _default_recipe(data: BetonFile) -> str:
    """The digits' recipe for the digits; its crops of 12 pixels say nothing of photographs."""
    if data.manifest.sources == (DIGITS,):
        return DEFAULT_RECIPES["pretrain"]
    fitting = [name for name, _ in list_recipes() if read_recipe(name).get("data", {}).get("train") != DIGITS]
    raise SettingsError(
        f"{data.path}: its recipe is missing. Say with `recipe` how it will be trained on: "
        f"{', '.join(fitting)}, or a YAML file of your own."
    )


def _micro_images(batch: Batch, images: int) -> int:
    """The fewest images of whole chunks that hold those to be shown and divide a step; all of the step if
    there is nothing less.
    """
    chunk = batch.chunk_images
    step = batch.global_images
    return next((size for size in range(chunk, step, chunk) if size >= images and step % size == 0), step)


def _title(settings: Settings, recipe: str) -> str:
    words = [f"recipe {recipe}: seed {settings.seed}, epoch 0, step 0"]
    if settings.method in readers("mix.kind"):
        words.append(f"mixing: {settings.mix.kind}")
    if smoothing := _smoothing(settings):
        words.append(
            f"label smoothing: the {smoothing:.2f} missing from each crop's weights lies evenly on all "
            "targets"
        )
    return "; ".join(words)


def _smoothing(settings: Settings) -> float:
    return settings.head.label_smoothing if settings.method in readers("head.label_smoothing") else 0.0


def _by_view(rows: np.ndarray, settings: Settings) -> np.ndarray:
    """(V, B, ...) of a batch's rows, which stand in the order (chunk, view, image)."""
    views = settings.views.count
    chunk = settings.batch.chunk_images
    return rows.reshape(-1, views, chunk, *rows.shape[1:]).swapaxes(0, 1).reshape(views, -1, *rows.shape[1:])


def _pixels(mixed: TrainBatch, views: Views) -> np.ndarray:
    """(M, 3, S, S) uint8: the normalised rows back as pixels."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (views.mean, views.std))
    return ((mixed.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _captions(mixed: TrainBatch, settings: Settings, file: BetonFile) -> list[str]:
    """For each row its targets and their weights; label smoothing takes its share of both alike."""
    needs_labels, kept = method_class(settings.method).needs_labels, 1 - _smoothing(settings)
    classes = file.manifest.classes
    if needs_labels and not classes:
        return ["no label"] * len(mixed.targets.a)
    captions = []
    for a, b, lam in zip(
        mixed.targets.a.tolist(), mixed.targets.b.tolist(), mixed.targets.lam.tolist(), strict=True
    ):
        first, second = (classes[row] if needs_labels else f"image {row}" for row in (a, b))
        # An image can be its own partner, one class that of both, and a box of CutMix empty.
        if a == b or lam == 1:
            captions.append(f"{kept:.2f} of {first}")
        else:
            captions.append(f"{kept * lam:.2f} of {first}\n{kept * (1 - lam):.2f} of {second}")
    return captions


def _name(file: BetonFile, image: int) -> str:
    label = int(file.labels[image])
    number = int(file.index[image])
    return f"image {number}\n{file.manifest.classes[label]}" if label >= 0 else f"image {number}"


def stored_pixels(file: BetonFile, image: int) -> np.ndarray:
    """(H, W, 3) uint8 of the image at a position of a file.

    Raises: DataError if it cannot be decoded.
    """
    height, width = int(file.heights[image]), int(file.widths[image])
    return decode_stored(file.stored(image), bool(file.is_jpeg[image]), height, width)
