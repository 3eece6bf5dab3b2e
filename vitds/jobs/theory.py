"""`vitds eval theory RUN …`: what the paper claims of instance discrimination, as figures of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitds.config.methods import METHODS
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, labelled
from vitds.errors import DataError, RunError
from vitds.evaluate.files import crop_features
from vitds.evaluate.opened import OpenModel, check_timm_name, instance_rows, open_model, run_of
from vitds.evaluate.probes import alignment, uniformity
from vitds.evaluate.theory import (
    PAIR_IMAGES,
    embedding_score,
    linear_r2,
    prototype_fidelity,
    semantic_mass,
    similarity_transfer,
)
from vitds.jobs.data_files import named_file
from vitds.jobs.theory_table import print_theory
from vitds.methods import method_class
from vitds.methods.base import SetSize
from vitds.runs.checkpoint import list_checkpoints, newest_sound, verify_checkpoint
from vitds.runs.directory import Run, known_inputs
from vitds.terminal import say

Score = dict[str, Any]
CROPS = 12  # of an image in its mean feature, or a few more: whole epochs of crops are taken


@dataclass(frozen=True)
class Subject:
    """A pretraining at one of its checkpoints.

    Attributes:
        model: with the weights of `checkpoint`.
        checkpoint: None where the run has none and no rows are needed.
        file: the run's training images.
        rows: weight and bias of its instance head; None of a method without one.
    """

    model: OpenModel
    checkpoint: Path | None
    file: BetonFile
    rows: dict[str, Tensor] | None


def theory(*models: str, data: str | None = None, as_json: bool = False) -> Score:
    """See `vitds.jobs.evaluate.evaluate`, of the kind theory.

    Args:
        models: pretraining runs, which are measured at their newest checkpoint, or checkpoints.
    Returns: of several models {"kind", "runs"}.
    Raises: RunError if there is nothing to measure; DataError if the training images are not there, or are
        others.
    """
    subjects = [_opened(name, data) for name in models]
    scores = [_kept(subject, _measured(subject)) for subject in subjects]
    result = scores[0] if len(scores) == 1 else {"kind": "theory", "runs": scores}
    if as_json:
        say(json.dumps(result, allow_nan=False))
    else:
        print_theory(scores)
    return result


def _opened(name: str, data: str | None) -> Subject:
    """Settings, weights and images; all that can be wrong is found here."""
    run = Run(run_of(Path(name)))
    if not (run.path / "settings.yaml").exists():
        check_timm_name(name)
        raise RunError(f"{name} is a timm model, and theory is for runs: it needs their training images")
    settings = run.settings
    method = method_class(settings.method)
    if method.leaves_class_head:
        raise RunError(
            f"{name} is a fine-tuned run, where images have no rows of their own; name the pretraining that "
            "it began with"
        )
    file = named_file("data", data, settings.data.train_files, "train")
    file = labelled(file) if method.needs_labels else file
    known = known_inputs(run, settings).get("data.train", file.manifest.content_hash)
    if known != file.manifest.content_hash:
        raise DataError(
            f"{file.path} does not hold the images that {run.path} was trained on, in their order, and a row "
            "belongs to an image by its place; name that file with `data=FILE.beton`"
        )
    has_rows = method.rows(SetSize(file.images, len(file.manifest.classes))) > 0
    model, checkpoint = _at_checkpoint(name, run, has_rows)
    rows = instance_rows(checkpoint, file.images, has_bias=settings.head.bias) if has_rows else None
    return Subject(model, checkpoint, file, rows)


def _at_checkpoint(name: str, run: Run, has_rows: bool) -> tuple[OpenModel, Path | None]:
    if Path(name).absolute() != run.path.absolute():
        return open_model(name), Path(name)
    saved = newest_sound(run.checkpoints)[0]
    if saved is not None:
        # Weights and rows of one step, also where the run's own weights are averages over steps.
        return replace(open_model(str(saved.path)), name=name, source=run.path), saved.path
    if has_rows:
        raise RunError(f"{name} has no checkpoint, and the rows of its instance head lie in nothing else")
    return open_model(name), None


def _measured(subject: Subject) -> Score:
    """The figures; None where there is nothing to measure, and a line that says why."""
    model, file = subject.model, subject.file
    settings, notes = model.settings, []
    crops_nED, index_n = _features(model, file)
    f_nD, images, views = crops_nED.mean(1), len(index_n), settings.views.count
    # First and last view of one epoch, as the probes in training take them.
    found: Score = {
        "alignment": alignment(crops_nED[:, 0], crops_nED[:, views - 1]) if views > 1 else None,
        "uniformity": uniformity(crops_nED[:, 0]),
    }
    if images < file.images:
        notes.append(f"{file.images - images} images cannot be decoded and are left out")
    if images > PAIR_IMAGES:
        notes.append(f"pairs are those of {PAIR_IMAGES:,} of the {images:,} images, drawn by the run's seed")
    rows = None
    if settings.head.lazy and subject.rows is not None:
        notes.append(
            "head.lazy: rows are as their own last step left them, without the decay that is due since"
        )
    if subject.rows is not None:
        rows = {part: tensor[index_n] for part, tensor in subject.rows.items()}
        fidelity = prototype_fidelity(rows["weight"], f_nD)
        found |= {"prototype_cosine": fidelity.cosine, "own_row_first": fidelity.first}
        other_nD = rows["weight"]
    else:
        notes.append("the method has no rows: items 2 and 5 of rows are left out")
        other_nD = _earlier_features(subject, notes)
    if other_nD is not None:
        transfer = similarity_transfer(other_nD, f_nD, seed=settings.seed)
        found |= {"similarity_pearson": transfer.pearson, "similarity_spearman": transfer.spearman}
    label_n = torch.tensor(file.labels)[index_n].long()
    has_classes = len(label_n[label_n >= 0].unique()) > 1
    if not has_classes:
        label_n = torch.full_like(label_n, -1)
        notes.append(f"{file.path} has no two classes: what items 4 to 6 say of classes is left out")
    found |= _mass(settings, f_nD, rows, label_n, notes)
    blind: Score = {"alignment": 2.0, "prototype_cosine": 0.0, "own_row_first": 100 / images}
    blind |= {"similarity_pearson": 0.0, "similarity_spearman": 0.0, "mass_ratio": 1.0}
    if has_classes:
        of_classes = _of_classes(f_nD, rows, label_n, len(file.manifest.classes), settings.seed)
        found, blind = found | of_classes[0], blind | of_classes[1]
    return {"theory": found, "blind": blind, "notes": notes}


def epochs_of_crops(settings: Settings) -> int:
    """How many epochs have CROPS crops of an image."""
    return -(-CROPS // settings.views.count)


def _features(model: OpenModel, file: BetonFile) -> tuple[Float[Tensor, "n E D"], Int[Tensor, "n"]]:
    epochs = epochs_of_crops(model.settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return crop_features(model.settings, model.backbone, file, epochs, device)


def _earlier_features(subject: Subject, notes: list[str]) -> Float[Tensor, "n D"] | None:
    """The images' mean features at the checkpoint before, which stand for the rows that are not there."""
    before = None
    if subject.checkpoint is not None:
        saved = list_checkpoints(subject.checkpoint.absolute().parent)
        before = max((path for path in saved if path.name < subject.checkpoint.name), default=None)
    if before is None:
        notes.append("no checkpoint before this one is kept: item 3 is left out")
        return None
    notes.append(f"item 3 is of the features at {verify_checkpoint(before).path.name} against those here")
    return _features(open_model(str(before)), subject.file)[0].mean(1)


