"""`vitds transfer RUN …`: what features learned on one set of images are worth on others.

A matrix of sources and targets: kNN and linear classifier on the source's features, and fine-tuning from its
weights. The first source is a network of the same kind with random weights.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vitds.config.experiment_flags import TransferFlags
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.digits import NAME as DIGITS
from vitds.errors import DataError, RunError, UsageError
from vitds.jobs.compare import group_of
from vitds.jobs.data_files import open_file
from vitds.jobs.experiment import (
    OF_PRETRAINING,
    Arm,
    Experiment,
    Json,
    asked_for,
    begun_or_new,
    carry_out,
    planned_training,
    print_plan,
    refuse_words,
    with_backbone,
    write_plan,
)
from vitds.jobs.experiment_result import ABOUT, figure_text, figures, print_table
from vitds.jobs.report import PAGE, write_experiment_report
from vitds.models.build import build_backbone
from vitds.report.heat_map import draw_heat_maps
from vitds.report.page import ResultTable
from vitds.runs.backbone import save_weights
from vitds.runs.directory import Run, content_of_weights, read_json, save_settings, write_atomic, write_json
from vitds.terminal import say
from vitds.use.tables import no_formula

RANDOM = "random"
MEASURES = {"knn": "kNN", "linear": "linear", "finetuned": "fine-tuned"}
# Short side of a target's images, in crops of the source: beyond, a crop is a blur or a speck of an image.
SIDE_IN_CROPS = (0.5, 16.0)


@dataclass(frozen=True)
class Source:
    """Weights to begin from.

    Attributes:
        name: of its folders.
        title: as tables have it.
        runs: that differ in their seed alone.
        settings: of the first of them.
    """

    name: str
    title: str
    runs: tuple[str, ...]
    settings: Settings


@dataclass(frozen=True)
class Target:
    """A training and a test file.

    Attributes:
        name: of both, without -train and -test.
        train: its training images.
        test: its test images.
    """

    name: str
    train: BetonFile
    test: BetonFile


def run_transfer(runs: Sequence[str], flags: TransferFlags) -> Json | None:
    """Fill the matrix and print it.

    Args:
        runs: finished; those whose names differ in their seed alone are one source.
        flags: of the command line.
    Returns: what OUT/transfer.json holds; None of a plan.
    Raises: UsageError for a source or target given twice; RunError for a run that is not finished, or if
        `out` holds something else; DataError for targets that cannot be used; SettingsError for the recipe.
    """
    refuse_words(
        "set",
        flags.set,
        {"data.train": "--to names the images", "data.test": "--to names the images", **OF_PRETRAINING},
    )
    targets = _targets(flags.to)
    out = Path(flags.out).expanduser()
    sources = _sources(runs, out, flags.seeds)
    for source in sources:
        for target in targets:
            _check_sizes(source, target)
    files = [file for target in targets for file in (target.train, target.test)]
    weights = [content_of_weights(str(Path(run).expanduser())) for run in runs]
    asked = asked_for(flags, files) | {"runs": list(runs), "weights": weights}
    experiment = begun_or_new(
        "transfer", flags.out, flags.seeds, asked, lambda: _arms(sources, targets, flags)
    )
    # More seeds than at the first call begin from more random networks.
    inits = [source.runs for _ in targets for source in sources]
    arms = tuple(replace(arm, init=init) for arm, init in zip(experiment.arms, inits, strict=True))
    experiment = replace(experiment, arms=arms)
    if flags.plan:
        print_plan(experiment)
        return None
    write_plan(experiment)
    for source in sources:
        _write_random(source)
    carry_out(experiment)
    result = _result(experiment, sources, targets)
    _report(experiment, result)
    return result


def _targets(names: Sequence[str]) -> list[Target]:
    """Raises: UsageError for a name without -train, or one that comes twice; DataError for missing files."""
    found: dict[str, Target] = {}
    for name in (str(Path(each).expanduser()) for each in names):
        short = Path(name).name.removesuffix("-train.beton")
        if name != DIGITS and short == Path(name).name:
            raise UsageError(
                f"`to={name}`: a target is NAME-train.beton, with NAME-test.beton beside it, as `vitds data "
                "build` writes them"
            )
        if short in found:
            raise UsageError(f"`to={name}`: there is another target {short}; give each once, by its own name")
        test = name if name == DIGITS else name.removesuffix("-train.beton") + "-test.beton"
        found[short] = Target(short, open_file(name, "--to", "train"), open_file(test, "--to", "test"))
    return list(found.values())


def _sources(names: Sequence[str], out: Path, seeds: int) -> list[Source]:
    """Random weights of each network, then the runs, by groups.

    Raises: UsageError for a run given twice, or more runs of a source than seeds; RunError for one that
        is not finished.
    """
    paths = [str(Path(name).expanduser()) for name in names]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UsageError(f"{twice[0]} is given {paths.count(twice[0])} times; leave one")
    groups: dict[str, list[str]] = {}
    for path in paths:
        if not Run(Path(path)).is_finished:
            raise RunError(f"{path} is no finished run; transfer begins from runs that are done")
        groups.setdefault(group_of(path), []).append(path)
    given, networks, titles = [], {}, _short_names(list(groups))
    for number, (group, runs) in enumerate(groups.items(), 1):
        if len(runs) > max(seeds, 1):
            raise UsageError(
                f"`seeds={seeds}`: {group} has {len(runs)} runs; give as many seeds, or fewer runs"
            )
        settings = Run(Path(runs[0])).settings
        given.append(Source(f"{number}-{Path(group).name}", titles[group], tuple(runs), settings))
        networks.setdefault(json.dumps([settings.backbone.name, settings.backbone.options]), given[-1])
    random, names = [], [source.settings.backbone.name for source in networks.values()]
    for number, source in enumerate(networks.values(), 1):
        name, title, own = RANDOM, RANDOM, source.settings.backbone.name
        if len(networks) > 1:  # one timm name may be two networks, by its options
            name, title = f"{RANDOM}-{number}", f"{RANDOM} {source.title if names.count(own) > 1 else own}"
        runs = tuple(str(out / name / f"source-seed{seed}") for seed in range(seeds))
        random.append(Source(name, title, runs, source.settings))
    return [*random, *given]


def _short_names(groups: Sequence[str]) -> dict[str, str]:
    """Each path by as few of its last parts as tell all apart, and from `random`; a table has no room for
    more."""
    whole = {group: Path(group).absolute().parts for group in groups}
    for count in range(1, max(map(len, whole.values())) + 1):
        names = {group: "/".join(parts[-count:]) for group, parts in whole.items()}
        if len({RANDOM, *names.values()}) > len(groups):
            return names
    return {group: group for group in groups}


def _check_sizes(source: Source, target: Target) -> None:
    """Raises: DataError if images of a target are of another kind than a source's: far too small or large."""
    crop_px = source.settings.views.crop_px
    low, high = SIDE_IN_CROPS
    for file in (target.train, target.test):
        side_px = file.typical_side_px
        if not low <= side_px / crop_px <= high:
            raise DataError(
                f"{file.path}: its images have {side_px} pixels on their short side, and {source.title} "
                f"sees crops of {crop_px}: they are of another kind. Give a target with {low * crop_px:.0f} "
                f"to {high * crop_px:.0f} pixels"
            )


