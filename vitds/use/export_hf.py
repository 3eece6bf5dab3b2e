"""A run as a folder that Hugging Face's transformers loads: its network, with an image processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import BitImageProcessor
from transformers.utils import logging

from vitds.use.card import write_card
from vitds.use.export import difference, require_same, sameness, short_side, trial_crops
from vitds.use.hf_networks import INSTEAD, Counterpart, counterpart
from vitds.use.model import Model

ALLOWED = 1e-5  # of the largest number
BICUBIC = 3  # Pillow's number of it

USAGE = """\
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {kind}

model, processor = {kind}.from_pretrained("."), AutoImageProcessor.from_pretrained(".")
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
pixels = processor(photo, return_tensors="pt")
{result}
"""


def export_hf(model: Model, folder: Path) -> float:
    """Write config.json, weights, preprocessor_config.json and a model card.

    Args:
        model: of a run, on the CPU.
        folder: empty.
    Returns: the largest difference of its numbers from the run's.
    Raises: ShapeError for an architecture that transformers lacks or computes otherwise (says what works).
    """
    theirs = counterpart(model)
    with _quiet():
        _save(model, theirs, folder)
        _processor(model).save_pretrained(folder)
        found = _compare(model, theirs, folder)
    _card(model, theirs, folder, found)
    return found


def _save(model: Model, theirs: Counterpart, folder: Path) -> None:
    if model.head is None:
        backbone = theirs.backbone(theirs.config, **theirs.options)
        backbone.load_state_dict(theirs.weights)
        backbone.save_pretrained(folder)
        return
    bias = model.head.bias
    weights = {f"{theirs.attribute}.{name}": value for name, value in theirs.weights.items()} | {
        f"{theirs.linear}.weight": model.head.weight,
        f"{theirs.linear}.bias": torch.zeros(len(model.classes)) if bias is None else bias,
    }
    network = theirs.classifier(theirs.config)
    network.load_state_dict(weights)
    network.save_pretrained(folder)


def _card(model: Model, theirs: Counterpart, folder: Path, found: float) -> None:
    if model.head is None:
        kind, result = "AutoModel", f"features = model(**pixels).{theirs.expression}"
        note = theirs.note
    else:
        kind, result = "AutoModelForImageClassification", "probabilities = model(**pixels).logits.softmax(1)"
        note = "`model.config.id2label` has the classes in the order of the probabilities."
    same = (
        "transformers scales pictures by its own code, so pixels differ a little from those of vitds. On the "
        f"same pixels its numbers differ from the run's {sameness(found)}."
    )
    usage = USAGE.format(kind=kind, result=result)
    write_card(folder, model, library="transformers", usage=usage, notes=[note, same])


def _processor(model: Model) -> BitImageProcessor:
    """Scales to the short side and takes the central window, as evaluation does; the ViT's own has none."""
    views = model.settings.views
    side = views.crop_px
    return BitImageProcessor(
        size={"shortest_edge": short_side(side)},
        crop_size={"height": side, "width": side},
        resample=BICUBIC,
        image_mean=list(views.mean),
        image_std=list(views.std),
    )


def _compare(model: Model, theirs: Counterpart, folder: Path) -> float:
    """Load the folder as a person would, and compare."""
    crops = trial_crops(model)
    logits = None
    with torch.inference_mode():
        if model.head is None:
            backbone = theirs.backbone.from_pretrained(folder, **theirs.options).eval()
        else:
            classifier = theirs.classifier.from_pretrained(folder).eval()
            backbone, logits = getattr(classifier, theirs.attribute), classifier(crops).logits
        features = theirs.features(backbone(crops))
    found = difference(model, features, logits, crops)
    require_same(found, ALLOWED, f"transformers' {theirs.backbone.__name__}", INSTEAD)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and reports about a file that was written a moment ago."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
