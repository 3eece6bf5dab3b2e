"""`vitds compare`: pretraining methods beside each other, at equal epochs, equal compute or equal minutes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from vitds.config.experiment_flags import CompareFlags
from vitds.config.load import load_settings, other_backbone
from vitds.config.methods import METHODS
from vitds.config.names import did_you_mean
from vitds.config.recipes import list_recipes, read_recipe
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.digits import NAME as DIGITS
from vitds.errors import SettingsError, UsageError
from vitds.jobs.data_files import open_file
from vitds.jobs.experiment import (
    OF_FINETUNING,
    OF_PRETRAINING,
    Arm,
    Json,
    Training,
    carried_out,
    planned_training,
    refuse_words,
    training_speed,
    with_backbone,
    with_epochs,
)
from vitds.jobs.experiment_result import FINETUNED, KNN, LINEAR, report, result_of
from vitds.plan.units import units_of_epoch

SCRATCH = "scratch"  # in place of a method
NAME = re.compile(r"[A-Za-z0-9]+([-_.]+[A-Za-z0-9]+)*")  # of an arm and of its folder


@dataclass(frozen=True)
class Price:
    """What a training costs, in units of the budget: a fixed part, and a part for each epoch."""

    unit: str
    fixed: float
    an_epoch: float


def run_comparison(flags: CompareFlags) -> Json | None:
    """Run all arms and print their table.

    Returns: what OUT/comparison.json holds; None of a plan.
    Raises: UsageError for an unknown method or a budget below one epoch; SettingsError for recipes that do
        not go together; DataError for files that cannot be used; RunError if `out` holds something else.
    """
    if not 0 < flags.amount < math.inf:
        raise UsageError(f"`amount={flags.amount:g}`: must be more than 0, and finite.")
    if flags.budget == "epochs" and not flags.amount.is_integer():
        raise UsageError(f"`amount={flags.amount:g}`: of epochs it must be a whole number.")
    refuse_words("set", flags.set, {"epochs": "--amount says how long each method pretrains"})
    has_pretraining = [word.strip() for word in flags.methods.split(",")] != [SCRATCH]
    refuse_words("finetune_set", flags.finetune_set, OF_PRETRAINING if has_pretraining else {})
    train, test = open_file(flags.data, "--data", "train"), open_file(flags.test, "--test", "test")
    experiment = carried_out("comparison", flags, (train, test), lambda: _arms(flags, train, test))
    if experiment is None:
        return None
    result = result_of(experiment, (KNN, LINEAR, FINETUNED))
    report(experiment, result, f"Methods at equal {flags.budget}")
    return result


def _arms(flags: CompareFlags, train: BetonFile, test: BetonFile) -> list[Arm]:
    """One of each method, in the order given; random weights where it says so."""
    kind = _kind(train)
    recipes = _recipes(flags.methods, kind)
    files = {"data": flags.data, "test": flags.test}
    pretrainings = {
        name: _pretraining(flags, name, recipe, files)
        for name, recipe in recipes.items()
        if recipe is not None
    }
    _require_one_network(pretrainings)
    tuning = flags.finetune_recipe or _usual_recipe(None, kind)
    tuned = load_settings(
        recipe=tuning,
        command="finetune",
        assignments=flags.finetune_set,
        flags=files | {"epochs": flags.finetune_epochs},
        extra={} if pretrainings else other_backbone(flags.backbone, flags.finetune_set),
        said_as=OF_FINETUNING,
    )
    if pretrainings and tuned.init is not None:
        raise SettingsError(
            f"recipe {tuning} has init {tuned.init}: {OF_PRETRAINING['init']}, or from random weights; take "
            "it out"
        )
    if pretrainings:
        first = next(iter(pretrainings.values()))
        tuned = with_backbone(tuned, first, "finetune_set", flags.finetune_set)
    finetune = planned_training("finetune", tuned)
    planned = {name: planned_training("pretrain", settings) for name, settings in pretrainings.items()}
    arms = []
    for name in recipes:
        if name in planned:
            price = _price(flags, planned[name], test)
            trainings = (_filled(planned[name], price, flags.amount), finetune)
        else:
            price = _price(flags, finetune, test)
            own = price.fixed + finetune.settings.epochs * price.an_epoch
            trainings = (_filled(finetune, price, flags.amount + own),)
        arms.append(Arm(name, name, trainings))
    return arms


def _require_one_network(pretrainings: dict[str, Settings]) -> None:
    """Raises: SettingsError if two arms have different networks (names both)."""
    networks = [
        (name, settings.backbone.name, settings.backbone.options) for name, settings in pretrainings.items()
    ]
    for other, *network in networks[1:]:
        one, *first = networks[0]
        if network != first:
            (is_now, options), (was, first_options) = network, first
            raise SettingsError(
                f"the recipe of {one} has backbone {was} with options {first_options}, that of {other} "
                f"{is_now} with options {options}; name one for all with --backbone, or its options with "
                "--set backbone.options"
            )


def _pretraining(flags: CompareFlags, name: str, recipe: str, files: dict[str, str]) -> Settings:
    settings = load_settings(
        recipe=recipe,
        command="pretrain",
        assignments=flags.set,
        flags=files,
        extra=other_backbone(flags.backbone, flags.set),
    )
    if name in METHODS and settings.method != name:
        raise SettingsError(f"`methods`: recipe {recipe} is of method {settings.method}, not {name}")
    return settings


def _kind(train: BetonFile) -> str:
    """How the names of recipes end that suit these images and this machine."""
    if train.manifest.sources == (DIGITS,):
        return "digits"
    return "deit_tiny" if torch.cuda.is_available() else "photos_cpu"


def _recipes(methods: str, kind: str) -> dict[str, str | None]:
    """Arm -> its recipe; None for random weights.

    Raises: UsageError for no arm, one that is unknown, cannot name a folder or is given twice;
        SettingsError for a method without a recipe for these images.
    """
    words = [word.strip() for word in methods.split(",") if word.strip()]
    found: dict[str, str | None] = {}
    for name, _, recipe in (word.partition("=") for word in words):
        if not NAME.fullmatch(name):
            raise UsageError(
                f"`methods`: {name!r} names no folder; write letters, digits, and - or _ between"
            )
        if name == SCRATCH and recipe:
            raise UsageError(f"`methods`: {name} has no pretraining, and so no recipe; leave out ={recipe}")
        if name in found:
            raise UsageError(f"`methods`: {name} is given twice; leave one, or give each a name, NAME=RECIPE")
        found[name] = None if name == SCRATCH else recipe or _usual_recipe(name, kind)
    if not found:
        raise UsageError(f"`methods` is empty; name some of {', '.join([*_pretrainings(), SCRATCH])}")
    return found


def _usual_recipe(name: str | None, kind: str) -> str:
    """The recipe of a method, or of a variant with a recipe of its own, for a kind of images.

    Args:
        name: of the method or variant; None for the fine-tuning.
        kind: how the recipe's name ends.
    Raises: UsageError for an unknown name; SettingsError for a method without such a recipe (names its own).
    """
    if name is None:
        return f"finetune_{'deit_tiny_224' if kind == 'deit_tiny' else kind}"
    packaged = [recipe for recipe, _ in list_recipes()]
    if (recipe := f"{name}_{kind}") in packaged:
        return recipe
    own = [recipe for recipe in packaged if read_recipe(recipe)["method"] == name]
    if kind in own:
        return kind
    if name not in _pretrainings():
        raise UsageError(
            f"`methods`: {name} is unknown; {did_you_mean(name, [*_pretrainings(), SCRATCH])} "
            "A recipe of any name: NAME=RECIPE"
        )
    raise SettingsError(
        f"{name} has no recipe that ends in {kind}, as these images on this machine ask for; name one, as "
        f"in {name}=RECIPE. It has {', '.join(own)}"
    )


def _pretrainings() -> list[str]:
    return [name for name, facts in METHODS.items() if facts.command == "pretrain"]


def _filled(training: Training, price: Price, amount: float) -> Training:
    """With the epochs that an amount gives.

    Raises: UsageError if that is not one (says how much is).
    """
    least = price.fixed + price.an_epoch
    if amount < least:
        raise UsageError(
            f"`amount={amount:g}`: one epoch of {training.name} by method {training.settings.method} takes "
            f"{least:.3g} {price.unit}. Give at least that."
        )
    return with_epochs(training, round((amount - price.fixed) / price.an_epoch))


def _price(flags: CompareFlags, training: Training, test: BetonFile) -> Price:
    """What a training costs by the flags' budget."""
    if flags.budget == "epochs":
        return Price("epochs", 0.0, 1.0)
    if flags.budget == "compute":
        return Price("forward units", 0.0, units_of_epoch(training.settings, training.images))
    speed = training_speed(training, test)
    return Price("minutes", speed.around_s / 60, speed.epoch_s / 60)
