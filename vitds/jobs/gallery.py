"""The pictures of a run's page: crops, neighbours, confusions, where the network looks, the map.

They are made once, where the images are at hand, and kept in RUN/analysis/page.json with what they were made
from. The page is laid out from there, also where the images have moved since.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitds.augment.images import normalise
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.digits import NAME as DIGITS
from vitds.data.findings import TEXTS
from vitds.data.loader import eval_batches
from vitds.data.preview import boxed_original
from vitds.errors import DataError, ResourceError, RunError, VitdsError
from vitds.evaluate.answers import confusions
from vitds.evaluate.looks import looks
from vitds.evaluate.map import FEWEST, plane
from vitds.jobs.data_files import hold_out, training_files
from vitds.jobs.preview import first_step, stored_pixels
from vitds.jobs.scene import MOST_IMAGES, Scene, chosen_images, nearest_images, open_scene, spread
from vitds.report.pictures import data_uri, dimmed, sheet_uri
from vitds.runs.directory import Run, content_of_weights, known_inputs, write_atomic
from vitds.terminal import say

FORMAT = 2  # raised where the same facts come to mean other pictures
PICTURE_PX, THUMB_PX = 112, 48
CROPPED = 3  # images whose crops are shown
CONFUSIONS, CONFUSED = 6, 4  # pairs of classes, and pictures of each
NAMED = 5  # photographs that a finding names
Json = dict[str, Any]


Files = tuple[BetonFile, BetonFile | None]


def gallery(run: Run, files: Files | None = None) -> Json:
    """The pictures, from RUN/analysis/page.json where they were made of these weights and data; else made
    and kept.

    Each rank for itself: nothing is asked of others.

    Args:
        run: finished.
        files: training_files of its settings, where they are open; to open them all ranks would be needed.
    Raises: RunError if the images are not at hand and nothing was kept; what reading the run raises.
    """
    made_of = {
        "format": FORMAT,
        "weights": content_of_weights(str(run.path)),
        "inputs": known_inputs(run, run.settings),
    }
    path = run.path / "analysis" / "page.json"
    if (kept := _read(path)) is not None and kept.get("made_of") == made_of:
        return kept
    try:
        made = {"made_of": made_of, **_made(run, files or _files(run, run.settings))}
    except VitdsError as error:
        if not any(path.parent.glob("*.json")):
            raise RunError(
                f"{run.path} has no analysis, and none can be made: {error}. Call from the folder that the "
                "run was started in, or evaluate it first with `vitds eval`, which takes the images by --data"
            ) from error
        return {"missing": str(error)}
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(made, ensure_ascii=False, allow_nan=False).encode())
    except (OSError, ResourceError) as error:  # another's run, a full disk: the page itself may go elsewhere
        say(f"the pictures were not kept, the next page makes them again: {error}")
    return made


def _read(path: Path) -> Json | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _made(run: Run, files: Files) -> Json:
    settings, (train, test) = run.settings, files
    trained = hold_out(train, settings.eval.hold_out, settings.seed)[0] if settings.eval.hold_out else train
    made: Json = {
        "data": {"train": _facts(trained), "test": None if test is None else _facts(test)},
        "crops": _crops(trained, settings),
    }
    scene = open_scene(run, train, test)
    chosen = chosen_images(scene)
    nearest = nearest_images(scene, chosen)
    return made | {
        "query": "test" if test is not None else "training",
        "k": scene.k,
        "bank_images": scene.bank.images,
        "neighbours": _neighbours(scene, chosen, nearest),
        "confusions": _confusions(scene),
        "looks": _looks(scene, chosen, nearest),
        "map": _map(scene),
    }


def _files(run: Run, settings: Settings) -> Files:
    """The run's own images.

    Raises: DataError, SettingsError, RunError that say in one sentence why they are not at hand.
    """
    for name in (*settings.data.train_files, settings.data.test):
        if name not in (None, DIGITS) and not Path(name).exists():
            raise RunError(f"{name}, which the run names, is not there, seen from {Path.cwd()}")
    train, test = training_files(settings)
    known = known_inputs(run, settings)
    for key, file in (("data.train", train), ("data.test", test)):
        if file is not None and known.get(key, file.manifest.content_hash) != file.manifest.content_hash:
            raise RunError(f"{file.path} holds other images than those the run was started with")
    return train, test


def _facts(file: BetonFile) -> Json:
    """What the file's manifest says, in words for the page."""
    manifest = file.manifest
    return {
        "images": file.images,
        "file_images": manifest.images,
        "classes": len(manifest.classes),
        "unlabelled": manifest.unlabelled,
        "sources": [Path(source).name for source in manifest.sources],
        "split": manifest.split,
        "grouped": None if manifest.grouped is None else manifest.grouped.by,
        "groups": None if manifest.grouped is None else manifest.grouped.groups,
        "content": manifest.content_hash,
        "findings": [
            {
                "kind": kind,
                "text": TEXTS.get(kind, kind),
                "count": found.count,
                "names": [_without_folders(name, manifest.sources) for name in found.names[:NAMED]],
            }
            for kind, found in manifest.findings.items()
        ],
    }


