"""A run as a folder that Hugging Face's transformers loads: its ViT, with an image processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BitImageProcessor, ViTConfig, ViTModel
from transformers import ViTForImageClassification as ViTClassifier
from transformers.utils import logging

from vitds.errors import ShapeError
from vitds.use.card import write_card
from vitds.use.export import difference, require_same, sameness, short_side, trial_crops
from vitds.use.model import Model

ALLOWED = 1e-5  # of the largest number
INSTEAD = "`vitds export timm` and `vitds export onnx` take it"
BICUBIC = 3  # Pillow's number of it
# timm's name of a layer in a block -> transformers' name.
LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TENSORS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}

USAGE = """\
from PIL import Image
from transformers import AutoImageProcessor, {kind}

model, processor = {kind}.from_pretrained("."), AutoImageProcessor.from_pretrained(".")
pixels = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
{result}
"""


def export_hf(model: Model, folder: Path) -> float:
    """Write config.json, weights, preprocessor_config.json and a model card.

    Args:
        model: of a run, on the CPU.
        folder: empty.
    Returns: the largest difference of its numbers from the run's.
    Raises: ShapeError for an architecture that is not transformers' ViT (says why, and what works).
    """
    config = _config(model)
    kind = "AutoModel" if model.head is None else "AutoModelForImageClassification"
    with _quiet():
        network = ViTModel(config, add_pooling_layer=False) if model.head is None else ViTClassifier(config)
        _load(network, model)
        network.eval().save_pretrained(folder)
        _processor(model).save_pretrained(folder)
        found = _compare(model, folder)
    result = (
        "features = model(**pixels).last_hidden_state[:, 0]"
        if model.head is None
        else "probabilities = model(**pixels).logits.softmax(1)"
    )
    notes = [
        "transformers scales pictures by its own code, so pixels differ a little from those of vitds. On the "
        f"same pixels its numbers differ from the run's {sameness(found)}."
    ]
    if model.classes:
        notes.insert(0, "`model.config.id2label` has the classes in the order of the probabilities.")
    else:
        notes.insert(
            0, "The features are those of the class token; transformers' `pooler_output` is not trained."
        )
    write_card(
        folder, model, library="transformers", usage=USAGE.format(kind=kind, result=result), notes=notes
    )
    return found


def _config(model: Model) -> ViTConfig:
    vit = model.backbone
    _require_vit(vit, model)
    block = vit.blocks[0]
    labels = dict(enumerate(model.classes))
    named = (
        {"id2label": labels, "label2id": {name: number for number, name in labels.items()}} if labels else {}
    )
    return ViTConfig(
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        layer_norm_eps=vit.norm.eps,
        image_size=model.settings.views.crop_px,
        patch_size=vit.patch_embed.patch_size[0],
        qkv_bias=block.attn.qkv.bias is not None,
        **named,
    )


def _require_vit(vit: nn.Module, model: Model) -> None:
    """Raises: ShapeError that names the first thing that transformers' ViT does not have."""
    name = model.settings.backbone.name
    if type(vit) is not VisionTransformer:
        raise ShapeError(
            f"{name} is a {type(vit).__name__}, and transformers' ViT is timm's VisionTransformer alone, "
            f"without distillation; {INSTEAD}"
        )
    if vit.global_pool != "token":
        raise ShapeError(
            f"{name} of this run pools its tokens by {vit.global_pool!r}, and transformers' ViT has the "
            f"class token alone; {INSTEAD}. A run with backbone.options.global_pool=token can be exported"
        )
    names = {key for key in vit.state_dict() if not key.startswith("blocks.")} - set(TENSORS)
    own = set(LAYERS) | {"attn.qkv"}
    names |= {key for key in vit.blocks.state_dict() if key.split(".", 1)[1].rpartition(".")[0] not in own}
    if names or set(TENSORS) - set(vit.state_dict()):
        odd = sorted(names or set(TENSORS) - set(vit.state_dict()))
        raise ShapeError(f"{name}: transformers' ViT differs in {', '.join(odd[:3])}; {INSTEAD}")


def _load(network: nn.Module, model: Model) -> None:
    """Copy the weights by name; the queries, keys and values of timm are one tensor."""
    prefix = "" if model.head is None else "vit."
    weights: dict[str, Tensor] = {}
    for key, value in model.backbone.state_dict().items():
        if key in TENSORS:
            weights[prefix + TENSORS[key]] = value
            continue
        _, number, rest = key.split(".", 2)
        layer, _, kind = rest.rpartition(".")
        place = f"{prefix}layers.{number}."
        if layer == "attn.qkv":
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                weights[f"{place}attention.{part}_proj.{kind}"] = piece
        else:
            weights[f"{place}{LAYERS[layer]}.{kind}"] = value
    if model.head is not None:
        weights["classifier.weight"] = model.head.weight
        bias = model.head.bias
        weights["classifier.bias"] = torch.zeros(len(model.classes)) if bias is None else bias
    network.load_state_dict(weights)


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


def _compare(model: Model, folder: Path) -> float:
    """Load the folder as a person would, and compare."""
    crops = trial_crops(model)
    logits = None
    with torch.inference_mode():
        if model.head is None:
            vit = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
        else:
            classifier = ViTClassifier.from_pretrained(folder).eval()
            vit, logits = classifier.vit, classifier(crops).logits
        features = vit(crops).last_hidden_state[:, 0]
    found = difference(model, features, logits, crops)
    require_same(found, ALLOWED, "transformers' ViT", INSTEAD)
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
