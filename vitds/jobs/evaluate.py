"""`vitds eval KIND RUN …`: what a frozen backbone is worth; what was found is kept in the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from vitds import dist
from vitds.data.beton import BetonFile, labelled, require_same_classes
from vitds.errors import DataError, UsageError
from vitds.evaluate.opened import open_model
from vitds.jobs.compare import Evaluation, compared
from vitds.jobs.data_files import named_file
from vitds.jobs.eval_kinds import Measured, Task, measure
from vitds.jobs.eval_tables import print_comparison, print_evaluation
from vitds.jobs.theory import theory
from vitds.runs.directory import Run, known_inputs
from vitds.terminal import say

Score = dict[str, Any]
KINDS = ("top1", "knn", "linear", "fewshot", "retrieval")  # of accuracy; beside them stands theory
WITHOUT_BANK = {"top1": "whose classes are in the run", "theory": "which is of the training images alone"}


def evaluate(
    kind: str,
    model: str,
    *more: str,
    data: str | None = None,
    bank: str | None = None,
    as_json: bool = False,
) -> Score:
    """Evaluate, print a table or one JSON object, and keep what was found in RUN/analysis.

    Args:
        kind: top1, knn, linear, fewshot, retrieval or theory.
        model: a run directory, one of its checkpoints, or a timm model's name (with its published weights).
        more: others to compare with; those whose names differ in a seed alone (`a-seed0`, `a-seed1`) are a
            group.
        data: the images to be classified; by default the run's test file. Of theory the training file, where
            it is no longer where the run found it.
        bank: labelled images that all kinds but top1 and theory learn from; by default the run's training
            file.
        as_json: print one JSON object and nothing else.
    Returns: the printed numbers, in percent; docs/evaluation.md and docs/theory.md have their names.
    Raises: DataError if a file has no labels or their classes differ; RunError if the run cannot be read;
        UsageError for another kind, an argument that does nothing, or a model that is given twice.
    """
    kinds = (*KINDS, "theory")
    if kind not in kinds:
        raise UsageError(f"eval {kind}: there is no such evaluation; take one of {', '.join(kinds)}")
    if kind in WITHOUT_BANK and bank is not None:
        raise UsageError(f"`bank` does nothing for {kind}, {WITHOUT_BANK[kind]}: leave it out")
    names = [os.path.expanduser(name) for name in (model, *more)]
    paths = [str(Path(name)) for name in names]  # runs/a/ is runs/a
    if twice := [name for name in paths if paths.count(name) > 1]:
        raise UsageError(f"{twice[0]} is given {paths.count(twice[0])} times; leave one")
    if kind == "theory":
        return theory(*names, data=data, as_json=as_json)
    evaluations = [evaluated(kind, name, data, bank) for name in names]
    if more:
        result = compared(kind, evaluations)
    else:
        result = evaluations[0].score
    if as_json:
        say(json.dumps(result, allow_nan=False))
    elif more:
        print_comparison(result)
    else:
        print_evaluation(evaluations[0])
    return result


def knn_of_run(run: Run, train_file: BetonFile, test_file: BetonFile, device: torch.device) -> Score:
    """kNN of a trained run: {k: {top1, top5, ...}} for each k of its settings.

    All ranks share the work.
    """
    return _of_run("knn", run, test_file, labelled(train_file), device)["knn"]


def top1_of_run(run: Run, test_file: BetonFile, device: torch.device) -> Score:
    """top1, top5 and the other figures of a fine-tuned run; all ranks share the work."""
    return _of_run("top1", run, test_file, None, device)


def _of_run(
    kind: str, run: Run, query: BetonFile, bank: BetonFile | None, device: torch.device
) -> dict[str, Any]:
    task = Task(open_model(str(run.path)), query, bank, device)
    measured = measure(kind, task)
    if dist.is_main():
        for note in _kept(kind, task, measured).score["notes"]:
            say(note)
    return measured.numbers


def evaluated(
    kind: str,
    name: str,
    data: str | None = None,
    bank: str | None = None,
    *,
    knn_k: tuple[int, ...] = (),
) -> Evaluation:
    """Open one model and the files, evaluate, and keep what was found; words and errors as of `evaluate`.

    Args:
        knn_k: numbers of neighbours beside those of the run's settings.
    """
    model = open_model(name)
    settings = model.settings.data
    query = _labelled("data", data, (settings.test,) if settings.test else (), "test")
    neighbours = None
    if kind != "top1":
        neighbours = _labelled("bank", bank, settings.train_files, "train")
        require_same_classes(neighbours, query)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = Task(model, query, neighbours, device, knn_k=knn_k)
    return _kept(kind, task, measure(kind, task))


def _labelled(argument: str, given: str | None, of_run: tuple[str, ...], half: str) -> BetonFile:
    """The labelled images of the file that an argument names, or of the run's own, which may be several.

    Raises: DataError if there is none, it cannot be read, or it has no labels.
    """
    if not given and not of_run:
        what = "images to evaluate" if argument == "data" else "labelled images to learn from"
        raise DataError(f"no {what}: give `{argument}=FILE.beton`, for the run names none")
    file = named_file(argument, given, of_run, half)
    if not file.manifest.classes or not (file.labels >= 0).any():
        raise DataError(
            f"{file.path} has no labels, and an evaluation needs them: build it from a folder with one "
            "folder a class"
        )
    return labelled(file)


def _kept(kind: str, task: Task, measured: Measured) -> Evaluation:
    """What was found, written into the run's analysis where there is a run."""
    model, query, bank = task.model, task.query, task.bank
    if bank is not None and bank.manifest.content_hash == query.manifest.content_hash:
        task.notes.append(f"{query.path} is data and bank: each image finds itself")
    score = {
        "kind": kind,
        "model": model.name,
        "data": str(query.path),
        "images": len(measured.lines[0].value_M),
        **measured.numbers,
        **measured.details,
        "data_hash": query.manifest.content_hash,
        **({} if bank is None else {"bank": str(bank.path), "bank_hash": bank.manifest.content_hash}),
        "weights": model.weights,
        "classes": list(query.manifest.classes),
        "notes": task.notes,
    }
    if model.analysis is not None:
        name = kind + _suffix(task)
        files = {f"{name}.json": json.dumps(score, ensure_ascii=False, allow_nan=False).encode()}
        if measured.answers is not None:
            files[f"{name}-images.safetensors"] = _image_by_image(measured, score)
        task.notes.extend(model.keep(files))
    return Evaluation(score, measured.lines)


def _suffix(task: Task) -> str:
    """Nothing for the run's own files; else what keeps the result on other images from replacing theirs."""
    run = task.model.run
    known = known_inputs(run, task.model.settings)
    used = {"data.test": task.query, "data.train": task.bank}
    hashes = {key: file.manifest.content_hash for key, file in used.items() if file is not None}
    # A run of before inputs.json does not know its files; one without a test file has none of its own.
    knows = (run.path / "inputs.json").exists()
    is_own = all(known.get(key, None if knows else content) == content for key, content in hashes.items())
    return "" if is_own else "".join(f"-{content[-12:]}" for content in hashes.values())


def _image_by_image(measured: Measured, score: Score) -> bytes:
    """Each image's number in the .beton, its class, the predicted one and its probability."""
    answers = measured.answers
    columns = {
        "index": measured.index_M,
        "label": answers.label_M,
        "predicted": answers.predicted_M,
        "probability": answers.probability_M.astype(np.float32),
    }
    about = {"data_hash": score["data_hash"]}
    return save({name: np.ascontiguousarray(column) for name, column in columns.items()}, about)
