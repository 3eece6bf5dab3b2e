"""Make a row of docs/results.md of finished runs, and write the page again:

    python docs/results/add.py RUN [RUN ...] --row NAME --split held-out|test [--title TEXT] [--table NAME]
        [--seconds S]

The runs differ in their seed alone and are the last stage of each seed; those that they began from are found
by their settings. What they reached is read from RUN/analysis, and stored in docs/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

from docs.results.render import ALL_TRAINING, FOLDER, PAGE, page
from vitds.config.load import load_settings
from vitds.config.methods import METHODS, readers
from vitds.config.recipes import list_recipes, read_recipe
from vitds.config.tree import Settings
from vitds.data.catalogue import CATALOGUE
from vitds.errors import UsageError, VitdsError
from vitds.evaluate.bootstrap import interval_of_mean
from vitds.jobs.experiment import RECORD
from vitds.jobs.result_rows import ROW_JSON, Row, RowFigure, RowStage, read_row
from vitds.report.overview import settings_leaves
from vitds.runs.directory import Run, read_json
from vitds.runs.metrics import read_metrics

LOSSES = 20  # of a stage
SPLITS = ("held-out", "test")
# What a stage is called and where it reads, what a machine decides, and what changes no number.
OF_NO_RECIPE = (
    "seed",
    "epochs",
    "init",
    *("data.train", "data.test", "data.workers"),
    *("engine.compile", "engine.attention", "engine.deterministic", "engine.activation_checkpointing"),
    *("checkpoint.", "log."),
    *("eval.batch_images", "eval.knn_k"),
    "batch.micro_images",
)


def row_of(
    runs: list[Run], name: str, split: str, *, title: str | None, table: str | None, seconds: float | None,
    folder: Path = FOLDER
) -> Row:  # fmt: skip
    """The row, with what its file already holds of the other split.

    Args:
        runs: of the last stage, one a seed.
        name: of the row.
        split: held-out or test.
        title: as the page has it; by default that of the file, or the name.
        table: of the page; likewise.
        seconds: of one seed; by default those of the runs' summaries.
        folder: of the rows.
    Raises: UsageError for runs of other settings, of toy length, or on other images than the split's.
    """
    for run in runs:
        _refuse_toy(run)
    chains = [_chain(run) for run in runs]
    stages = [tuple(_stage(run, split) for run in chain) for chain in chains]
    if different := [run for run, own in zip(runs, stages, strict=True) if own != stages[0]]:
        raise UsageError(
            f"{different[0].path} has other settings than {runs[0].path}; a row is of one setting"
        )
    seeds = [run.settings.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"two runs have one seed: {seeds}")
    path = folder / f"{name}.json"
    before = read_row(path) if path.exists() else None
    kept = before if before and _settings(before.stages) == _settings(stages[0]) else None
    took = np.mean([sum(run.summary["seconds"] for run in chain) for chain in chains])
    figures = {"held_out": kept and kept.held_out, "test": kept and kept.test}
    set_name = before.set if before else "flowers102"
    figures[split.replace("-", "_")] = _figure(runs, split, CATALOGUE[set_name].counts["test"])
    return Row(
        title=title or (before.title if before else name),
        table=table or (before.table if before else "more rows"),
        set=set_name,
        side=read_json(runs[0].path / "data.json")["side_px"],
        stages=stages[0],
        seconds=round(float(took if seconds is None else seconds)),
        losses=tuple(_losses(run) for run in chains[0]),
        **figures,
    )


def _refuse_toy(run: Run) -> None:
    for folder in run.path.absolute().parents:
        if (folder / RECORD).exists() and read_json(folder / RECORD)["asked"].get("toy"):
            raise UsageError(f"{run.path} is of toy length, and no result")


def _chain(run: Run) -> list[Run]:
    """The run and those that it began from, the first one first."""
    chain = [run]
    while (init := chain[0].settings.init) is not None:
        chain.insert(0, Run(Path(init)))
    return chain


def _stage(run: Run, split: str) -> RowStage:
    """The packaged recipe that is nearest to a run's settings, and what differs."""
    settings = run.settings
    own = [name for name, _ in list_recipes() if read_recipe(name)["method"] == settings.method]
    words = {name: _differing(name, settings) for name in own}
    recipe = min(own, key=lambda name: len(words[name]))
    file = " + ".join(Path(name).name for name in settings.data.train_files)
    data = file if split == "held-out" and file != ALL_TRAINING else None
    return RowStage(METHODS[settings.method].command, recipe, settings.epochs, tuple(words[recipe]), data)