def _described(file: BetonFile, position: int) -> str:
    return _without_folders(file.describe(position), file.manifest.sources)


def _without_folders(name: str, sources: tuple[str, ...]) -> str:
    """A photograph below its source: where that lies on this machine is no reader's business."""
    for source in map(Path, sources):
        if source.name:  # `.` is no folder's name, and stands within names
            # Where a path begins: `image 3 (SOURCE/a.png)`, `SOURCE/a.png ~ SOURCE/b.png`.
            begin = rf"(?<![^\s(]){re.escape(str(source))}(?=[/:)\s]|$)"
            name = re.sub(begin, lambda _, short=source.name: short, name)
    return name


def _crops(file: BetonFile, settings: Settings) -> list[Json]:
    groups = [number for number, group in enumerate(settings.views.groups) for _ in range(group.views)]
    names = [f"{group.name} {number}" for group in settings.views.groups for number in range(group.views)]
    return [
        {
            "name": image.name.replace("\n", ", class "),
            "original": data_uri(np.asarray(boxed_original(image, groups, PICTURE_PX)), PICTURE_PX),
            "views": [
                {
                    "name": name,
                    "cut": _crop_uri(cut),
                    "trained": _crop_uri(trained),
                    "targets": targets.replace("\n", "; "),
                }
                for name, cut, trained, targets in zip(
                    names, image.views, image.trained, image.targets, strict=True
                )
            ],
        }
        for image in first_step(file, settings, CROPPED)
    ]


def _crop_uri(crop: NDArray[np.uint8]) -> str:
    return data_uri(crop.transpose(1, 2, 0), PICTURE_PX)


def _image(file: BetonFile, position: int) -> Json:
    """What a page says of an image: its photograph, its class."""
    label = int(file.labels[position])
    return {
        "name": _described(file, position),
        "number": f"image {file.index[position]}",
        "class": file.manifest.classes[label] if label >= 0 else None,
    }


def _answered(scene: Scene, position: int) -> Json:
    """An image of the query, with the answer to it where there is one."""
    image = _image(scene.query, position)
    if scene.answers is None:
        return image | {"answer": None, "probability": None}
    probability_M = scene.answers.probability_M
    return image | {
        "answer": scene.query.manifest.classes[int(scene.answers.predicted_M[position])],
        "probability": None if probability_M is None else 100 * float(probability_M[position]),
    }


def _picture(file: BetonFile, position: int) -> str:
    return data_uri(_small(file, position, PICTURE_PX), PICTURE_PX)


def _small(file: BetonFile, position: int, side_px: int) -> NDArray[np.uint8]:
    """An image for a picture of this side. A large JPEG is decoded to a half, a quarter or an eighth of its
    side, which takes a tenth of the time.

    Raises: DataError if it cannot be decoded.
    """
    if not file.is_jpeg[position]:
        return stored_pixels(file, position)
    try:
        with Image.open(io.BytesIO(file.stored(position))) as picture:
            picture.draft("RGB", (side_px, side_px))
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise DataError(f"{file.path}: {file.describe(position)} cannot be decoded: {error}") from error


