"""A run as an ONNX model: uint8 pixels in, features and logits out, for any number of images."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float, UInt8
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from vitds.data.beton import BetonFile
from vitds.data.loader import eval_batches
from vitds.evaluate.classify import top_accuracy
from vitds.runs.directory import write_json
from vitds.use.card import write_card
from vitds.use.export import difference, require_same, sameness, short_side, trial_crops
from vitds.use.model import Model

ALLOWED = 1e-4  # of the largest number
FLOATS, INT8 = "model.onnx", "model_int8.onnx"

USAGE = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model = onnxruntime.InferenceSession("model.onnx")
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
image = ImageOps.fit(photo, ({side}, {side}), bleed={bleed:.6f})
{results} = model.run(None, {{"pixels": np.asarray(image).transpose(2, 0, 1)[None]}})
"""


class _FromPixels(nn.Module):
    """The network behind its own normalisation."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        views = model.settings.views
        self.register_buffer("mean", 255 * torch.tensor(views.mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(views.std).view(1, 3, 1, 1))

    def forward(self, pixels: UInt8[Tensor, "B 3 S S"]) -> tuple[Tensor, ...]:
        features = self.backbone((pixels.float() - self.mean) / self.std)
        return (features,) if self.head is None else (features, self.head(features))


def export_onnx(
    model: Model, folder: Path, *, int8: bool = False, test_file: BetonFile | None = None
) -> list[str]:
    """Write model.onnx, config.json and a model card; with int8 also model_int8.onnx.

    Args:
        model: of a run, on the CPU.
        folder: empty.
        int8: quantise the weights of linear layers and convolutions to 8 bits.
        test_file: on which the accuracy of both is measured.
    Returns: what was measured, a line each.
    Raises: ShapeError if onnxruntime computes other numbers.
    """
    _export(model, folder / FLOATS)
    side = model.settings.views.crop_px
    crops = trial_crops(model)
    outputs = run_onnx(folder / FLOATS, _pixels_of(crops, model))
    logits = None if model.head is None else torch.from_numpy(outputs[1])
    found = difference(model, torch.from_numpy(outputs[0]), logits, crops)
    require_same(
        found,
        ALLOWED,
        "onnxruntime",
        "this is a fault of torch's exporter; `vitds export timm` may do instead",
    )
    lines = [f"{FLOATS}: its numbers differ from the run's {sameness(found)}"]
    if int8:
        lines += _int8(model, folder, test_file)
    write_json(folder / "config.json", {"side_px": side, "classes": list(model.classes)})
    usage = USAGE.format(
        side=side,
        bleed=(1 - side / short_side(side)) / 2,
        results="features, logits" if model.head is not None else "(features,)",
    )
    notes = [
        "It takes uint8 pixels (images, 3, height, width), any number of images, and normalises them itself.",
        *lines,
    ]
    if model.classes:
        notes.insert(1, "`config.json` has the classes in the order of the logits.")
    write_card(folder, model, library="onnx", usage=usage, notes=notes)
    return lines


def run_onnx(path: Path, pixels: UInt8[np.ndarray, "B 3 S S"]) -> list[Float[np.ndarray, "B K"]]:
    """Features, and logits where the model has them."""
    return onnxruntime.InferenceSession(path).run(None, {"pixels": pixels})


def _export(model: Model, path: Path) -> None:
    side = model.settings.views.crop_px
    # Two images: torch takes an axis of length one for a constant.
    pixels = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with _quiet():
        torch.onnx.export(
            _FromPixels(model).eval(),
            (pixels,),
            path,
            dynamo=True,
            external_data=False,
            input_names=["pixels"],
            output_names=["features", "logits"][: 1 if model.head is None else 2],
            dynamic_shapes=({0: torch.export.Dim("images")},),
            verbose=False,
        )


def _int8(model: Model, folder: Path, test_file: BetonFile | None) -> list[str]:
    """Write the quantised model; what became smaller, and what became of the accuracy."""
    with _quiet():
        prepared = folder / "prepared.onnx"
        quant_pre_process(folder / FLOATS, prepared)
        # Unsigned: onnxruntime has no convolution with signed weights, and signed products can overflow
        # 16 bits on processors without VNNI.
        quantize_dynamic(
            prepared,
            folder / INT8,
            weight_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        )
        prepared.unlink()
    before, after = ((folder / name).stat().st_size / 1e6 for name in (FLOATS, INT8))
    size = f"{INT8}: {after:.1f} MB in place of {before:.1f} MB"
    lack = None
    if model.head is None:
        lack = "the run has no class head"
    elif test_file is None:
        lack = "the run's test file is not there"
    elif test_file.manifest.classes != model.classes:
        lack = f"{test_file.path} has other classes than the run"
    if lack:
        return [f"{size}; its accuracy was not measured, as {lack}"]
    first, second = (_top1(model, folder / name, test_file) for name in (FLOATS, INT8))
    return [f"{size}; top-1 on {test_file.path} {second:.2f} %, {first:.2f} % with float weights"]


def _top1(model: Model, path: Path, file: BetonFile) -> float:
    session = onnxruntime.InferenceSession(path)
    logits = [
        torch.from_numpy(session.run(["logits"], {"pixels": batch.crops.numpy()})[0])
        for batch in eval_batches(file, model.settings.views, batch_images=model.settings.eval.batch_images)
    ]
    return top_accuracy(torch.cat(logits), torch.from_numpy(file.labels.copy())).top1


def _pixels_of(crops: Float[Tensor, "B 3 S S"], model: Model) -> UInt8[np.ndarray, "B 3 S S"]:
    """The pixels that were normalised."""
    views = model.settings.views
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (views.mean, views.std))
    return ((crops * std + mean) * 255).round().to(torch.uint8).numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print and log about their own stages."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