def _arms(sources: Sequence[Source], targets: Sequence[Target], flags: TransferFlags) -> list[Arm]:
    """A fine-tuning from each source on each target."""
    arms = []
    for target in targets:
        files = {"data": str(target.train.path), "test": str(target.test.path), "epochs": flags.epochs}
        tuned = load_settings(recipe=flags.recipe, command="finetune", assignments=flags.set, flags=files)
        for source in sources:
            training = planned_training("finetune", with_backbone(tuned, source.settings, "set", flags.set))
            name, title = f"{source.name}--{target.name}", f"{source.title} to {target.name}"
            arms.append(Arm(name, title, (training,), source.runs))
    return arms


def _write_random(source: Source) -> None:
    """Runs whose weights are those of a training before its first step; nothing for other sources."""
    for seed, path in enumerate(source.runs):
        run = Run(Path(path))
        if not source.name.startswith(RANDOM) or run.backbone.exists():
            continue
        run.path.mkdir(parents=True, exist_ok=True)
        settings = source.settings.model_copy(update={"seed": seed, "init": None})
        save_settings(run, settings)
        backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=seed)
        save_weights(run.backbone, backbone.state_dict())


def _result(experiment: Experiment, sources: Sequence[Source], targets: Sequence[Target]) -> Json:
    """What OUT/transfer.json holds: found before, or measured now."""
    path = experiment.out / "transfer.json"
    if path.exists() and (before := read_json(path)).get("seeds") == experiment.seeds:
        return before
    tuned = experiment.runs("finetune")
    given = {source.title: list(source.runs) for source in sources}
    cells = []
    for target in targets:
        data, bank = str(target.test.path), str(target.train.path)
        found = {kind: figures(kind, given, data, bank) for kind in ("knn", "linear")}
        own = {source.title: tuned[f"{source.title} to {target.name}"] for source in sources}
        found["finetuned"] = figures("top1", own)
        cells += [
            {"source": source.title, "target": target.name}
            | {key: of_source[source.title] for key, of_source in found.items()}
            for source in sources
        ]
    training = experiment.arms[0].trainings[0]
    result = {
        "experiment": experiment.kind,
        "asked": dict(experiment.asked),
        "seeds": experiment.seeds,
        "budget": {"recipe": experiment.asked["recipe"], "epochs": training.settings.epochs},
        "sources": [source.title for source in sources],
        "targets": [target.name for target in targets],
        "cells": cells,
    }
    write_json(path, result)
    return result


