"""A frozen model over batches of images -> one row an image: features, or logits of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vitds.augment.images import normalise
from vitds.config.tree import Views
from vitds.errors import NumericsError, ShapeError


@runtime_checkable
class ImageBatch(Protocol):
    """What evaluation reads of a batch: an image's uint8 crop, class (-1: none), and position in the file."""

    @property
    def crops(self) -> UInt8[Tensor, "B 3 S S"]: ...
    @property
    def label(self) -> Int[Tensor, "B"]: ...
    @property
    def index(self) -> Int[Tensor, "B"]: ...


@dataclass(frozen=True)
class Features:
    """What a model says about each image, on the host, in the order in which the images came."""

    rows_MD: Float[Tensor, "M D"]
    label_M: Int[Tensor, "M"]
    index_M: Int[Tensor, "M"]


def extract_features(
    model: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> Features:
    """Run `model` in evaluation mode, without gradients, over all batches.

    Its training mode is restored, also after an error.

    Args:
        model: on `device`; images (B, 3, S, S) float32 -> rows (B, D).
        mean, std: a channel, of pixels in 0..1.
        autocast: dtype of the forward pass; None computes in the model's own.
    Returns: float32 rows, whatever `autocast` is.
    Raises: ValueError if there is no batch. ShapeError if crops are not (B, 3, S, S), or the model does not
        return one row an image (gives the shapes). NumericsError if a row is not finite (names the image
        index).
    """
    channels, device = Views(mean=mean, std=std), torch.device(device)
    rows, labels, indices = [], [], []
    with _evaluation_mode(model):
        for batch in batches:
            if batch.crops.ndim != 4 or batch.crops.shape[1] != 3:
                raise ShapeError(
                    "evaluation takes one crop an image, (B, 3, S, S); this batch has "
                    f"{tuple(batch.crops.shape)}"
                )
            with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                output = model(normalise(batch.crops.to(device, non_blocking=True), channels))
            if output.ndim != 2 or len(output) != len(batch.crops):
                raise ShapeError(
                    f"the model returned {tuple(output.shape)} for {len(batch.crops)} images, where one row "
                    "an image (B, D) is needed; use a backbone that pools its tokens"
                )
            check_finite("the model's output", output, batch.index)
            rows.append(output.float().cpu())
            labels.append(batch.label.cpu())
            indices.append(batch.index.cpu())
    if not rows:
        raise ValueError("no images to evaluate: the loader gave no batch")
    return Features(torch.cat(rows), torch.cat(labels), torch.cat(indices))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Each module's own mode is kept, not the root's alone: a part that was in evaluation mode stays so."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training:
            module.training = mode


def check_finite(what: str, rows_MD: Float[Tensor, "M D"], index_M: Int[Tensor, "M"] | None = None) -> None:
    """Refuse NaN and infinity, which would pass through rankings as if they were numbers.

    Args:
        what: names the rows in the message.
        index_M: the images' positions in their file; None: row i is image i.
    Raises: NumericsError (names the first image, and counts them).
    """
    is_bad = ~rows_MD.isfinite().all(1).cpu()
    if is_bad.any():
        first = int(is_bad.int().argmax())
        image = first if index_M is None else int(index_M[first])
        raise NumericsError(
            f"{what}: image {image} gives values that are not finite ({int(is_bad.sum())} of {len(is_bad)} "
            "images here do); take an earlier checkpoint, or evaluate with precision fp32"
        )


def check_labelled(what: str, rows_MD: Float[Tensor, "M D"], label_L: Int[Tensor, "L"], classes: int) -> None:
    """Refuse rows that cannot be scored against their labels.

    Raises: ValueError if there are no rows, or a label is outside 0..classes-1 (names the image). ShapeError
        if the lengths differ. NumericsError if a row is not finite (names the image).
    """
    if not len(rows_MD):
        raise ValueError(f"{what}: there are no images")
    if len(rows_MD) != len(label_L):
        raise ShapeError(f"{what}: {len(rows_MD)} images but {len(label_L)} labels")
    is_outside = (label_L < 0) | (label_L >= classes)
    if is_outside.any():
        first = int(is_outside.int().argmax())
        raise ValueError(
            f"{what}: image {first} has label {int(label_L[first])}, labels here are 0 to {classes - 1} "
            "(-1 means no label)"
        )
    check_finite(what, rows_MD)


def check_same_width(bank_MD: Float[Tensor, "M D"], query_QD: Float[Tensor, "Q Dq"]) -> None:
    """Refuse features of two backbones.

    Raises: ShapeError (gives both widths).
    """
    if bank_MD.shape[1] != query_QD.shape[1]:
        raise ShapeError(
            f"bank features are {bank_MD.shape[1]} wide, query features {query_QD.shape[1]}; extract both "
            "with the same backbone"
        )