def _neighbours(scene: Scene, chosen: list[int], nearest: list[list[tuple[int, float]]]) -> list[Json]:
    return [
        _answered(scene, position)
        | {
            "picture": _picture(scene.query, position),
            "neighbours": [
                _image(scene.bank, other)
                | {"picture": _picture(scene.bank, other), "similarity": float(likeness)}
                for other, likeness in found
            ],
        }
        for position, found in zip(chosen, nearest, strict=True)
    ]


def _confusions(scene: Scene) -> list[Json]:
    """The pairs of classes that are confused most, with some of the images."""
    if scene.answers is None:
        return []
    classes, answers = scene.query.manifest.classes, scene.answers
    wrong = sorted((pair for pair in confusions(answers) if pair[0] != pair[1]), key=lambda pair: -pair[2])
    found = []
    for right, predicted, images in wrong[:CONFUSIONS]:
        places = np.flatnonzero((answers.label_M == right) & (answers.predicted_M == predicted))[:CONFUSED]
        shown = [
            _answered(scene, place) | {"picture": _picture(scene.query, place)} for place in places.tolist()
        ]
        of_class = int((answers.label_M == right).sum())
        found.append(
            {
                "right": classes[right],
                "predicted": classes[predicted],
                "images": images,
                "of": of_class,
                "pictures": shown,
            }
        )
    return found


def _looks(scene: Scene, chosen: list[int], nearest: list[list[tuple[int, float]]]) -> Json | None:
    """The chosen images as the network gets them, and what of them counts."""
    device = next(scene.model.backbone.parameters()).device
    # A batch's pixels are valid until the next one is asked for.
    cut = [
        crop.clone()
        for batch in eval_batches(
            scene.query, scene.model.settings.views, batch_images=1, indices=np.array(chosen)
        )
        for crop in batch.crops
    ]
    images = normalise(torch.stack(cut).to(device), scene.model.settings.views)

    def score(feature_MD: Float[Tensor, "M D"]) -> Float[Tensor, " M"]:
        """The answer's logit; without a class head the likeness to the nearest image."""
        if scene.head is not None and scene.answers is not None:
            answer_M = torch.from_numpy(scene.answers.predicted_M[chosen]).to(device)
            return scene.head.to(device)(feature_MD).gather(1, answer_M[:, None])[:, 0]
        first = [found[0][0] for found in nearest]
        return F.cosine_similarity(feature_MD, scene.bank_features[first].to(device))

    found = looks(scene.model.backbone, images, score)
    if found is None:
        return None
    kind, map_Mhw = found
    pixels = [crop.numpy().transpose(1, 2, 0) for crop in cut]
    return {
        "kind": kind,
        "of": "answer" if scene.head is not None and scene.answers is not None else "neighbour",
        "images": [
            _answered(scene, position)
            | {
                "picture": data_uri(seen, PICTURE_PX),
                "looked": data_uri(dimmed(seen, map_hw.float().cpu().numpy()), PICTURE_PX),
            }
            for position, seen, map_hw in zip(chosen, pixels, map_Mhw, strict=True)
        ],
    }


def _map(scene: Scene) -> Json | None:
    places = spread(scene.query.images, MOST_IMAGES)
    if len(places) < FEWEST:
        return None
    xy = plane(scene.query_features[torch.from_numpy(places)])
    sheet, columns = sheet_uri([_small(scene.query, place, THUMB_PX) for place in places.tolist()], THUMB_PX)
    classes = scene.query.manifest.classes
    answers = scene.answers
    return {
        "x": xy[:, 0].round(4).tolist(),
        "y": xy[:, 1].round(4).tolist(),
        "label": scene.query.labels[places].tolist(),
        "predicted": None if answers is None else answers.predicted_M[places].tolist(),
        "name": [_described(scene.query, place) for place in places.tolist()],
        "classes": list(classes),
        "sheet": sheet,
        "columns": columns,
        "cell_px": THUMB_PX,
        "of": scene.query.images,
    }