def _settings(stages: tuple[RowStage, ...]) -> list[RowStage]:
    """The stages without the names of files, which differ between the splits."""
    return [replace(stage, data=None) for stage in stages]


def _differing(recipe: str, settings: Settings) -> list[str]:
    """KEY=VALUE of each setting that the recipe does not give; the backbone is that of --init."""
    of_recipe, of_run = (
        settings_leaves(each.model_dump(mode="json"))
        for each in (load_settings(recipe=recipe, command=None, flags={}), settings)
    )
    left_out = (*OF_NO_RECIPE, *(("backbone.name", "backbone.options") if settings.init else ()))
    if settings.eval.choose == "last":  # how often it was measured decides nothing then
        left_out += ("eval.every_epochs",)
    return [
        f"{key}={json.dumps(value)}"
        for key, value in of_run.items()
        if not key.startswith(left_out)
        and settings.method in readers(key)
        and of_recipe.get(key) not in (value, "auto")
    ]


def _losses(run: Run) -> tuple[float, ...]:
    losses = [line["loss"] for line in read_metrics(run.metrics)]
    parts = np.array_split(losses, min(LOSSES, len(losses)))
    return tuple(round(float(part.mean()), 4) for part in parts)


def _figure(runs: list[Run], split: str, test_images: int) -> RowFigure:
    """Top-1 of the runs, image by image."""
    scores = [read_json(run.path / "analysis" / "top1.json") for run in runs]
    if len({score["data_hash"] for score in scores}) > 1:
        raise UsageError("the runs were evaluated on different images")
    if (scores[0]["images"] == test_images) != (split == "test"):
        raise UsageError(
            f"{runs[0].path} was evaluated on {scores[0]['images']:,} images, the official test images are "
            f"{test_images:,}: so these are not {split} figures"
        )
    answers = [load_file(run.path / "analysis" / "top1-images.safetensors") for run in runs]
    right_RM = np.array([each["label"] == each["predicted"] for each in answers], float)
    top1_R = 100 * right_RM.mean(1)
    low, high = interval_of_mean(right_RM.mean(0))
    # The page has one decimal: rounded to two here, some numbers would be rounded wrongly there.
    return RowFigure(
        tuple(run.settings.seed for run in runs),
        round(float(top1_R.mean()), 4),
        round(float(top1_R.std(ddof=1)), 4) if len(runs) > 1 else None,
        (round(100 * low, 4), round(100 * high, 4)),
        round(scores[0]["majority"], 4),
        tuple(round(float(top1), 4) for top1 in top1_R),
    )


def main(argv: list[str] | None = None) -> None:
    """See the file."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("runs", nargs="+", metavar="RUN")
    words.add_argument("--row", required=True)
    words.add_argument("--split", required=True, choices=SPLITS)
    words.add_argument("--title")
    words.add_argument("--table")
    words.add_argument("--seconds", type=float, help="of one seed, in place of the runs' own")
    given: Any = words.parse_args(argv)
    runs = [Run(Path(name)) for name in given.runs]
    options = {"title": given.title, "table": given.table, "seconds": given.seconds}
    try:
        row = row_of(runs, given.row, given.split, **options)
    except VitdsError as error:
        sys.exit(str(error))
    path = FOLDER / f"{given.row}.json"
    path.write_text(
        json.dumps(ROW_JSON.dump_python(row, mode="json"), indent=2, ensure_ascii=False) + "\n", "utf-8"
    )
    PAGE.write_text(page(), "utf-8")
    print(f"{path}\n{PAGE}")


if __name__ == "__main__":
    main()
