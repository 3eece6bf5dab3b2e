"""`vitds ablate`: the paper's ablation. A pretraining without its parts, then with one more at a time.

Source: IDMM (Cao, Yu, Wu 2022), arXiv:2201.10728 v1, Table 8.
"""

from __future__ import annotations

from typing import Any

from vitds.config.experiment_flags import AblateFlags
from vitds.config.load import load_settings
from vitds.config.methods import METHODS, readers
from vitds.config.tree import Settings
from vitds.data.catalogue import CATALOGUE
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
    with_backbone,
    with_epochs,
)
from vitds.jobs.experiment_result import FINETUNED, KNN, report, result_of
from vitds.plan.units import units_of_epoch

FLOWERS = "flowers102"
PUBLISHED = (69.6, 70.4, 73.1, 76.9, 79.9)  # accuracy on Flowers, in the order of the arms
REMARK = (
    "Published on Flowers: arXiv:2201.10728 v1, Table 8. Its backbone, lengths and resolution are "
    "not stated, so the order and the rough steps can be compared, not the figures."
)
# Part -> the setting without it; those of the fine-tuning's resolution and the first group are filled in.
PARTS = {
    "smoothing": "head.label_smoothing",
    "low-resolution": "views.crop_px",
    "multi-crop": "views.groups",
    "mixing": "mix.kind",
}
MIXING = {"cutmix": "CutMix", "mixup": "mixup", "alternate": "mixup and CutMix"}


def run_ablation(flags: AblateFlags) -> Json | None:
    """Run the five arms and print their table.

    Returns: what OUT/ablation.json holds; None of a plan.
    Raises: SettingsError if the recipe lacks a part; DataError for files that cannot be used; UsageError for
        a budget below one epoch; RunError if `out` holds something else.
    """
    refuse_words("set", flags.set, {})
    refuse_words("finetune_set", flags.finetune_set, OF_PRETRAINING)
    train, test = open_file(flags.data, "--data", "train"), open_file(flags.test, "--test", "test")
    experiment = carried_out("ablation", flags, (train, test), lambda: _arms(flags))
    if experiment is None:
        return None
    counts = CATALOGUE[FLOWERS].counts
    is_flowers = (train.images, test.images) == (counts["train"], counts["test"])
    result = result_of(experiment, (KNN, FINETUNED))
    beside = {"notes": [REMARK], "published": PUBLISHED} if is_flowers else {}
    report(experiment, result, f"Ablation of {flags.recipe}", **beside)
    return result


def _arms(flags: AblateFlags) -> list[Arm]:
    """None of the parts, then one more in each arm."""
    files = {"data": flags.data, "test": flags.test}
    tuned = load_settings(
        recipe=flags.finetune_recipe,
        command="finetune",
        assignments=flags.finetune_set,
        flags=files | {"epochs": flags.finetune_epochs},
        said_as=OF_FINETUNING,
    )

    def pretraining(changes: dict[str, Any]) -> Settings:
        words = files | {"epochs": flags.epochs}
        return load_settings(
            recipe=flags.recipe,
            command="pretrain",
            assignments=flags.set,
            flags=words,
            extra=_nested(changes),
        )

    whole = pretraining({})
    without = _without(flags.recipe, whole, tuned)
    finetune = planned_training("finetune", with_backbone(tuned, whole, "finetune_set", flags.finetune_set))
    arms = []
    for number in range(len(PARTS) + 1):
        name = ("none", *PARTS)[number]
        changes = {PARTS[part]: without[part] for part in list(PARTS)[number:]}
        pretrain = planned_training("pretrain", pretraining(changes))
        title = f"+ {name.replace('low-', 'low ')}" if number else name
        title = title.replace("mixing", MIXING[whole.mix.kind])
        arms.append(Arm(name, title, (pretrain, finetune)))
    if flags.budget == "epochs":
        return arms
    return [
        Arm(arm.name, arm.title, (_as_dear(arm.trainings[0], arms[-1].trainings[0]), finetune))
        for arm in arms
    ]


def _without(recipe: str, whole: Settings, tuned: Settings) -> dict[str, Any]:
    """Part -> the value of its setting without it.

    Raises: SettingsError if the recipe has nothing to take away.
    """
    for key in PARTS.values():
        if whole.method not in readers(key):
            others = " and ".join(name for name in readers(key) if METHODS[name].command == "pretrain")
            raise SettingsError(
                f"recipe {recipe}: method {whole.method} has no {key} to take away; ablate takes a recipe of "
                f"{others}"
            )
    views = whole.views
    lacks = {
        "label smoothing (head.label_smoothing is 0)": whole.head.label_smoothing == 0,
        f"low resolution (its crops of {views.crop_px} pixels are not smaller than the fine-tuning's "
        f"{tuned.views.crop_px})": views.crop_px >= tuned.views.crop_px,
        "multi-crop (views.groups has one view)": views.count == 1,
        "mixing (mix.kind is none)": whole.mix.kind == "none",
    }
    if lacking := [what for what, lacks_it in lacks.items() if lacks_it]:
        raise SettingsError(
            f"recipe {recipe} has no {'; no '.join(lacking)}: an arm would be the same as the one before it. "
            "Take a recipe that has all four parts, or set them."
        )
    one_view = views.groups[0].model_copy(update={"views": 1})
    return {
        "smoothing": 0.0,
        "low-resolution": tuned.views.crop_px,
        "multi-crop": [one_view.model_dump(mode="json")],
        "mixing": "none",
    }


def _nested(changes: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return tree


def _as_dear(training: Training, reference: Training) -> Training:
    """With the epochs that cost what the reference costs.

    Raises: UsageError if that is not one epoch.
    """
    epochs = round(reference.units / units_of_epoch(training.settings, training.images))
    if epochs < 1:
        raise UsageError(
            f"`epochs={reference.settings.epochs}`: not even one epoch at {training.settings.views.crop_px} "
            "pixels costs as little. Give more."
        )
    return with_epochs(training, epochs)
