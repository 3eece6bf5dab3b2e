"""The kinds of evaluation: features and labels -> what was found, as numbers and image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitds.data.beton import BetonFile
from vitds.errors import DataError
from vitds.evaluate.answers import (
    Answers,
    answers_of,
    balanced_means,
    class_score,
    confusions,
    per_class,
    reliability,
)
from vitds.evaluate.bootstrap import interval_of_mean
from vitds.evaluate.features import Features, check_labelled
from vitds.evaluate.few_shot import REPEATS, SHOTS, few_shot
from vitds.evaluate.files import file_features
from vitds.evaluate.kept import feature_facts, kept_features
from vitds.evaluate.knn import knn_answers
from vitds.evaluate.linear import linear_probe
from vitds.evaluate.opened import OpenModel, check_classes, class_head
from vitds.evaluate.retrieval import retrieve

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of an evaluation's table.

    Attributes:
        name: what tells it from the others, as `k = 20`; empty where it is the only one.
        numbers: in percent, by their keys in the JSON.
        value_M: of each image, 0..1; 100 times their mean is the line's main figure.
        main: the key of that figure.
    """

    name: str
    numbers: Numbers
    value_M: NDArray[np.float64]
    main: str = "top1"


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Attributes:
        numbers: the figures, for the run's summary.
        details: each class, confusions and the like, for the run's analysis.
        lines: of the table.
        answers: of the class head, to each image.
        index_M: of `answers`: the number in the .beton. Images that cannot be decoded are missing, where
            data.damaged skips them.
    """

    numbers: Numbers
    details: Numbers
    lines: tuple[Line, ...]
    answers: Answers | None = None
    index_M: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Task:
    """A model and the images to evaluate it on; their features are made, or taken, once.

    Attributes:
        model: with its weights.
        query: the labelled images that are classified.
        bank: the labelled images that others are compared with; None for top1.
        device: of the forward passes.
        notes: lines for the person.
        knn_k: numbers of neighbours beside those of the model's settings.
    """

    model: OpenModel
    query: BetonFile
    bank: BetonFile | None
    device: torch.device
    notes: list[str] = field(default_factory=list)
    knn_k: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return self.query.manifest.classes

    def features(self, file: BetonFile) -> Features:
        """Of a file's images, on every rank."""
        model = self.model
        return kept_features(
            None if model.run is None else model.run.path / "analysis",
            feature_facts(model.settings, model.weights or "", file),
            lambda: file_features(model.settings, model.backbone, file, self.device),
            self.notes,
        )

    def pair(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features and labels of the bank and of the queries."""
        bank, query = self.features(self.bank), self.features(self.query)
        return bank.rows_MD, bank.label_M, query.rows_MD, query.label_M


def measure(kind: str, task: Task) -> Measured:
    """Evaluate; called by every rank.

    Raises: RunError for top1 of a model without a class head; DataError if its classes are not the file's,
        or a linear classifier gets one class alone;
        ShapeError, NumericsError as the evaluations raise them.
    """
    kinds: dict[str, Callable[[Task], Measured]] = {
        "top1": _top1,
        "knn": _knn,
        "linear": _linear,
        "fewshot": _few_shot,
        "retrieval": _retrieval,
    }
    return kinds[kind](task)


def _top1(task: Task) -> Measured:
    """The run's class head, which knows its classes: no training file is needed."""
    names, head = class_head(task.model)
    check_classes(task.model, len(head.weight), names, task.query)
    query = task.features(task.query)
    with torch.inference_mode():
        logit_MC = head(query.rows_MD)
    check_labelled("logits", logit_MC, query.label_M, len(task.names))
    answers = answers_of(logit_MC, query.label_M, logit_MC.double().softmax(1))
    numbers = _numbers(answers, task.names)
    index_M = task.query.index[query.index_M.numpy()]
    return Measured(numbers, _details(answers, task.names), (_line("", numbers, answers),), answers, index_M)


def _knn(task: Task) -> Measured:
    pair = task.pair()
    wanted = tuple(dict.fromkeys((*task.model.settings.eval.knn_k, *task.knn_k)))
    found = knn_answers(*pair, k=wanted, classes=len(task.names))
    numbers = {
        str(k): _numbers(answers, task.names) | {"neighbours": min(k, len(pair[0]))}
        for k, answers in found.items()
    }
    return Measured(
        {"knn": numbers},
        {"details": {str(k): _details(answers, task.names) for k, answers in found.items()}},
        tuple(_line(f"k = {k}", numbers[str(k)], answers) for k, answers in found.items()),
    )


def _linear(task: Task) -> Measured:
    present = np.unique(task.bank.labels)
    if len(present) < 2:
        raise DataError(
            f"{task.bank.path}: all {task.bank.images} labelled images are of one class, "
            f"{task.names[present[0]]!r}; a linear classifier needs two. Give another file with `bank`"
        )
    score = linear_probe(*task.pair(), seed=task.model.settings.seed)
    numbers = _numbers(score.answers, task.names)
    return Measured(
        numbers | {"regularisation": score.regularisation},
        _details(score.answers, task.names),
        (_line("", numbers, score.answers),),
    )


def _few_shot(task: Task) -> Measured:
    pair, lines = task.pair(), []
    images_C = np.bincount(pair[1].numpy(), minlength=len(task.names))
    for shots in SHOTS:
        found = few_shot(*pair, shots=shots, classes=len(task.names))
        # Answers of the repeats, a row each.
        label_RM, predicted_RM = (
            np.stack([getattr(answers, name) for answers in found]) for name in ("label_M", "predicted_M")
        )
        balanced_R, f1_R = balanced_means(label_RM, predicted_RM, len(task.names))
        right_RM = label_RM == predicted_RM
        top1_R = 100 * right_RM.mean(1)
        numbers = {
            "top1": float(top1_R.mean()),
            "top1_deviation": float(top1_R.std(ddof=1)),
            "top1_interval": [100 * end for end in interval_of_mean(right_RM.mean(0))],
            "top1_draws": top1_R.tolist(),
            "balanced_accuracy": 100 * float(balanced_R.mean()),
            "macro_f1": 100 * float(f1_R.mean()),
            "majority": _majority(label_RM[0]),
            "short_classes": int((images_C < shots).sum()),
        }
        lines.append(Line(f"{shots} a class", numbers, right_RM.mean(0)))
        if numbers["short_classes"]:
            task.notes.append(
                f"{numbers['short_classes']} of {len(task.names)} classes have fewer than {shots} images in "
                f"{task.bank.path}; they give all they have"
            )
    of_shots = {str(shots): line.numbers for shots, line in zip(SHOTS, lines, strict=True)}
    return Measured({"fewshot": of_shots}, {"draws": REPEATS}, tuple(lines))


def _retrieval(task: Task) -> Measured:
    pair = task.pair()
    found = retrieve(*pair, classes=len(task.names))
    numbers = {
        "map": found.mean_precision,
        "map_interval": [100 * end for end in interval_of_mean(found.precision_Q)],
        "recall": {str(k): share for k, share in found.recall().items()},
        "majority": _majority(pair[3].numpy()),
    }
    line = Line("", numbers, found.precision_Q, "map")
    means = np.bincount(pair[3].numpy(), found.precision_Q, len(task.names))
    images_C = np.bincount(pair[3].numpy(), minlength=len(task.names))
    rows = [
        {"class": name, "images": int(images), "map": 100 * float(total / images) if images else None}
        for name, images, total in zip(task.names, images_C, means, strict=True)
    ]
    return Measured(numbers, {"per_class": rows}, (line,))


def _numbers(answers: Answers, names: tuple[str, ...]) -> Numbers:
    score = asdict(class_score(answers, len(names)))
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in score.items()
        if value is not None
    }


def _details(answers: Answers, names: tuple[str, ...]) -> Numbers:
    curve = reliability(answers)
    return {
        "per_class": per_class(answers, names),
        "confusion": confusions(answers),
        **({} if curve is None else {"reliability": curve}),
    }


def _line(name: str, numbers: Numbers, answers: Answers) -> Line:
    return Line(name, numbers, answers.is_right_M.astype(np.float64))


def _majority(label_M: NDArray[np.int64]) -> float:
    """Top-1, in percent, of always answering the class with the most images."""
    return 100 * float(np.bincount(label_M).max() / len(label_M))
