"""A classifier's answers, image by image, and what they are worth: accuracy, each class, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitds.evaluate.bootstrap import Interval, intervals
from vitds.evaluate.classify import place_of_label

BINS = 15  # of the probability, for calibration (Guo et al. 2017)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a classifier says of each image.

    Attributes:
        label_M: the right class.
        predicted_M: the class with the highest score, the lower one of equals.
        place_M: how many classes come before the right one (classify.place_of_label).
        probability_M: of the predicted class; None where the scores are no probabilities.
    """

    label_M: NDArray[np.int64]
    predicted_M: NDArray[np.int64]
    place_M: NDArray[np.int64]
    probability_M: NDArray[np.float64] | None = None

    @property
    def is_right_M(self) -> NDArray[np.bool_]:
        """Whether the predicted class is the right one."""
        return self.place_M == 0

    def top(self, places: int) -> float:
        """Percent of the images whose class is among so many with the highest scores."""
        return 100 * int((self.place_M < places).sum()) / len(self.place_M)


def answers_of(
    score_MC: Float[Tensor, "M C"],
    label_M: Int[Tensor, "M"],
    probability_MC: Float[Tensor, "M C"] | None = None,
) -> Answers:
    """The answers that scores give.

    Args:
        score_MC: logits, votes or the like; higher is likelier, -inf never.
        label_M: 0..C-1.
        probability_MC: of the classes, where the scores have a meaning as such.
    """
    predicted_M = score_MC.argmax(1).cpu()  # the first of equals
    probability_M = None
    if probability_MC is not None:
        probability_M = probability_MC.cpu().double().gather(1, predicted_M[:, None])[:, 0].numpy()
    place_M = place_of_label(score_MC, label_M)
    return Answers(label_M.cpu().long().numpy(), predicted_M.numpy(), place_M.numpy(), probability_M)


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers to several sets of images as one; without probabilities."""
    columns = ("label_M", "predicted_M", "place_M")
    return Answers(*(np.concatenate([getattr(part, column) for part in parts]) for column in columns))


@dataclass(frozen=True)
class ClassScore:
    """In percent.

    Attributes:
        top1: images whose predicted class is right.
        top5: images whose class is among the five with the highest scores.
        balanced_accuracy: mean over the classes that have images of the share that is recognised.
        macro_f1: mean of F1 over the classes that have images or predictions.
        majority: top-1 of the answer that is always the class with the most images here.
        ece: expected calibration error over BINS bins of equal width; None without probabilities.
        top1_interval: 95 %, as are the next two; drawn over images (bootstrap.py).
        balanced_accuracy_interval: see top1_interval.
        macro_f1_interval: see top1_interval.
    """

    top1: float
    top5: float
    balanced_accuracy: float
    macro_f1: float
    majority: float
    ece: float | None
    top1_interval: Interval
    balanced_accuracy_interval: Interval
    macro_f1_interval: Interval


def class_score(answers: Answers, classes: int) -> ClassScore:
    """All figures of a classification.

    Args:
        answers: at least one.
        classes: C.
    """
    label_M, predicted_M = answers.label_M, answers.predicted_M
    right_M = answers.is_right_M.astype(np.float64)

    def statistics(drawn_RM: NDArray[np.int64]) -> NDArray[np.float64]:
        means_R = balanced_means(label_M[drawn_RM], predicted_M[drawn_RM], classes)
        return 100 * np.stack([right_M[drawn_RM].mean(1), *means_R], 1)

    balanced, macro_f1 = (
        float(mean_R[0]) for mean_R in balanced_means(label_M[None], predicted_M[None], classes)
    )
    return ClassScore(
        answers.top(1),
        answers.top(5),
        100 * balanced,
        100 * macro_f1,
        100 * float(np.bincount(label_M).max() / len(label_M)),
        _ece(answers),
        *intervals(statistics, len(label_M)),
    )


def balanced_means(
    label_RM: NDArray[np.int64], predicted_RM: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Balanced accuracy and macro-F1 of R sets of answers at once, in 0..1.

    Returns: (R,) and (R,); as scikit-learn's balanced_accuracy_score and f1_score(average="macro").
    """
    right_RC = _counts(np.where(label_RM == predicted_RM, label_RM, classes), classes + 1)[:, :classes]
    images_RC, answers_RC = _counts(label_RM, classes), _counts(predicted_RM, classes)
    recall_RC = right_RC / np.maximum(images_RC, 1)
    f1_RC = 2 * right_RC / np.maximum(images_RC + answers_RC, 1)
    return (
        recall_RC.sum(1) / (images_RC > 0).sum(1),
        f1_RC.sum(1) / (images_RC + answers_RC > 0).sum(1),
    )


