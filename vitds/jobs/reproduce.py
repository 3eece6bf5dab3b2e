"""`vitds reproduce NAME`: a row of docs/results.md again, from the published files to the table.

The row itself is data: docs/results/NAME_gpu.json and NAME_cpu.json (result_rows.py).
"""

from __future__ import annotations

import shutil
import time
from datetime import datetime, timedelta
from pathlib import Path

import torch

from vitds.config.experiment_flags import ReproduceFlags
from vitds.config.load import load_settings
from vitds.config.names import did_you_mean
from vitds.data.beton import BetonFile, open_beton
from vitds.data.build import BuildOptions, build_set
from vitds.data.catalogue import CATALOGUE
from vitds.data.findings import Findings
from vitds.data.manifest import manifest_path
from vitds.data.published import published_images
from vitds.data.sampling import Sample, draw_sample
from vitds.data.split import with_suffix
from vitds.errors import DataError, ResourceError, RunError, UsageError
from vitds.jobs import result_rows
from vitds.jobs.data import print_built
from vitds.jobs.experiment import (
    DATA,
    Arm,
    Experiment,
    Json,
    Training,
    asked_for,
    begun_or_new,
    carry_out,
    check_folder,
    check_seeds,
    planned_training,
    print_plan,
    training_speed,
)
from vitds.jobs.experiment_result import Measure, report, result_of
from vitds.jobs.plan import peak_bytes
from vitds.jobs.result_rows import Row, read_row, stored_text
from vitds.plan.totals import GB
from vitds.runs.directory import STATES_BYTES, Run
from vitds.terminal import say

TOY = (
    "This is of toy length, one epoch on two images a class: it shows that all stages run, and is no result."
)
TOY_IMAGES = 2  # of a class


def run_reproduction(name: str, flags: ReproduceFlags) -> Json | None:
    """Build, train, evaluate on the official test images, and print the result beside the stored row.

    Args:
        name: of the result, as `flowers`.
        flags: of the command line.
    Returns: what OUT/reproduction.json holds; None of a plan.
    Raises: UsageError for an unknown name; ResourceError without a GPU where the row needs one; DataError if
        the published files are not there or not those; RunError if `out` holds something else.
    """
    check_seeds(flags.seeds)
    row_name, row = _row(name, flags.cpu)
    if not (flags.cpu or flags.toy or torch.cuda.is_available()):
        raise ResourceError(
            f"the row {row_name} needs a CUDA device, and torch finds none here. `cpu` makes the row of a "
            "CPU, `toy` tries this one at toy length"
        )
    out = Path(flags.out or Path("runs") / row_name).expanduser()
    check_folder(out)
    train, test = _data(out / DATA, row, flags)
    # The title too: a later version may hold another row by this name.
    asked = asked_for(flags, [train, test]) | {"row": row_name, "title": row.title}
    experiment = begun_or_new(
        "reproduction", str(out), flags.seeds, asked, lambda: [_arm(row_name, row, train, test, flags.toy)]
    )
    if flags.toy:
        say(TOY)
    _say_needs(experiment, train, test, on_gpu=not flags.cpu)
    if flags.plan:
        print_plan(experiment)
        return None
    _say_end(experiment, test)
    carry_out(experiment)
    last = experiment.arms[0].trainings[-1].name
    result = result_of(experiment, [Measure("test", "test", "top1", last)])
    notes = [TOY] if flags.toy else [f"Stored row: {stored_text(row)}.", *_verdict(row, result)]
    report(experiment, result, f"{row.title}{' (toy length)' * flags.toy}", notes=notes)
    return result


def _verdict(row: Row, result: Json) -> list[str]:
    """Whether it came out, in a line; nothing to say of a row that was not measured."""
    if row.test is None:
        return []
    (arm,) = result["arms"]
    found, (low, high) = arm["test"], row.test.interval
    seeds = ", ".join(f"{run['top1']:.1f}" for run in found["runs"])
    overlap = found["interval"][0] <= high and found["interval"][1] >= low
    met = "the intervals overlap: it came out again" if overlap else "the intervals do not overlap"
    return [
        f"Seed by seed: {seeds} %.",
        f"This is {found['mean'] - row.test.mean:+.1f} points from it, and {met}. Seeds repeat to the bit on "
        "one machine; another processor rounds otherwise.",
    ]


def _row(name: str, on_cpu: bool) -> tuple[str, Row]:
    """Raises: UsageError if there is none of that name (names the nearest)."""
    ending = "_cpu" if on_cpu else "_gpu"
    known = {path.stem.removesuffix(ending): path for path in result_rows.ROWS.glob(f"*{ending}.json")}
    if name not in known:
        raise UsageError(f"{name} is no result that can be made again; {did_you_mean(name, known)}")
    return known[name].stem, read_row(known[name])


