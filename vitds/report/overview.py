"""What a run's small files say, in the words and numbers of its page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from typing import Any

from vitds.config.load import dump_settings
from vitds.config.methods import METHODS
from vitds.report.lines import Line, chart
from vitds.runs.directory import Run, read_json

Json = dict[str, Any]
KNN_K = "20"  # fixed beforehand: to choose the best number of neighbours would be to choose on test data
MANY_CLASSES = 20  # of more, a matrix of confusions is no picture


def overview(run: Run, pictures: Json) -> Json:
    """All facts above the pictures.

    Args:
        run: finished.
        pictures: of jobs/gallery.py, or `missing` with the reason.
    Raises: RunError if a file of the run cannot be read.
    """
    settings, summary = run.settings, run.summary
    scores = evaluations(run)
    data = pictures.get("data", {})
    command = METHODS[settings.method].command
    return {
        "name": str(run.path),
        "command_name": command,
        "lead": _lead(run, data),
        "result": result(summary),
        "evaluations": [row for score in scores for row in figure_rows(score)] or _of_summary(summary),
        "command": _command(run, command),
        "facts": _facts(run, summary, data),
        "data": data,
        "settings": dump_settings(settings),
        "details": _details(scores),
    }


def evaluations(run: Run) -> list[Json]:
    """What `vitds eval` and the end of the run left in RUN/analysis."""
    kinds = ("top1", "knn", "linear", "fewshot", "retrieval")
    found = []
    for path in sorted((run.path / "analysis").glob("*.json")):
        if path.stem.partition("-")[0] in kinds:
            found.append(read_json(path) | {"is_own": path.stem in kinds})
    return sorted(found, key=lambda score: (not score["is_own"], kinds.index(score["kind"])))


def result(summary: Json) -> Json | None:
    """The figure that a run is judged by; None of one that was not evaluated."""
    if knn := summary.get("knn"):
        k = chosen_k(knn)
        return knn[k] | {"what": f"kNN (k = {k})"}
    return summary | {"what": "top-1"} if "top1" in summary else None


def chosen_k(numbers: Collection[str]) -> str | None:
    """Of several numbers of neighbours the one that counts: KNN_K, else the fewest; None of none."""
    return KNN_K if KNN_K in numbers else min(numbers, key=int, default=None)


def figure_rows(score: Json) -> list[Json]:
    """The lines of one evaluation: `name`, `data`, `main` and what else it has."""
    kind, data = score["kind"], None if score["is_own"] else score["data"]
    if kind == "retrieval":
        rows = [("retrieval, mAP", score | {"main": score["map"], "interval": score["map_interval"]})]
    elif kind in ("knn", "fewshot"):
        text = "kNN, k = {}" if kind == "knn" else "few-shot, {} a class"
        rows = [(text.format(key), part) for key, part in score[kind].items()]
    else:
        rows = [({"top1": "class head, top-1", "linear": "linear classifier"}[kind], score)]
    return [
        {"main": part.get("top1"), "interval": part.get("top1_interval"), **part}
        | {"name": name, "data": data}
        for name, part in rows
    ]


def _of_summary(summary: Json) -> list[Json]:
    """The same of a run from before analyses were kept."""
    kind = "knn" if "knn" in summary else "top1"
    return figure_rows(summary | {"kind": kind, "is_own": True}) if kind in summary else []


def _lead(run: Run, data: Json) -> str:
    settings = run.settings
    images = f"{data['train']['images']:,} images" if data else "images"
    needs_classes = METHODS[settings.method].command == "finetune"
    verb = "pretrained" if not needs_classes else "fine-tuned" if settings.init else "trained"
    classes = data["train"]["classes"] if data else 0
    of_classes = f" of {classes:,} classes" if classes and needs_classes else ""
    start = f", from the weights of {settings.init}" if settings.init else ", from random weights"
    epochs = f"{settings.epochs:,} epoch{'s' * (settings.epochs != 1)}"
    return (
        f"{settings.backbone.name}, {verb} (method {settings.method}) for {epochs} on {images}{of_classes} "
        f"({settings.data.train_text}){start}."
    )


def _command(run: Run, command: str) -> str:
    """What trains the same run again: its settings are a recipe with every value in it."""
    environment = read_json(run.path / "environment.json")
    ranks, stage = environment.get("ranks", 1), environment.get("zero_stage", 0)
    start = f"vitds {command}" if ranks == 1 else f"deepspeed --num_gpus {ranks} launch/{command}.py"
    words = ["--recipe", str(run.path / "settings.yaml"), "--run", f"{run.path}-again"]
    return shlex.join([*start.split(), *words, *(["--ds_config", f"zero{stage}"] if stage else [])])


def _facts(run: Run, summary: Json, data: Json) -> list[tuple[str, str]]:
    settings, environment = run.settings, read_json(run.path / "environment.json")
    machine, versions = environment.get("machine", {}), environment.get("versions", {})
    device = machine.get("cuda") or f"{machine.get('cores')} cores, {machine.get('vector_width')}"
    ranks = environment.get("ranks", 1)
    batch, views = settings.batch, settings.views
    facts = [
        ("method", f"{settings.method}: {METHODS[settings.method].command}"),
        ("backbone", settings.backbone.name),
        ("steps", f"{summary['steps']:,} of {batch.global_images} images, {summary['epochs']:,} epochs"),
        ("crops", f"{views.count} an image, {views.crop_px} pixels a side"),
        ("seed", str(settings.seed)),
        ("seconds", f"{summary['seconds']:,.0f}"),
        ("hardware", f"{environment.get('device')}: {device}; {ranks} rank{'s' * (ranks != 1)}"),
        ("precision", settings.engine.precision),
        (
            "software",
            ", ".join(f"{name} {versions[name]}" for name in ("vitds", "torch", "timm") if name in versions),
        ),
        ("commit", environment.get("commit") or "not from a checkout"),
    ]
    if summary.get("skipped"):
        facts.append(("steps skipped", f"{summary['skipped']}, as they were not finite"))
    if damaged := summary.get("damaged_images"):
        facts.append(("images left out", f"{len(damaged)}, as they could not be decoded"))
    if data:
        facts.append(("content", f"training {data['train']['content'][:19]}"))
    return facts


def _details(scores: list[Json]) -> Json | None:
    """Each class, confusions and reliability, of the class head, else of nearest neighbours, else linear.

    On the run's own test images; of a run without any on those that it was evaluated on.
    """
    shown = [score for score in scores if score["is_own"]] or scores
    for kind in ("top1", "knn", "linear"):
        for score in shown:
            if score["kind"] != kind:
                continue
            parts = score.get("details", {})
            k = chosen_k(parts)
            part = score if kind != "knn" else parts.get(k, {})
            if "per_class" in part:
                what = {"top1": "the class head", "knn": f"kNN (k = {k})", "linear": "the linear classifier"}[
                    kind
                ]
                return {
                    "of": what if score["is_own"] else f"{what} on {score['data']}",
                    "per_class": part["per_class"],
                    "matrix": _matrix(part["confusion"], score["classes"]),
                    "classes": score["classes"],
                    "reliability": _reliability(part.get("reliability")),
                }
    return None


def _matrix(confusion: list[list[int]], classes: list[str]) -> list[list[int]] | None:
    """(C, C) images, a row a right class; None of many classes."""
    if len(classes) > MANY_CLASSES:
        return None
    matrix = [[0] * len(classes) for _ in classes]
    for right, predicted, images in confusion:
        matrix[right][predicted] = images
    return matrix


def _reliability(bins: list[Json] | None) -> Json | None:
    if not bins:
        return None
    full = [each for each in bins if each["images"]]
    lines = [
        Line("measured", [each["confidence"] for each in full], [each["accuracy"] for each in full]),
        Line("perfect", [0.0, 100.0], [0.0, 100.0]),
    ]
    title = "Accuracy (%) over the probability that the answers were given with (%)"
    return {"svg": chart(title, "probability of the answer, %", lines, square=True), "bins": full}


def settings_leaves(settings: Json, prefix: str = "") -> Json:
    """Dotted key -> value of a settings tree, lists as they are."""
    leaves: Json = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            leaves |= settings_leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def shown(value: Any) -> str:
    """A setting's value in a table."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
