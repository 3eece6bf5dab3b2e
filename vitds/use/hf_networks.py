"""What transformers has for one of timm's networks: its configuration, its classes, its names of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from vitds.errors import ShapeError
from vitds.use.model import Model

INSTEAD = "`vitds export timm` and `vitds export onnx` take it"
# timm's name of a layer in a block of a ViT -> transformers' name.
VIT_LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VIT_TENSORS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
RESNET_BLOCK = {"conv": "convolution", "bn": "normalization"}


class Counterpart(NamedTuple):
    """One of transformers' networks that computes what a run's network does."""

    config: PreTrainedConfig
    backbone: type[PreTrainedModel]
    options: dict[str, bool]  # of the backbone's constructor
    classifier: type[PreTrainedModel]
    attribute: str  # of the backbone inside the classifier
    linear: str  # name of the classifier's linear layer
    weights: dict[str, Tensor]  # of the backbone, by transformers' names
    features: Callable[[Any], Tensor]  # of what the backbone returns
    expression: str  # the same, for a reader
    note: str  # what to know of the features


def counterpart(model: Model) -> Counterpart:
    """Find transformers' network for a run's.

    Args:
        model: of a run.
    Raises: ShapeError for an architecture that transformers does not have (says why, and what works).
    """
    found = {VisionTransformer: _vit, ResNet: _resnet}.get(type(model.backbone))
    if found is None:
        raise ShapeError(
            f"{model.settings.backbone.name} is a {type(model.backbone).__name__}; `vitds export hf` knows "
            f"timm's VisionTransformer without distillation and its ResNet; {INSTEAD}"
        )
    return found(model)


def _names(model: Model) -> dict[str, Any]:
    if not model.classes:
        return {}
    return {
        "id2label": dict(enumerate(model.classes)),
        "label2id": {n: i for i, n in enumerate(model.classes)},
    }


def _vit(model: Model) -> Counterpart:
    vit = model.backbone
    _require_vit(vit, model)
    block = vit.blocks[0]
    return Counterpart(
        ViTConfig(
            hidden_size=vit.embed_dim,
            num_hidden_layers=len(vit.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            layer_norm_eps=vit.norm.eps,
            image_size=model.settings.views.crop_px,
            patch_size=vit.patch_embed.patch_size[0],
            qkv_bias=block.attn.qkv.bias is not None,
            **_names(model),
        ),
        backbone=ViTModel,
        options={"add_pooling_layer": False},
        classifier=ViTForImageClassification,
        attribute="vit",
        linear="classifier",
        weights=_vit_weights(vit),
        features=lambda found: found.last_hidden_state[:, 0],
        expression="last_hidden_state[:, 0]",
        note="The features are those of the class token; transformers' `pooler_output` is not trained.",
    )


def _require_vit(vit: nn.Module, model: Model) -> None:
    """Raises: ShapeError that names the first thing that transformers' ViT does not have."""
    name = model.settings.backbone.name
    if vit.global_pool != "token":
        raise ShapeError(
            f"{name} of this run pools its tokens by {vit.global_pool!r}, and transformers' ViT has the "
            f"class token alone; {INSTEAD}. A run with backbone.options.global_pool=token can be exported"
        )
    names = {key for key in vit.state_dict() if not key.startswith("blocks.")} - set(VIT_TENSORS)
    own = set(VIT_LAYERS) | {"attn.qkv"}
    names |= {key for key in vit.blocks.state_dict() if key.split(".", 1)[1].rpartition(".")[0] not in own}
    if names or set(VIT_TENSORS) - set(vit.state_dict()):
        odd = sorted(names or set(VIT_TENSORS) - set(vit.state_dict()))
        raise ShapeError(f"{name}: transformers' ViT differs in {', '.join(odd[:3])}; {INSTEAD}")


def _vit_weights(vit: nn.Module) -> dict[str, Tensor]:
    """By transformers' names; the queries, keys and values of timm are one tensor."""
    weights: dict[str, Tensor] = {}
    for key, value in vit.state_dict().items():
        if key in VIT_TENSORS:
            weights[VIT_TENSORS[key]] = value
            continue
        _, number, rest = key.split(".", 2)
        layer, _, kind = rest.rpartition(".")
        if layer == "attn.qkv":
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                weights[f"layers.{number}.attention.{part}_proj.{kind}"] = piece
        else:
            weights[f"layers.{number}.{VIT_LAYERS[layer]}.{kind}"] = value
    return weights


def _resnet(model: Model) -> Counterpart:
    net = model.backbone
    config = ResNetConfig(
        embedding_size=net.bn1.num_features,
        hidden_sizes=[stage["num_chs"] for stage in net.feature_info[1:]],
        depths=[len(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)],
        layer_type="bottleneck" if isinstance(net.layer1[0], Bottleneck) else "basic",
        **_names(model),
    )
    weights = _resnet_weights(net)
    theirs = {key: value.shape for key, value in ResNetModel(config).state_dict().items()}
    odd = [key for key, (name, value) in weights.items() if theirs.get(name) != value.shape]
    if odd:
        raise ShapeError(
            f"{model.settings.backbone.name}: transformers' ResNet differs in {', '.join(odd[:3])}; {INSTEAD}"
        )
    return Counterpart(
        config,
        backbone=ResNetModel,
        options={},
        classifier=ResNetForImageClassification,
        attribute="resnet",
        linear="classifier.1",
        weights=dict(weights.values()),
        features=lambda found: found.pooler_output.flatten(1),
        expression="pooler_output.flatten(1)",
        note="The features are the mean over the last stage's positions.",
    )


def _resnet_weights(net: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """timm's name -> transformers' name and the tensor; an unknown layer keeps its name."""
    weights: dict[str, tuple[str, Tensor]] = {}
    for key, value in net.state_dict().items():
        *place, layer, kind = key.split(".")
        if place and place[-1] == "downsample":
            stage, number = place[0].removeprefix("layer"), place[1]
            part = ("convolution", "normalization")[int(layer) % 2]
            name = f"encoder.stages.{int(stage) - 1}.layers.{number}.shortcut.{part}.{kind}"
        elif layer[:-1] in RESNET_BLOCK and len(place) == 2:
            stage, number = place[0].removeprefix("layer"), place[1]
            part = f"layer.{int(layer[-1]) - 1}.{RESNET_BLOCK[layer[:-1]]}"
            name = f"encoder.stages.{int(stage) - 1}.layers.{number}.{part}.{kind}"
        elif layer in ("conv1", "bn1"):
            name = f"embedder.embedder.{RESNET_BLOCK[layer[:-1]]}.{kind}"
        else:
            name = key
        weights[key] = (name, value)
    return weights
