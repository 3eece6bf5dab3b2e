"""`vitds fit PHOTOS --minutes M`: from a folder of images to a model in use, in the time that a person has.

data -> what to train (fit_plan.py) -> stages as in a chain -> result, page, and the commands to use it.
OUT/fit.json says how far it is: the same call goes on, one with more minutes trains on from there.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from vitds.config.flags import BuildFlags, FitFlags
from vitds.config.methods import Command
from vitds.data.beton import BetonFile, open_beton
from vitds.data.build import BuildOptions, build_set
from vitds.data.digits import NAME as DIGITS
from vitds.data.digits import embedded_digits
from vitds.data.findings import Findings, shown
from vitds.data.sources import SOURCE_OPTIONS, SourceOptions, scan_sources
from vitds.data.split import with_suffix
from vitds.data.workers import stops_in_order
from vitds.errors import DataError, RunError, UsageError
from vitds.jobs.chain import Stage, run_stages
from vitds.jobs.data import build, named_set, print_built
from vitds.jobs.fit_plan import Choice, Speed, choose, fill, measure, with_larger_crops
from vitds.jobs.fit_result import SCRATCH, Result, print_result
from vitds.jobs.report import report
from vitds.rng import LARGEST_SEED
from vitds.runs.directory import Run, read_json, write_json
from vitds.terminal import say

TEST_SHARE = 0.2
STORED_PX = {"cpu": 128, "cuda": 256}  # short side: a third more than 96 px crops; the paper's


def fit(*sources: str | Path, minutes: float, **options: Any) -> Result:
    """Train a model on images in so many minutes, and give it back for use.

    Args:
        sources: folders, tars or zips of images; or `digits` or a published set, as `vitds data build` takes.
        minutes: that building, training and evaluation may take.
        options: the other fields of FitFlags.
    Returns: accuracy, predict, embed, report; see fit_result.Result.
    Raises: UsageError if the minutes are too few, or an argument does nothing; DataError for images that
        cannot be used; RunError if `out` holds another fit.
    """
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return run_fit([str(source) for source in sources], FitFlags(minutes=minutes, **given))


def run_fit(sources: Sequence[str], flags: FitFlags) -> Result:
    """As `fit`, with the flags of the command line."""
    began = time.monotonic()
    if not 0 < flags.minutes < math.inf:
        raise UsageError(f"`minutes={flags.minutes}`: must be a number of minutes, more than 0.")
    if not sources:
        raise UsageError("no images were given. Name a folder of them, a tar, a zip, or digits.")
    if not 0 <= (flags.seed or 0) <= LARGEST_SEED:
        raise UsageError(f"`seed={flags.seed}`: must be from 0 to {LARGEST_SEED}.")
    name = shown(Path(sources[0]).name.partition(".")[0])
    out = Path(flags.out or Path("runs") / (name or "fit")).expanduser()
    record = _Record(out, sources, flags)
    train, test = _data(record, sources, flags)
    choice = choose(train, on_gpu=torch.cuda.is_available())
    say(f"{choice.reason}")
    if flags.compare and len(choice.stages) < 2:
        say(f"nothing to compare with training from scratch: this is {' and '.join(choice.stages)} alone")
    record.spend(time.monotonic() - began)
    _train(record, choice, train, test, flags)
    if flags.plan:
        say(f"nothing was trained; leave --plan out and {out} goes on from here")
        return Result(out)
    result = Result(out)
    try:
        report(str(result.run.path), out=result.report)
    finally:  # whatever goes wrong with the page
        print_result(result)
    return result


class _Record:
    """OUT/fit.json: of what this is a fit, the time spent, and its stages.

    It stands before the data is built, so that the same call goes on where that was stopped. Until then other
    words begin anew: nothing was made of the first ones. The folder may move, or be named from another one.

    Raises: RunError if the folder holds the fit of other images, or anything else.
    """

    def __init__(self, out: Path, sources: Sequence[str], flags: FitFlags) -> None:
        self.out = out
        self.path = out / "fit.json"
        of = {name: getattr(flags, name) for name in (*sorted(SOURCE_OPTIONS), "seed")}
        named = named_set(sources, flags)
        of = {"sources": [named] if named else [shown(os.path.abspath(source)) for source in sources], **of}
        self.facts: dict[str, Any] = {"of": of, "minutes": flags.minutes, "spent_s": 0.0, "stages": []}
        if self.path.exists():
            found = read_json(self.path)
            if not self.facts.keys() <= found.keys():
                raise RunError(f"{self.path} is no record of a fit. Choose another `out`.")
            before = found["of"]
            changed = [name for name in of if of[name] != before.get(name)]
            if not changed:
                self.facts = found | {"stages": [_placed(stage, out) for stage in found["stages"]]}
                self.save()
            elif found["stages"] or any((out / "data").glob("*.beton")):
                name = changed[0]
                raise RunError(
                    f"{out} was begun with other words: {name} was {before.get(name)!r}, now {of[name]!r}. "
                    "Give the same to go on, or another `out`."
                )
        elif out.exists() and any(out.iterdir()):
            raise RunError(f"{out} is not empty and holds no fit. Choose another `out`.")

    def save(self) -> None:
        """Write it, with its folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.facts)

    def add(self, stage: dict[str, Any]) -> None:
        """A stage that is about to begin."""
        self.stages.append(stage)
        self.save()

    def spend(self, seconds: float) -> None:
        """Count time. The next `add` saves it: a plan, or a call that is refused, uses none up."""
        self.facts["spent_s"] = round(self.facts["spent_s"] + seconds, 1)

    @property
    def left_s(self) -> float:
        """Seconds of the minutes that nothing has used."""
        return self.facts["minutes"] * 60 - self.facts["spent_s"]

    def extend(self, minutes: float) -> bool:
        """Give a fit that is done more minutes, saved by the next `add`; False if they are no more."""
        before = self.facts["minutes"]
        if minutes <= before:
            return False
        # Only the added minutes are filled, not what the first ones left over.
        self.facts |= {"minutes": minutes, "spent_s": before * 60}
        return True

    @property
    def stages(self) -> list[dict[str, Any]]:
        """{name, run, words, epochs, expected_s} in order."""
        return self.facts["stages"]

    @property
    def settings(self) -> tuple[str, ...]:
        """Of the stages, as words for --set: all have the same."""
        words = self.stages[0]["words"]
        return tuple(word for flag, word in pairwise(words) if flag == "--set")

    @property
    def last(self) -> str | None:
        """The run that the next one goes on from; None before the first."""
        return next((stage["run"] for stage in reversed(self.stages) if stage["name"] != SCRATCH), None)


