"""A run as a folder that timm loads: `timm.create_model("local-dir:DIR", pretrained=True)`."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from vitds.errors import ShapeError
from vitds.models.create import takes_side
from vitds.use.card import write_card
from vitds.use.export import crop_share, difference, require_same, sameness, trial_crops
from vitds.use.model import Model

ALLOWED = 1e-5  # of the largest number: the order of sums may differ
# Of timm's own weights for the architecture; these are others.
FOREIGN = ("license", "origin_url", "paper_ids", "paper_name", "notes", "description", "label_descriptions")

USAGE = """\
import timm
from PIL import Image, ImageOps

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
{result} = model(transform(photo)[None]){tail}
"""


def export_timm(model: Model, folder: Path) -> float:
    """Write weights, config.json and a model card.

    Args:
        model: of a run, on the CPU.
        folder: empty.
    Returns: the largest difference of its numbers from the run's.
    Raises: ShapeError for an architecture that timm lacks, or whose classifier is not one linear layer behind
        the features.
    """
    network = whole_network(model)
    for name in FOREIGN:
        network.pretrained_cfg.pop(name, None)
    views = model.settings.views
    side = views.crop_px
    preparation = {
        "input_size": (3, side, side),
        "mean": views.mean,
        "std": views.std,
        "interpolation": "bicubic",
        "crop_pct": crop_share(side),
        "crop_mode": "center",
    }
    names = {"label_names": list(model.classes)} if model.classes else {}
    save_for_hf(
        network,
        str(folder),
        model_config={
            "pretrained_cfg": preparation,
            "model_args": _arguments(model),
            **names,
        },
        safe_serialization=True,
    )
    found = _compare(model, folder)
    result, tail = ("probabilities", ".softmax(1)") if model.head is not None else ("features", "")
    notes = ["Without `pretrained=True` timm gives the architecture with random weights."]
    if model.classes:
        notes.append(
            '`model.pretrained_cfg["label_names"]` has the classes in the order of the probabilities.'
        )
    notes.append(
        "timm scales pictures with Pillow, vitds with its own kernels, so pixels differ a little. On the "
        f"same pixels its numbers differ from the run's {sameness(found)}."
    )
    write_card(folder, model, library="timm", usage=USAGE.format(result=result, tail=tail), notes=notes)
    return found


def whole_network(model: Model) -> nn.Module:
    """timm's own model with the run's weights, and its class head as timm's classifier.

    Raises: ShapeError if timm has no such architecture, or it has no place for the class head.
    """
    name, head = model.settings.backbone.name, model.head
    if not timm.model_entrypoint(name).__module__.startswith("timm."):
        raise ShapeError(
            f"timm alone has no {name}, it comes with vitds; `vitds export onnx` takes it, and in Python "
            "vitds.open_model"
        )
    network = timm.create_model(name, num_classes=len(model.classes), **_arguments(model)).eval()
    missing, unexpected = network.load_state_dict(model.backbone.state_dict(), strict=False)
    if head is not None:
        classifier = network.get_classifier()
        if not isinstance(classifier, nn.Linear) or classifier.weight.shape != head.weight.shape:
            raise ShapeError(
                f"{name} classifies in timm by more than one linear layer behind its features, so the run's "
                "class head has no place there; `vitds export onnx` takes it"
            )
        own = {id(parameter) for parameter in classifier.parameters()}
        missing = [key for key in missing if id(network.get_parameter(key)) not in own]
        with torch.no_grad():
            classifier.weight.copy_(head.weight)
            classifier.bias.copy_(torch.zeros(len(head.weight)) if head.bias is None else head.bias)
    if missing or unexpected:
        raise ShapeError(
            f"{name}: timm's model lacks {unexpected} or has {missing} besides; `vitds export onnx` takes it"
        )
    return network


def _arguments(model: Model) -> dict:
    """With which timm builds the architecture of the run."""
    settings = model.settings
    side = {"img_size": settings.views.crop_px} if takes_side(settings.backbone.name) else {}
    return {**settings.backbone.options, **side}


def _compare(model: Model, folder: Path) -> float:
    """Load the folder as a person would, and compare."""
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    crops = trial_crops(model)
    with torch.inference_mode():
        features = loaded.forward_head(loaded.forward_features(crops), pre_logits=True)
        logits = loaded(crops) if model.head is not None else None
    found = difference(model, features, logits, crops)
    name = model.settings.backbone.name
    require_same(found, ALLOWED, f"timm's {name}", "`vitds export onnx` takes it as it is")
    return found