def _data(folder: Path, row: Row, flags: ReproduceFlags) -> tuple[BetonFile, BetonFile]:
    """The training and the test file, built once."""
    halves = {half: with_suffix(folder / f"{row.set}.beton", half) for half in ("train", "test")}
    for half, path in halves.items():
        if path.exists():
            _require_same(open_beton(path), row, half, is_toy=flags.toy)
            continue
        began, findings = time.monotonic(), Findings()
        folder.mkdir(parents=True, exist_ok=True)
        images = published_images(row.set, flags.source, half, findings, folder / "published")
        if flags.toy:
            images = draw_sample(images, Sample(per_class=TOY_IMAGES))
        built = build_set(images, path, BuildOptions(side_px=row.side, show_progress=True), findings)
        print_built(built, time.monotonic() - began)
        _require_all(open_beton(path), row, half, is_toy=flags.toy)
    return open_beton(halves["train"]), open_beton(halves["test"])


def _images_of(file: BetonFile, row: Row, half: str, *, is_toy: bool) -> int:
    return TOY_IMAGES * len(file.manifest.classes) if is_toy else CATALOGUE[row.set].counts[half]


def _require_all(file: BetonFile, row: Row, half: str, *, is_toy: bool) -> None:
    """Raises: DataError if images of a file that was just built could not be used; the file is removed."""
    wanted = _images_of(file, row, half, is_toy=is_toy)
    if file.images != wanted:
        for path in (file.path, manifest_path(file.path)):
            path.unlink()
        raise DataError(
            f"{file.path}: {file.images:,} of {wanted:,} images can be used; the others are listed above. "
            "The row is of all: fetch the published files again"
        )


def _require_same(file: BetonFile, row: Row, half: str, *, is_toy: bool) -> None:
    """Raises: RunError if a file was built for another row, or for the same one at another length."""
    wanted = _images_of(file, row, half, is_toy=is_toy)
    if (file.images, file.manifest.side_px) != (wanted, row.side):
        raise RunError(
            f"{file.path} has {file.images:,} images of side {file.manifest.side_px}, and this row takes "
            f"{wanted:,} of side {row.side}{' at toy length' * is_toy}: it was built for another one. Choose "
            "another `out`."
        )


def _arm(name: str, row: Row, train: BetonFile, test: BetonFile, is_toy: bool) -> Arm:
    """The row's stages on these files."""
    trainings: list[Training] = []
    for stage in row.stages:
        flags = {"data": str(train.path), "test": str(test.path), "epochs": 1 if is_toy else stage.epochs}
        settings = load_settings(
            recipe=stage.recipe, command=stage.command, assignments=stage.set, flags=flags
        )
        is_second = any(stage.command == before.name for before in trainings)
        own = f"{stage.command}-{settings.views.crop_px}" if is_second else stage.command
        trainings.append(planned_training(own, settings))
    return Arm("runs", name, tuple(trainings))


def _say_needs(experiment: Experiment, train: BetonFile, test: BetonFile, *, on_gpu: bool) -> None:
    """What the row takes of this machine, and what would make its figure another one."""
    trainings = experiment.arms[0].trainings
    classes = len(train.manifest.classes)
    peaks = [peak_bytes(training.settings, training.images, classes) for training in trainings]
    weights = max(peak.weights for peak in peaks)
    kept = max(training.settings.checkpoint.keep for training in trainings) + 1
    disk = STATES_BYTES * weights * kept * len(experiment.stages)
    if on_gpu:
        needs = max(peak.bytes for peak in peaks) / GB
        say(f"card: {needs:.1f} GB by the arithmetic of `vitds plan`, with the smallest micro batch")
    free = shutil.disk_usage(experiment.out if experiment.out.exists() else train.path.parent).free
    say(f"disk: at most {disk / GB:.1f} GB of checkpoints; {free / GB:.1f} GB are free")
    say(f"files: {train.path} ({train.images:,} images), {test.path} ({test.images:,} images)")
    largest = max(training.settings.views.crop_px for training in trainings)
    if train.typical_side_px < largest:
        say(
            f"the images have {train.typical_side_px} pixels on their short side, and crops of {largest} see "
            "them enlarged: say so beside the figure"
        )


def _say_end(experiment: Experiment, test: BetonFile) -> None:
    """When it will be done, by a few steps of each stage on this machine."""
    names = {training.name: training for training in experiment.arms[0].trainings}
    left = [
        stage.run.name.rpartition("-seed")[0] for stage in experiment.stages if not Run(stage.run).is_finished
    ]
    if not left:
        return
    speeds = {name: training_speed(names[name], test) for name in dict.fromkeys(left)}
    seconds = sum(speeds[name].seconds_of(names[name].settings.epochs) for name in left)
    ends = datetime.now() + timedelta(seconds=seconds)
    say(
        f"by a few steps of each stage here: about {seconds / 3600:.1f} hours for {len(left)} "
        f"run{'s' * (len(left) > 1)}, until {ends:%Y-%m-%d %H:%M}"
    )