def _placed(stage: dict[str, Any], out: Path) -> dict[str, Any]:
    """A stage by the present path of its folder."""
    before = Path(stage["run"]).parent

    def placed(path: str) -> str:
        return str(out / Path(path).relative_to(before)) if Path(path).is_relative_to(before) else path

    words = stage["words"][:1]
    words += [
        placed(word) if flag in ("--data", "--test", "--init") else word
        for flag, word in pairwise(stage["words"])
    ]
    return stage | {"run": placed(stage["run"]), "words": words}


def _data(record: _Record, sources: Sequence[str], flags: FitFlags) -> tuple[BetonFile, BetonFile | None]:
    """The training file and, where there are two classes or more, the test file; built once.

    Raises: DataError if no class has an image to spare for the test.
    """
    named = named_set(sources, flags)
    if named and flags.split:
        raise UsageError(f"`split` does nothing here: {named} is taken whole, with its own test half.")
    if named:
        record.save()
    if named == DIGITS:
        train, test = embedded_digits(record.out / "data")
        return open_beton(train), open_beton(test)
    path = record.out / "data" / "photos.beton"
    halves = [with_suffix(path, half) for half in ("train", "test")]
    built_before = [path] if path.exists() else [half for half in halves if half.exists()]
    if built_before in ([path], halves):
        when = datetime.fromtimestamp(built_before[0].stat().st_mtime)
        say(f"{path.parent}: the images as they were at {when:%Y-%m-%d %H:%M}; another out takes them anew")
        files = [open_beton(file) for file in built_before]
        return files[0], files[1] if len(files) == 2 else None
    if named:
        stored = BuildFlags(
            out=str(path), side=STORED_PX[_device()], root=flags.root, download=flags.download
        )
        built = [open_beton(half["file"]) for half in build([named], stored)]
        return built[0], built[1]
    findings = Findings()
    reading = SourceOptions(**{name: getattr(flags, name) for name in SOURCE_OPTIONS})
    began = time.monotonic()
    with stops_in_order(), tempfile.TemporaryDirectory(prefix="vitds-fit-") as workspace:
        images = scan_sources(sources, findings, Path(workspace), reading)
        has_test = len(images.classes) > 1  # one class alone has nothing to be told from
        per_class = Counter(image.class_name for image in images.images if image.class_name is not None)
        if has_test and max(per_class.values()) < 2:
            raise DataError(
                f"{', '.join(sources)}: no class has two images, so none is left to test on. Give more "
                "images of each class, or train without labels (`no_labels`)."
            )
        record.save()  # once the images are found: a mistyped folder leaves nothing behind
        options = BuildOptions(
            side_px=STORED_PX[_device()],
            test_fraction=TEST_SHARE if has_test else None,
            seed=flags.seed if has_test else None,
            show_progress=True,
        )
        built = build_set(images, path, options, findings, grouped_by=reading.group)
    print_built(built, time.monotonic() - began)
    files = [open_beton(name) for name, _ in built]
    return files[0], files[1] if len(files) == 2 else None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _train(
    record: _Record, choice: Choice, train: BetonFile, test: BetonFile | None, flags: FitFlags
) -> None:
    """Go on with what was begun; then fill the time that is left with new stages."""
    planned = record.facts.setdefault("commands", list(choice.stages))
    commands = planned[len(record.stages) :]
    _check_goes_on(record, bool(commands), flags)
    if not flags.plan:
        for stage in record.stages:
            _run(record, stage)
    if commands:
        record.facts["minutes"] = flags.minutes
    elif record.extend(flags.minutes):  # all is done; more minutes than before train on
        commands = ["finetune" if choice.finetune else "pretrain"]
    began = time.monotonic()
    choice, speeds = _timed(record, choice, commands, train, test)
    record.spend(time.monotonic() - began)
    for number in range(len(commands)):
        # Again before each stage: what those before took more or less is made up for.
        shares = {command: choice.stages[command][1] for command in commands[number:]}
        epochs = fill(shares, speeds, record.left_s)
        stages = [
            _stage(record, command, epochs[command], speeds[command], choice, train, test, flags)
            for command in commands[number:]
        ]
        if number == 0:
            for stage in stages:
                say(_announcement(stage))
        if flags.plan:
            return
        record.add(stages[0])
        _run(record, stages[0])
    is_compared = any(stage["name"] == SCRATCH for stage in record.stages)
    if flags.compare and len(choice.stages) == 2 and not is_compared:
        speed = speeds.get("finetune") or measure(
            "finetune", choice.stages["finetune"][0], choice.settings, train, test
        )
        seconds = sum(stage["expected_s"] for stage in record.stages)  # as long as all stages of the model
        epochs = max(1, round((seconds - speed.around_s) / speed.epoch_s))
        scratch = _stage(record, "finetune", epochs, speed, choice, train, test, flags, SCRATCH)
        say(_announcement(scratch))
        if not flags.plan:
            record.add(scratch)
            _run(record, scratch)


