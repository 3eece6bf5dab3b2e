"""What experiments share: a plan of arms and seeds, whose trainings are the stages of a chain.

    OUT/experiment.json       what was asked for, and the arms: the same call goes on with them
    OUT/recipes/ARM-NAME.yaml a whole recipe for each training of each arm
    OUT/ARM/NAME-seedN        the runs
    OUT/KIND.json, KIND.csv, report.html   what came out: experiment_result.py

An arm is a list of trainings, each of which begins from the weights of the one before.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from vitds.config.deepspeed import load_ds_config, resolve_ds_config
from vitds.config.experiment_flags import TrainingsFlags
from vitds.config.load import assigned, dump_settings, read_settings
from vitds.config.methods import METHODS
from vitds.config.recipes import list_recipes, read_recipe
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.order import steps_per_epoch
from vitds.engine.attention import require_attention
from vitds.engine.build import check_module
from vitds.engine.resolve import resolve_precision
from vitds.errors import RunError, SettingsError, UsageError
from vitds.jobs.chain import Stage, run_stages
from vitds.jobs.data_files import hold_out, training_files
from vitds.jobs.fit_plan import Speed, measure
from vitds.methods import method_class
from vitds.methods.base import SetSize
from vitds.models.build import build_backbone
from vitds.plan.units import units_of_epoch
from vitds.report.table import show
from vitds.runs.backbone import read_weights
from vitds.runs.directory import Run, content_of_weights, read_json, write_atomic, write_json
from vitds.terminal import say

RECORD = "experiment.json"
DATA = "data"  # the folder within OUT of a command that builds its own files
RECIPES = "recipes"  # likewise, of the recipes, which are written before the record
ENOUGH_EPOCHS = 16  # each has a step or more: as many as are timed
Json = dict[str, Any]
# What the flags of a fine-tuning are called in messages about settings.
OF_FINETUNING = {"set": "finetune_set", "epochs": "finetune_epochs"}
# Setting -> why an experiment's words may not set it.
OF_FLAGS = {
    "seed": "--seeds says how many seeds there are: 0, 1, ...",
    "data.train": "--data names the training images",
    "data.test": "--test names the test images",
}
OF_PRETRAINING = {"init": "a fine-tuning begins from its pretraining"}


@dataclass(frozen=True)
class Training:
    """One stage of an arm, whatever its seed.

    Attributes:
        name: of its runs, as `pretrain`.
        settings: whole, but for the seed and the weights to begin from, which each run is given.
        images: that it trains on.
    """

    name: str
    settings: Settings
    images: int

    @property
    def steps(self) -> int:
        """Of one run."""
        return self.settings.epochs * steps_per_epoch(self.images, self.settings.batch.global_images)

    @property
    def units(self) -> float:
        """Forward units of one run."""
        return self.settings.epochs * units_of_epoch(self.settings, self.images)


@dataclass(frozen=True)
class Arm:
    """What is compared with the other arms.

    Attributes:
        name: of its folder.
        title: as tables have it.
        trainings: in order.
        init: runs that the first training begins from, by the seed in turn; none for random weights.
    """

    name: str
    title: str
    trainings: tuple[Training, ...]
    init: tuple[str, ...] = ()

    @property
    def units(self) -> float:
        """Forward units of all its trainings, of one seed."""
        return sum(training.units for training in self.trainings)


@dataclass(frozen=True)
class Experiment:
    """A plan.

    Attributes:
        kind: names the files of the result, as `ablation`.
        out: the folder.
        arms: in the order of the table; differences are to the first.
        seeds: of each arm: 0, 1, ...
        asked: the words that it was asked for with.
    """

    kind: str
    out: Path
    arms: tuple[Arm, ...]
    seeds: int
    asked: Mapping[str, Any]

    def run(self, arm: Arm, training: Training, seed: int) -> Path:
        """A run's directory."""
        return self.out / arm.name / f"{training.name}-seed{seed}"

    def recipe(self, arm: Arm, training: Training) -> Path:
        """The file with a training's settings."""
        return self.out / RECIPES / f"{arm.name}-{training.name}.yaml"

    def runs(self, name: str) -> dict[str, list[str]]:
        """Title of each arm that has a training of this name -> its runs."""
        return {
            arm.title: [str(self.run(arm, training, seed)) for seed in range(self.seeds)]
            for arm in self.arms
            for training in arm.trainings
            if training.name == name
        }

    @property
    def stages(self) -> list[Stage]:
        """All of them; every arm with the first seed, then with the second."""
        return [stage for seed in range(self.seeds) for arm in self.arms for stage in self._of(arm, seed)]

    def _of(self, arm: Arm, seed: int) -> list[Stage]:
        stages, init = [], arm.init[seed % len(arm.init)] if arm.init else None
        for training in arm.trainings:
            words = [METHODS[training.settings.method].command, "--recipe", str(self.recipe(arm, training))]
            words += ["--seed", str(seed), *(["--init", init] if init else [])]
            command = (sys.executable, "-m", "vitds", *words)
            stages.append(Stage(self.run(arm, training, seed), command, work=training.units))
            init = str(stages[-1].run)
        return stages