def _mass(
    settings: Settings,
    f_nD: Float[Tensor, "n D"],
    rows: dict[str, Tensor] | None,
    label_n: Int[Tensor, "n"],
    notes: list[str],
) -> Score:
    """Item 4, by the head's own softmax, or by the cosines to all images at the method's temperature."""
    unit_nD = F.normalize(f_nD, dim=1)
    if rows is not None and settings.head.cosine:
        x_nD, w_nD = unit_nD / settings.head.temperature, F.normalize(rows["weight"], dim=1)
    elif rows is not None:
        x_nD, w_nD = f_nD, rows["weight"]
    elif key := METHODS[settings.method].temperature:
        x_nD, w_nD = unit_nD / reduce(getattr, key.split("."), settings), unit_nD
    else:
        notes.append("the method has no softmax over images: item 4 is left out")
        return {}
    mass = semantic_mass(x_nD, w_nD, None if rows is None else rows.get("bias"), label_n)
    return {
        "mass_ratio": mass.ratio,
        "mass_ratio_largest": mass.largest,
        "off_target_mass": None if rows is None else mass.off_target,
    }


def _of_classes(
    f_nD: Float[Tensor, "n D"],
    rows: dict[str, Tensor] | None,
    label_n: Int[Tensor, "n"],
    classes: int,
    seed: int,
) -> tuple[Score, Score]:
    """Items 5 and 6, and what they are where nothing is known of the images."""
    has_label_n = label_n >= 0
    label_m, found = label_n[has_label_n], {}
    for name, rows_nD in (("rows", None if rows is None else rows["weight"]), ("features", f_nD)):
        if rows_nD is not None:
            score = embedding_score(rows_nD[has_label_n], label_m, classes=classes, seed=seed)
            found |= {f"{name}_knn": score.knn, f"{name}_map": score.map, f"{name}_auc": score.auc}
    share_C = label_m.bincount(minlength=classes) / len(label_m)
    one_hot_mC = F.one_hot(label_m, classes).double()
    found["class_r2"] = linear_r2(one_hot_mC, F.normalize(f_nD[has_label_n], dim=1))
    present = int((share_C > 0).sum())
    blind = {"knn": 100 * float(share_C.max()), "map": 100 * float(share_C.square().sum()), "auc": 0.5}
    return found, {
        **{f"{name}_{key}": value for name in ("rows", "features") for key, value in blind.items()},
        "class_r2": (present - 1) / (len(label_m) - 1),
    }


def _kept(subject: Subject, measured: Score) -> Score:
    """All that the JSON says, written into the run's analysis."""
    model = subject.model
    score = {
        "kind": "theory",
        "model": model.name,
        "checkpoint": None if subject.checkpoint is None else subject.checkpoint.name,
        "data": str(subject.file.path),
        "images": subject.file.images,
        "crops": epochs_of_crops(model.settings) * model.settings.views.count,
        **measured,
        "data_hash": subject.file.manifest.content_hash,
        "weights": model.weights,
    }
    text = json.dumps(score, ensure_ascii=False, allow_nan=False)
    score["notes"].extend(model.keep({"theory.json": text.encode()}))
    return score