def _check_goes_on(record: _Record, has_more: bool, flags: FitFlags) -> None:
    """Raises: UsageError for fewer minutes than a stage that is not done was given; RunError if there is more
    to train, and the stages were chosen for a machine of another kind.
    """
    minutes, device = record.facts["minutes"], record.facts.setdefault("device", _device())
    is_open = any(not Run(Path(stage["run"])).is_finished for stage in record.stages)
    if is_open and flags.minutes < minutes:
        raise UsageError(
            f"`minutes={flags.minutes:g}`: {record.out} was begun with {minutes:g}, and its epochs are set. "
            "Give as many to go on, or another `out`."
        )
    compares = flags.compare and all(stage["name"] != SCRATCH for stage in record.stages)
    if device != _device() and (is_open or has_more or compares or flags.minutes > minutes):
        raise RunError(
            f"{record.out} was begun on a machine that trains by {device}, and this one by {_device()}, with "
            "other networks. Go on there, or choose another `out`."
        )


def _timed(
    record: _Record, choice: Choice, commands: Sequence[Command], train: BetonFile, test: BetonFile | None
) -> tuple[Choice, dict[Command, Speed]]:
    """The choice at the side of the crops that is right for the time, and its speeds."""
    if record.stages:  # what was begun goes on at its side
        choice = replace(choice, settings=record.settings)
        return choice, _speeds(choice, commands, train, test)
    found = _speeds(choice, commands, train, test)
    larger = with_larger_crops(choice, train, found[commands[-1]].epochs_in(record.left_s))
    if larger == choice:
        return choice, found
    say(larger.reason)
    return larger, _speeds(larger, commands, train, test)


