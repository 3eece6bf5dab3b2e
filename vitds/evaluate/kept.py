"""Features are computed once and kept in the run: RUN/analysis/features-<12 hex digits>.safetensors.

The digits are of the hash of all facts that the features depend on. The file holds the facts too, and the
hash of its own rows, so that what is taken from it is what was computed. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitds import dist
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.errors import ResourceError
from vitds.evaluate.features import Features
from vitds.runs.directory import write_atomic

FORMAT = 1  # raised where the same facts come to mean other features: another central crop, say
COLUMNS = ("rows_MD", "label_M", "index_M")


def feature_facts(settings: Settings, weights: str, file: BetonFile) -> dict[str, Any]:
    """All that the features of a file's central crops depend on.

    Args:
        settings: of the run.
        weights: their content hash.
        file: all of a file's images, or all that have labels.
    """
    return {
        "format": FORMAT,
        "weights": weights,
        "data": file.manifest.content_hash,
        "images": file.images,
        # The same weights pool their tokens in one way or another.
        "backbone": [settings.backbone.name, settings.backbone.options],
        "views": [settings.views.crop_px, settings.views.mean, settings.views.std],
        "precision": settings.engine.precision,
    }


def kept_features(
    folder: Path | None, facts: dict[str, Any], compute: Callable[[], Features], notes: list[str]
) -> Features:
    """Features from the folder if they are there, else computed and put there; called by every rank.

    Args:
        folder: RUN/analysis; None keeps nothing.
        facts: see `feature_facts`.
        compute: the same features on every rank.
        notes: gets a line for the person if they could not be kept.
    """
    if folder is None:
        return compute()
    found = dist.on_main(find_features, folder, facts)
    if found is None:
        found = compute()
        notes += dist.on_main(_write, *_place(folder, facts), found)
    return found


def _place(folder: Path, facts: dict[str, Any]) -> tuple[Path, str]:
    """The file of the features, and the facts as it holds them."""
    text = json.dumps(facts, sort_keys=True)
    return folder / f"features-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors", text


def find_features(folder: Path, facts: dict[str, Any]) -> Features | None:
    """The kept features, read by this rank alone; None where they are not there, or not as written."""
    path, text = _place(folder, facts)
    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("about")
            # Copied to where torch aligns memory: elsewhere a product may end in other last bits.
            columns = [file.get_tensor(name).clone() for name in COLUMNS]
    except (OSError, SafetensorError):
        return None
    return Features(*columns) if about == _about(text, columns) else None


def _write(path: Path, facts: str, features: Features) -> list[str]:
    """Keep the features; returns why not, if so."""
    columns = [getattr(features, name).contiguous() for name in COLUMNS]
    try:
        path.parent.mkdir(exist_ok=True)
        about = {"about": _about(facts, columns)}  # one entry: several come in any order
        write_atomic(path, save(dict(zip(COLUMNS, columns, strict=True)), about))
    except (OSError, ResourceError) as error:
        return [f"the features were not kept, the next evaluation computes them again: {error}"]
    return []


def _about(facts: str, columns: list[Tensor]) -> str:
    """What the file says of itself: the facts, and the hash of its content."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column.numpy().data)
    return f"{digest.hexdigest()} {facts}"