def planned_training(name: str, settings: Settings) -> Training:
    """A training whose files, labels, network, crops and settings were looked at.

    Raises: SettingsError, DataError, ResourceError, RunError as the training itself would at its start.
    """
    train, test = training_files(settings)
    if test is None:
        raise SettingsError(f"{name}: no test file; give --test FILE.beton")
    if share := settings.eval.hold_out:
        train, _ = hold_out(train, share, settings.seed)
    if settings.init is not None:
        read_weights(Path(settings.init))
    _check_engine(settings, SetSize(train.images, len(train.manifest.classes)))
    return Training(name, settings, train.images)


def _check_engine(settings: Settings, size: SetSize) -> None:
    """What a training finds out when it builds its engine.

    Raises: SettingsError, ResourceError as it would.
    """
    engine, batch, ds = settings.engine, settings.batch, load_ds_config(None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if engine.precision != "auto":
        resolve_precision(engine.precision, device)
    require_attention(engine.attention, device)
    kind = method_class(settings.method)
    rows = kind.rows(size)
    with torch.device("meta"):
        backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
        resolved = kind.resolve(settings, rows, backbone.facts.width)
        method = kind(resolved, backbone, rows)
    config = resolve_ds_config(
        ds,
        resolved,
        micro_images=batch.chunk_images,
        accumulation=batch.global_images // batch.chunk_images,
        ranks=1,
        precision="fp32" if engine.precision == "auto" else engine.precision,
    )
    check_module(method, resolved, ds, has_bf16_weights=config["bf16"]["enabled"])


def refuse_words(flag: str, words: Sequence[str], owned: Mapping[str, str]) -> None:
    """Refuse settings that would have no effect, since the experiment itself gives them.

    Args:
        flag: that gives the words, as `set`.
        words: KEY=VALUE.
        owned: setting -> the reason, beside those of all experiments.
    Raises: SettingsError that names the setting and the reason.
    """
    reasons = OF_FLAGS | owned
    for key in assigned(words):
        if own := next((name for name in reasons if key == name or key.startswith(f"{name}.")), None):
            raise SettingsError(f"--{flag} {own}: {reasons[own]}; leave it out")


def with_backbone(settings: Settings, other: Settings, flag: str, words: Sequence[str]) -> Settings:
    """With the network whose weights a training begins from.

    Args:
        settings: of the training.
        other: of the one before.
        flag: that gave the training's words, as `finetune_set`.
        words: KEY=VALUE; a network among them must be that one.
    Raises: SettingsError if it is another.
    """
    network = other.backbone
    for key, value in assigned(words).items():
        if key.startswith(("backbone.name", "backbone.options")) and value != reduce(
            lambda tree, part: tree.get(part, {}), key.split(".")[1:], network.model_dump()
        ):
            raise SettingsError(
                f"--{flag} {key} is {value!r}, but the weights are those of {network.name} with options "
                f"{network.options}; leave it out"
            )
    same = {name: getattr(other.backbone, name) for name in ("name", "options")}
    return settings.model_copy(update={"backbone": settings.backbone.model_copy(update=same)})


def with_epochs(training: Training, epochs: int) -> Training:
    """The same for another number of epochs."""
    return replace(training, settings=training.settings.model_copy(update={"epochs": epochs}))


def training_speed(training: Training, test: BetonFile) -> Speed:
    """By a few steps on this machine, in a folder that is removed again."""
    settings = with_epochs(training, max(ENOUGH_EPOCHS, training.settings.epochs)).settings
    with tempfile.TemporaryDirectory(prefix="vitds-speed-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(dump_settings(settings), "utf-8")
        train, _ = training_files(settings)
        return measure(METHODS[settings.method].command, str(recipe), (), train, test)


def asked_for(flags: Any, files: Sequence[BetonFile]) -> Json:
    """What must be the same when an experiment goes on: the flags, and what is in the files."""
    free = ("out", "plan", "seeds")
    words = {name: value for name, value in vars(flags).items() if name not in free}
    words = {name: list(value) if isinstance(value, tuple) else value for name, value in words.items()}
    return words | {
        "content": [file.manifest.content_hash for file in files],
        "recipe_files": {name: _content_of_recipe(name) for name in _own_recipes(words)},
    }


def _own_recipes(words: Mapping[str, Any]) -> list[str]:
    """Recipes that flags name and that are no packaged ones: files, which may change."""
    named = [words.get("recipe"), words.get("finetune_recipe")]
    named += [word.partition("=")[2].strip() for word in words.get("methods", "").split(",")]
    packaged = {name for name, _ in list_recipes()}
    return [name for name in named if name and name not in packaged]


def _content_of_recipe(name: str) -> str:
    """A hash of what a recipe says, with those that it stands on.

    Raises: SettingsError as `read_recipe`.
    """
    return _hash(json.dumps(read_recipe(name), sort_keys=True, default=str))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def begun_or_new(
    kind: str, out: str, seeds: int, asked: Mapping[str, Any], make_arms: Callable[[], Sequence[Arm]]
) -> Experiment:
    """The experiment that OUT holds, or a new one, of which nothing is written yet.

    Args:
        kind: see Experiment.
        out: the folder.
        seeds: may grow from call to call.
        asked: words and contents of files; must be those of the first call.
        make_arms: is called for a new one alone, so that what it measures stays as it was.
    Raises: UsageError for too few seeds; RunError if the folder holds something else (names the word and both
        values).
    """
    check_seeds(seeds)
    folder = Path(out).expanduser()
    record = folder / RECORD
    check_folder(folder)
    if not record.exists():
        return Experiment(kind, folder, tuple(make_arms()), seeds, asked)
    saved = read_json(record)
    try:
        before = {"kind": saved["kind"], **saved["asked"]}
        arms = tuple(_arm(folder, facts) for facts in saved["arms"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{record} is no record of an experiment: it lacks {error}. Choose another `out`."
        ) from error
    for name, now in {"kind": kind, **asked}.items():
        if now != before.get(name):
            raise RunError(
                f"{folder} was begun with other words: {name} was {before.get(name)!r}, now {now!r}. Give "
                "the same to go on, or another `out`."
            )
    return Experiment(kind, folder, arms, seeds, asked)


def check_seeds(seeds: int) -> None:
    """Raises: UsageError for too few."""
    if seeds < 1:
        raise UsageError(f"`seeds={seeds}`: must be 1 or more.")


def check_folder(folder: Path) -> None:
    """Raises: RunError if a folder holds something else than an experiment."""
    if not folder.exists() or (folder / RECORD).exists():
        return
    if not folder.is_dir() or any(path.name not in (DATA, RECIPES) for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no experiment. Choose another `out`.")


def _arm(folder: Path, facts: Json) -> Arm:
    """Raises: RunError if a recipe is not as it was written: other seeds were trained by that one."""
    trainings = []
    for each in facts["trainings"]:
        recipe = folder / each["recipe"]
        settings = read_settings(recipe)
        # Of the file's text: read back and written anew, an older version's would have newer settings in it.
        if _hash(recipe.read_text("utf-8")) != each["content"]:
            raise RunError(
                f"{recipe} was changed after the experiment began, and more runs would differ from the "
                "others; change it back, or choose another `out`."
            )
        if "weights" in each and content_of_weights(settings.init) != each["weights"]:
            raise RunError(
                f"{settings.init}: other weights than when the experiment began, and more runs would differ "
                "from the others; put those back, or choose another `out`."
            )
        trainings.append(Training(each["name"], settings, each["images"]))
    return Arm(facts["name"], facts["title"], tuple(trainings), tuple(facts["init"]))


def write_plan(experiment: Experiment) -> None:
    """Write the recipes, then the record, at the first call."""
    out = experiment.out
    (out / RECIPES).mkdir(parents=True, exist_ok=True)
    if not (out / RECORD).exists():
        for arm in experiment.arms:
            for training in arm.trainings:
                recipe = experiment.recipe(arm, training)
                write_atomic(recipe, dump_settings(training.settings).encode())
        write_json(out / RECORD, _record(experiment))


def carried_out(
    kind: str,
    flags: TrainingsFlags,
    files: tuple[BetonFile, BetonFile],
    make_arms: Callable[[], Sequence[Arm]],
) -> Experiment | None:
    """The experiment that flags ask for, with all its runs finished; None of a plan, which is printed.

    Raises: as `begun_or_new` and `carry_out`; UsageError if the training images are the test images.
    """
    train, test = files
    if train.manifest.content_hash == test.manifest.content_hash:
        raise UsageError(
            f"`test={flags.test}`: holds the same images as `data={flags.data}`, so nothing would be tested. "
            "Give images that are not trained on (`vitds data build … --test_fraction 0.2`)."
        )
    experiment = begun_or_new(kind, flags.out, flags.seeds, asked_for(flags, files), make_arms)
    if flags.plan:
        print_plan(experiment)
        return None
    carry_out(experiment)
    return experiment


def carry_out(experiment: Experiment) -> None:
    """Write the plan and run what is not finished.

    Raises: VitdsError as the stage that failed.
    """
    write_plan(experiment)
    out, stages = experiment.out, experiment.stages
    left = [stage for stage in stages if not Run(stage.run).is_finished]
    if left:
        (out / f"{experiment.kind}.json").unlink(missing_ok=True)  # of fewer runs
    if left and len(left) < len(stages):
        say(f"{out}: {len(stages) - len(left)} of {len(stages)} runs are finished")
    run_stages(left)


def _record(experiment: Experiment) -> Json:
    arms = [
        {
            "name": arm.name,
            "title": arm.title,
            "init": list(arm.init),
            "trainings": [
                {
                    "name": training.name,
                    "recipe": str(experiment.recipe(arm, training).relative_to(experiment.out)),
                    "content": _hash(dump_settings(training.settings)),
                    "weights": content_of_weights(training.settings.init),
                    "images": training.images,
                }
                for training in arm.trainings
            ],
        }
        for arm in experiment.arms
    ]
    return {"kind": experiment.kind, "asked": dict(experiment.asked), "arms": arms}


def print_plan(experiment: Experiment) -> None:
    """A row a training: what would run, with steps and forward units."""
    table = Table(title=f"Plan of {experiment.out}: figures of one seed, of {experiment.seeds}")
    columns = ("arm", "training", "views x px", "images", "epochs", "steps", "forward units")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 2 else "left", overflow="fold")
    for arm in experiment.arms:
        for training in arm.trainings:
            settings = training.settings
            numbers = (training.images, settings.epochs, training.steps, round(training.units))
            seen = f"{settings.views.count} x {settings.views.crop_px}"
            table.add_row(arm.title, training.name, seen, *(f"{number:,}" for number in numbers))
    show(table)
    units = experiment.seeds * sum(arm.units for arm in experiment.arms)
    say(
        f"{len(experiment.stages)} runs, {units:,.0f} forward units (one is a forward pass over 224 x 224 "
        "pixels; a training pass takes three)"
    )
    say("nothing was trained; the same command without --plan trains")