def _counts(number_RM: NDArray[np.int64], numbers: int) -> NDArray[np.int64]:
    """How often each of 0..numbers-1 stands in each row, (R, numbers)."""
    rows = len(number_RM)
    shifted = number_RM + numbers * np.arange(rows)[:, None]
    return np.bincount(shifted.ravel(), minlength=rows * numbers).reshape(rows, numbers)


def _ece(answers: Answers) -> float | None:
    bins = reliability(answers)
    if bins is None:
        return None
    gaps = [each["images"] * abs(each["accuracy"] - each["confidence"]) for each in bins if each["images"]]
    return float(sum(gaps) / len(answers.label_M))


def reliability(answers: Answers) -> list[dict[str, Any]] | None:
    """The reliability curve: accuracy against the probability that the classifier gave its answers.

    Returns: a bin a row: `from` and `to` (its range of the probability, above the one and up to the other),
        `images`, `confidence` (their mean probability) and `accuracy`; in percent, None in an empty bin. None
        without probabilities.
    """
    if answers.probability_M is None:
        return None
    bin_M = np.clip(np.ceil(answers.probability_M * BINS) - 1, 0, BINS - 1).astype(np.int64)
    images_B = np.bincount(bin_M, minlength=BINS)
    of_each = [
        100 * np.bincount(bin_M, weights, minlength=BINS) / np.maximum(images_B, 1)
        for weights in (answers.probability_M, answers.is_right_M.astype(np.float64))
    ]
    return [
        {
            "from": 100 * number / BINS,
            "to": 100 * (number + 1) / BINS,
            "images": int(images),
            "confidence": float(confidence) if images else None,
            "accuracy": float(accuracy) if images else None,
        }
        for number, (images, confidence, accuracy) in enumerate(zip(images_B, *of_each, strict=True))
    ]


def per_class(answers: Answers, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a class: `class`, `images`, `predicted` (how often it was answered), `recall`, `precision`, `f1`.

    The last three are in percent, and None where there is nothing to divide by.
    """
    from sklearn.metrics import precision_recall_fscore_support  # at the top it costs every start a second

    precision_C, recall_C, f1_C, images_C = precision_recall_fscore_support(
        answers.label_M, answers.predicted_M, labels=range(len(names)), zero_division=np.nan
    )
    answered_C = np.bincount(answers.predicted_M, minlength=len(names))
    return [
        {
            "class": name,
            "images": int(images_C[number]),
            "predicted": int(answered_C[number]),
            **{
                key: None if np.isnan(column[number]) else 100 * float(column[number])
                for key, column in (("recall", recall_C), ("precision", precision_C), ("f1", f1_C))
            },
        }
        for number, name in enumerate(names)
    ]


def confusions(answers: Answers) -> list[tuple[int, int, int]]:
    """The confusion matrix, without its zeros: (right class, predicted class, images), by number."""
    from sklearn.metrics import confusion_matrix

    numbers = np.union1d(answers.label_M, answers.predicted_M)
    matrix = confusion_matrix(answers.label_M, answers.predicted_M, labels=numbers)
    return [
        (int(numbers[row]), int(numbers[column]), int(matrix[row, column]))
        for row, column in zip(*matrix.nonzero(), strict=True)
    ]