def transfer_columns(result: Json) -> tuple[list[str], list[list[str]]]:
    """The matrix as text: headings, and a row a measure and source."""
    cells = {(cell["source"], cell["target"]): cell for cell in result["cells"]}
    rows = [
        [f"{title}: {source}", *(figure_text(cells[source, target][key]) for target in result["targets"])]
        for key, title in MEASURES.items()
        for source in result["sources"]
    ]
    return ["", *result["targets"]], rows


def _report(experiment: Experiment, result: Json) -> None:
    """Print the matrix; write CSV, heat maps and page."""
    cells = {(cell["source"], cell["target"]): cell for cell in result["cells"]}
    means = {
        title: [
            [cells[source, target][key]["mean"] for target in result["targets"]]
            for source in result["sources"]
        ]
        for key, title in MEASURES.items()
    }
    picture = draw_heat_maps(means, result["sources"], result["targets"])
    budget = f"fine-tuned by {result['budget']['recipe']} for {result['budget']['epochs']} epochs"
    caption = f"{budget}, {result['seeds']} seed{'s' * (result['seeds'] != 1)}"
    table = ResultTable("Transfer", caption, *transfer_columns(result), [ABOUT], picture)
    print_table(table)
    write_atomic(experiment.out / "transfer.png", picture)
    _write_csv(experiment.out / "transfer.csv", result)
    say(f"{experiment.out / 'transfer'}.json, .csv, .png")
    runs = [str(stage.run) for stage in experiment.stages]
    drawn = [run for run in runs if run.endswith("-seed0")]
    write_experiment_report(table, runs, drawn, experiment.out / PAGE)


def _write_csv(path: Path, result: Json) -> None:
    """A row a source, target, measure and run."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["source", "target", "measure", "run", "top1", "low", "high"])
    for cell in result["cells"]:
        for key in MEASURES:
            for run in cell[key]["runs"]:
                numbers = [run["run"], run["top1"], *run["interval"]]
                table.writerow(map(no_formula, [cell["source"], cell["target"], key, *numbers]))
    write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