def _speeds(
    choice: Choice, commands: Sequence[Command], train: BetonFile, test: BetonFile | None
) -> dict[Command, Speed]:
    return {
        command: measure(command, choice.stages[command][0], choice.settings, train, test)
        for command in commands
    }


def _stage(
    record: _Record,
    command: Command,
    epochs: int,
    speed: Speed,
    choice: Choice,
    train: BetonFile,
    test: BetonFile | None,
    flags: FitFlags,
    name: str | None = None,
) -> dict[str, Any]:
    """One run: its directory, its command, and what it is expected to take.

    Args:
        name: of a run from scratch; else it goes on from the one before, and is called by its command.
    """
    again = sum(stage["name"] == command for stage in record.stages)
    words = [command, "--recipe", choice.stages[command][0], "--data", str(train.path)]
    words += ["--epochs", str(epochs)]
    if test is not None:
        words += ["--test", str(test.path)]
    if record.last and name is None:
        words += ["--init", record.last]
    if flags.seed is not None:
        words += ["--seed", str(flags.seed)]
    for setting in choice.settings:
        words += ["--set", setting]
    return {
        "name": name or command,
        "run": str(record.out / (name or (f"{command}-{again + 1}" if again else command))),
        "words": words,
        "epochs": epochs,
        "expected_s": round(speed.seconds_of(epochs), 1),
    }


def _announcement(stage: dict[str, Any]) -> str:
    recipe = stage["words"][2]
    return f"{stage['run']}: {recipe}, {stage['epochs']} epochs, about {stage['expected_s'] / 60:.1f} minutes"


def _run(record: _Record, stage: dict[str, Any]) -> None:
    """Run a stage to its end, or on from where it was stopped."""
    run = Run(Path(stage["run"]))
    if run.is_finished:
        return
    ends = datetime.now() + timedelta(seconds=stage["expected_s"])
    if not run.has_begun:
        number, of = record.stages.index(stage) + 1, len(record.stages)
        say(f"stage {number} of {of}: {stage['name']}, until about {ends:%H:%M}")
    command = (sys.executable, "-m", "vitds", *stage["words"])
    began = time.monotonic()
    seconds = 0.0
    try:
        run_stages([Stage(run.path, command)])
        seconds = run.summary["seconds"]  # with those of starts that were killed
    finally:  # a stage that is stopped used its time too
        counted = stage.get("spent_s", 0.0)
        stage["spent_s"] = round(max(counted + time.monotonic() - began, seconds), 1)
        record.spend(stage["spent_s"] - counted)
        record.save()
