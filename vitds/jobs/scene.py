"""A run's network, the images that its page is about, and what it says of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from vitds.data.beton import BetonFile, labelled
from vitds.evaluate.answers import Answers, answers_of
from vitds.evaluate.features import Features
from vitds.evaluate.files import own_features
from vitds.evaluate.kept import feature_facts, find_features
from vitds.evaluate.knn import knn_answers
from vitds.evaluate.opened import OpenModel, class_head, open_model
from vitds.methods import method_class
from vitds.report.overview import chosen_k
from vitds.runs.directory import Run

MOST_IMAGES = 2000  # on the map, and of a bank whose features are not kept: a page may take seconds
QUERIES, NEIGHBOURS = 8, 5


@dataclass(frozen=True)
class Scene:
    """A run's network and what it says of images.

    Attributes:
        model: with its weights.
        head: of its classes, if it has one.
        query: the images that are looked at: the test images, or those of training where there are no others.
        query_features: theirs, in their order.
        bank: the images among which neighbours are looked for.
        bank_features: theirs.
        answers: to the query, where it has labels.
        k: of the nearest neighbours that answer; None where the class head does.
    """

    model: OpenModel
    head: nn.Linear | None
    query: BetonFile
    query_features: Float[Tensor, "M D"]
    bank: BetonFile
    bank_features: Float[Tensor, "N D"]
    answers: Answers | None
    k: int | None


def open_scene(run: Run, train: BetonFile, test: BetonFile | None) -> Scene:
    """Read the network, take or make the features, and answer.

    Args:
        run: finished.
        train: its training file.
        test: its labelled test images, if there are any.
    Raises: what reading the weights raises; DataError if an image cannot be decoded.
    """
    model = open_model(str(run.path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.backbone.to(device).eval()
    query, found = _features(model, train if test is None else test, device)
    bank, known = (query, found) if test is None else _features(model, labelled(train), device)
    head, answers, k = None, None, None
    if method_class(model.settings.method).leaves_class_head:
        head = class_head(model)[1]
    if test is not None and head is not None:
        with torch.inference_mode():
            logit_MC = head(found.rows_MD)
        answers = answers_of(logit_MC, found.label_M, logit_MC.double().softmax(1))
    elif test is not None:
        k = int(chosen_k([str(k) for k in model.settings.eval.knn_k]))
        pair = (known.rows_MD, known.label_M, found.rows_MD, found.label_M)
        answers = knn_answers(*pair, k=(k,), classes=len(query.manifest.classes))[k]
    return Scene(model, head, query, found.rows_MD, bank, known.rows_MD, answers, k)


def _features(model: OpenModel, file: BetonFile, device: torch.device) -> tuple[BetonFile, Features]:
    """Those that an evaluation kept, of all images; else of MOST_IMAGES, spread over the file."""
    found = find_features(
        model.run.path / "analysis", feature_facts(model.settings, model.weights or "", file)
    )
    if found is not None:  # without images that could not be decoded, where data.damaged skips them
        return file.take(found.index_M.numpy()), found
    file = file.take(spread(file.images, MOST_IMAGES))
    rows_MD, index_M = own_features(model.settings, model.backbone, file, np.arange(file.images), device)
    labels = torch.from_numpy(file.labels[index_M.numpy()])
    return file.take(index_M.numpy()), Features(rows_MD, labels, torch.arange(len(rows_MD)))


def spread(images: int, most: int) -> NDArray[np.int64]:
    """At most so many positions, evenly over a file: of all its classes, as they stand one after another."""
    return np.unique(np.linspace(0, images - 1, min(images, most)).round().astype(np.int64))


def chosen_images(scene: Scene) -> list[int]:
    """Some images of the query: as many right as wrong ones, where that is known."""
    if scene.answers is None:
        return spread(scene.query.images, QUERIES).tolist()
    right, wrong = (np.flatnonzero(scene.answers.is_right_M == is_right) for is_right in (True, False))
    from_wrong = min(len(wrong), max(QUERIES // 2, QUERIES - len(right)))
    parts = ((right, min(len(right), QUERIES - from_wrong)), (wrong, from_wrong))
    return [int(part[i]) for part, count in parts if count for i in spread(len(part), count)]


def nearest_images(scene: Scene, chosen: list[int]) -> list[list[tuple[int, float]]]:
    """For each chosen image its nearest of the bank with their cosine similarity; never itself."""
    query_QD = F.normalize(scene.query_features[chosen], dim=1)
    similarity_QN = query_QD @ F.normalize(scene.bank_features, dim=1).T
    if scene.bank is scene.query:
        similarity_QN[torch.arange(len(chosen)), torch.tensor(chosen)] = -torch.inf
    best = similarity_QN.topk(min(NEIGHBOURS, scene.bank.images - (scene.bank is scene.query)), dim=1)
    return [
        list(zip(places, values, strict=True))
        for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
