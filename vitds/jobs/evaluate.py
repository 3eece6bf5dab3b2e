"""`vitds eval top1|knn|linear RUN`: what a frozen backbone is worth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from rich.table import Table
from torch import Tensor, nn

from vitds.config.tree import Backbone, Settings
from vitds.data.beton import BetonFile, require_same_classes
from vitds.errors import DataError, ResourceError, RunError, UsageError
from vitds.evaluate.classify import top_accuracy
from vitds.evaluate.files import file_features
from vitds.evaluate.knn import knn_accuracy
from vitds.evaluate.linear import linear_probe
from vitds.jobs.data_files import DIGITS, open_file
from vitds.methods import method_class
from vitds.models.build import build_backbone
from vitds.report.table import show
from vitds.runs.backbone import load_backbone, read_class_names, read_weights
from vitds.runs.checkpoint import CheckpointReader, Saved
from vitds.runs.directory import Run, read_json
from vitds.terminal import say

Score = dict[str, Any]
KINDS = ("top1", "knn", "linear")


def evaluate(
    kind: str, model: str, *, data: str | None = None, bank: str | None = None, as_json: bool = False
) -> Score:
    """Evaluate and print a table, or one JSON object.

    Args:
        kind: top1, knn or linear.
        model: a run directory, one of its checkpoints, or a timm model's name (with its published weights).
        data: the images to be classified; by default the run's test file.
        bank: labelled images that knn and linear learn from; by default the run's training file.
        as_json: print one JSON object and nothing else.
    Returns: the printed numbers, in percent.
    Raises: DataError if a file has no labels or their classes differ; RunError if the run cannot be read;
        UsageError for another kind, or an argument that does nothing.
    """
    if kind not in KINDS:
        raise UsageError(f"eval {kind}: there is no such evaluation; take one of {', '.join(KINDS)}")
    if kind == "top1" and bank is not None:
        raise UsageError("`bank` does nothing for top1, whose classes are in the run: leave it out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, source, backbone = _open_model(os.path.expanduser(model))
    query = _labelled("data", data, settings.data.test, "test")
    if kind == "top1":
        score = _top1(settings, source, backbone, query, device)
    else:
        neighbours = _labelled("bank", bank, settings.data.train, "train")
        require_same_classes(neighbours, query)
        jobs: dict[str, Callable[..., Score]] = {"knn": _knn, "linear": _linear}
        score = jobs[kind](settings, backbone, neighbours, query, device)
    score = {"model": model, "data": str(query.path), "images": query.images, **score}
    if as_json:
        say(json.dumps(score))
    else:
        _print_table(kind, score)
    return score


def _labelled(argument: str, given: str | None, of_run: str | None, half: str) -> BetonFile:
    """A file of labelled images: the one that an argument names, or the run's own.

    Raises: DataError if there is none, it cannot be read, or it has no labels.
    """
    name = given or of_run
    if name is None:
        what = "images to evaluate" if argument == "data" else "labelled images to learn from"
        raise DataError(f"no {what}: give `{argument}=FILE.beton`, for the run names none")
    path = os.path.expanduser(name)
    if given is None and not Path(path).exists() and path != DIGITS:
        raise DataError(
            f"{name}, which the run names, is not there, seen from {Path.cwd()}, the folder you call from. "
            f"Say where it is now with `{argument}=FILE.beton`, or call from the folder that the run was "
            "started in"
        )
    file = open_file(path, f"`{argument}`", half)
    if not file.manifest.classes:
        raise DataError(
            f"{file.path} has no labels, and an evaluation needs them: build it from a folder with one "
            "folder a class"
        )
    return file


def knn_of_run(run: Run, train_file: BetonFile, test_file: BetonFile, device: torch.device) -> Score:
    """kNN of a trained run: {k: {top1, top5, neighbours}} for each k of its settings.

    All ranks share the work.
    """
    settings, _, backbone = _open_model(str(run.path))
    return _knn(settings, backbone, train_file, test_file, device)["knn"]


def top1_of_run(run: Run, test_file: BetonFile, device: torch.device) -> Score:
    """top1 and top5 of a fine-tuned run; all ranks share the work."""
    settings, source, backbone = _open_model(str(run.path))
    return _top1(settings, source, backbone, test_file, device)


def _open_model(model: str) -> tuple[Settings, Path | None, nn.Module]:
    """Settings, the run or checkpoint, and the backbone with its weights.

    A timm name has default settings and no run.
    """
    path = Path(model)
    run_path = _run_of(path) if (path / "manifest.json").exists() else path
    if (run_path / "settings.yaml").exists():
        settings = Run(run_path).settings
        backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=settings.seed)
        load_backbone(backbone, read_weights(path), model)
        return settings, path, backbone
    if path.exists():
        raise RunError(f"{model} is no run directory: it has no settings.yaml")
    if "/" in model:
        raise RunError(
            f"{model} does not exist; name a run directory, one of its checkpoints, or a timm model"
        )
    if not timm.is_model(model):
        build_backbone(Backbone(name=model), crop_px=224, seed=0)  # raises, with the nearest names
    try:
        backbone = timm.create_model(model, pretrained=True, num_classes=0)
    except Exception as error:  # the hub client has errors of its own for each way in which a download fails
        raise ResourceError(
            f"the published weights of {model} cannot be had: {str(error).splitlines()[0]}"
        ) from error
    published = backbone.pretrained_cfg
    views = {"crop_px": published["input_size"][1], "mean": published["mean"], "std": published["std"]}
    return Settings.model_validate({"views": views, "engine": {"precision": "fp32"}}), None, backbone


def _knn(
    settings: Settings, backbone: nn.Module, train_file: BetonFile, test_file: BetonFile, device: torch.device
) -> Score:
    bank, query = (file_features(settings, backbone, file, device) for file in (train_file, test_file))
    classes = len(train_file.manifest.classes)
    scores = knn_accuracy(
        bank.rows_MD, bank.label_M, query.rows_MD, query.label_M, k=settings.eval.knn_k, classes=classes
    )
    return {"knn": {str(k): asdict(score) for k, score in scores.items()}}


def _linear(
    settings: Settings, backbone: nn.Module, train_file: BetonFile, test_file: BetonFile, device: torch.device
) -> Score:
    bank, query = (file_features(settings, backbone, file, device) for file in (train_file, test_file))
    score = linear_probe(bank.rows_MD, bank.label_M, query.rows_MD, query.label_M, seed=settings.seed)
    return {"top1": score.top1, "top5": score.top5, "regularisation": score.regularisation}


def _top1(
    settings: Settings, source: Path | None, backbone: nn.Module, query: BetonFile, device: torch.device
) -> Score:
    """Accuracy of the run's class head, which knows its classes: no training file is needed.

    Raises: RunError if there is no class head; DataError if the file's classes are others.
    """
    if source is None or not method_class(settings.method).leaves_class_head:
        raise RunError(
            f"{source or 'a plain timm model'} has no class head; top1 is for fine-tuned runs. Take knn or "
            "linear."
        )
    ours, weights = _class_head(source)
    theirs = query.manifest.classes
    if ours != theirs and not (ours is None and len(weights["weight"]) == len(theirs)):
        ours = ours or tuple(f"class {number}" for number in range(len(weights["weight"])))
        place = next(i for i in range(len(ours) + 1) if ours[: i + 1] != theirs[: i + 1])
        first, second = (repr(names[place]) if place < len(names) else "nothing" for names in (ours, theirs))
        raise DataError(
            f"{query.path}: its {len(theirs)} classes are not the {len(ours)} of {source}: class {place} is "
            f"{second} there, {first} in the run. Build it with the classes of the file that the run was "
            "trained on (--classes_from)"
        )
    linear = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0], bias="bias" in weights)
    linear.load_state_dict(weights)
    logits = file_features(settings, nn.Sequential(backbone, linear), query, device)
    return asdict(top_accuracy(logits.rows_MD, logits.label_M))


def _class_head(source: Path) -> tuple[tuple[str, ...] | None, dict[str, Tensor]]:
    """Names of the classes, and weight (C, D) and bias (C,), of a run or of a checkpoint's own step.

    The names are None of a run that is not finished: its checkpoints do not hold them.
    """
    is_checkpoint = (source / "manifest.json").exists()
    file = (_run_of(source) if is_checkpoint else source) / "head.safetensors"
    names = read_class_names(file) if file.exists() else None
    if not is_checkpoint:
        return names, read_weights(file)
    reader = CheckpointReader(Saved(source, read_json(source / "manifest.json")))
    own = set(reader.names()) & {"head.weight", "head.bias"}
    return names, {name.removeprefix("head."): reader.get(name) for name in own}


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.absolute().parent.parent


def _print_table(kind: str, score: Score) -> None:
    table = Table(title=f"{kind} of {score['model']} on {score['data']} ({score['images']:,} images)")
    for column in ("", "top-1 %", "top-5 %"):
        table.add_column(column, justify="right")
    rows = {f"k = {k}": part for k, part in score["knn"].items()} if kind == "knn" else {kind: score}
    for name, part in rows.items():
        table.add_row(name, f"{part['top1']:.2f}", f"{part['top5']:.2f}")
    show(table)
