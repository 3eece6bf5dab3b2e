"""Recipe, `--set` assignments, flags and Python arguments become one checked, frozen `Settings`; and settings
as YAML.

A later source wins key by key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitds.config.check import validate
from vitds.config.flags import TrainFlags
from vitds.config.leaves import Given, assigned_leaves, cut, leaves_of_word, merge
from vitds.config.methods import DEFAULT_METHODS, METHODS, Command, readers
from vitds.config.recipes import DEFAULT_RECIPES, list_recipes, read_mapping, read_recipe, recipe_layers
from vitds.config.tree import Settings
from vitds.config.yaml_text import dump_yaml
from vitds.errors import SettingsError

FLAG_KEYS = {
    "data": "data.train",
    "test": "data.test",
    "init": "init",
    "epochs": "epochs",
    "seed": "seed",
    "hold_out": "eval.hold_out",
}
# What --hold_out stands for beside its share; a recipe or --set may say otherwise.
OF_HOLD_OUT = {"eval.every_epochs": 1, "eval.choose": "best"}
PATH_KEYS = ("data.train", "data.test", "init")
# What may differ between a run's first start and its resume: none of these changes a number of the training.
FREE_ON_RESUME = (
    *("checkpoint.", "log.", "eval.every_epochs", "eval.batch_images", "eval.knn_k"),
    *("data.workers", "batch.micro_images"),
)


def load_settings(
    *,
    recipe: str | None,
    command: Command | None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, Any],
    extra: Mapping[str, Any] = {},  # noqa: B006 (never written to)
    run: str | None = None,
    said_as: Mapping[str, str] = {},  # noqa: B006 (likewise)
) -> Settings:
    """One settings tree from all that a person gave: recipe < init's backbone < assignments < flags < extra.

    Key by key; lists are replaced whole. A data set given by hand drops the recipe's test set, which belongs
    to the recipe's own data.

    Args:
        recipe: a packaged recipe's name or a YAML file's path; None takes the command's default on the
            embedded digits.
        command: whose methods the recipe may name, and whose default stands where it names none; None takes
            any (`recipes show`).
        assignments: `section.key=value`, the value read as YAML.
        flags: data, test, init, epochs, seed, hold_out; None where not given.
        extra: nested mappings, as Python keyword arguments give them: {"views": {"crop_px": 96}}.
        run: the run directory that goes on, if it is known.
        said_as: what flags are called where they are not `--set` and their own names, for messages.
    Raises: SettingsError if a recipe is unknown or belongs to another command, if one key is assigned two
        values, if the method does not read a key, or if keys or values are wrong: one message that lists
        every mistake with its key, its value, what is allowed, and where it was given.
    """
    recipe = recipe or DEFAULT_RECIPES[command or "pretrain"]
    of_recipe = [given for name, values in recipe_layers(recipe) for given in cut(values, f"recipe {name}")]
    if flags.get("hold_out"):
        of_recipe = [*(Given(key, value, "--hold_out") for key, value in OF_HOLD_OUT.items()), *of_recipe]
    of_person = [
        *assigned_leaves(
            [assignments] if isinstance(assignments, str) else assignments, said_as.get("set", "set")
        ),
        *(
            Given(FLAG_KEYS[flag], value, f"--{said_as.get(flag, flag)}")
            for flag, value in flags.items()
            if value is not None
        ),
        *(given for key, value in extra.items() for given in cut({key: value}, f"argument {key}")),
    ]
    own_keys = {given.key for given in of_person}
    if "data.train" in own_keys:
        of_recipe = [given for given in of_recipe if given.key != "data.test"]
    of_person = [_expanded(given) for given in of_person]
    init = next((given.value for given in reversed([*of_recipe, *of_person]) if given.key == "init"), None)
    of_init = [] if "backbone.name" in own_keys else inherited_backbone(init, run)
    tree, origins = merge([*map(_expanded, of_recipe), *of_init, *of_person])
    _check_command(tree, origins, command)
    return validate(tree, origins)


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """What `--set` words set: dotted key -> value.

    Raises: SettingsError as `load_settings` for words that are none.
    """
    return {given.key: given.value for word in assignments for given in leaves_of_word(word)}


def other_backbone(name: str | None, assignments: Sequence[str]) -> dict[str, Any]:
    """What puts a model, as timm has it, in the place of a recipe's, whose options belong to its own model.

    Args:
        name: of the model; None keeps the recipe's.
        assignments: `--set` words; options among them are those of the new model.
    Returns: for `load_settings`' extra.
    """
    if name is None:
        return {}
    has_options = any(key.startswith("backbone.options") for key in assigned(assignments))
    return {"backbone": {"name": name} | ({} if has_options else {"options": {}})}


def settings_of(command: Command, flags: TrainFlags, extra: Mapping[str, Any] = {}) -> Settings:  # noqa: B006
    """The settings that a training command asks for.

    Args:
        command: pretrain or finetune.
        flags: its flags.
        extra: see `load_settings`.
    Raises: SettingsError as `load_settings`.
    """
    return load_settings(
        recipe=flags.recipe,
        command=command,
        assignments=flags.set,
        flags={name: getattr(flags, name) for name in FLAG_KEYS} | {"data": _one_or_several(flags.data)},
        extra=extra,
        run=flags.run,
    )


def _one_or_several(names: str | Sequence[str]) -> str | list[str] | None:
    """What data.train holds: a name, a list of names, or nothing."""
    if isinstance(names, str):
        return names
    return list(names) if len(names) > 1 else next(iter(names), None)


def _expanded(given: Given) -> Given:
    """Paths that begin with ~ as the shell would give them; it leaves --data=~/x alone."""
    if given.key not in PATH_KEYS:
        return given
    if isinstance(given.value, list | tuple):
        return given._replace(
            value=[os.path.expanduser(name) if isinstance(name, str) else name for name in given.value]
        )
    return given._replace(value=os.path.expanduser(given.value)) if isinstance(given.value, str) else given


def inherited_backbone(init: Any, run: str | None = None) -> list[Given]:
    """Name and options of the backbone whose weights a run begins from: those of another would not fit.

    Args:
        init: a run directory or one of its checkpoints; a file of weights says nothing of its backbone.
        run: one that began from the same weights says it too, also when they are gone.
    """
    if not isinstance(init, str):
        return []
    path = Path(os.path.expanduser(init))
    for folder in (*([Path(os.path.expanduser(run))] if run else []), path, path.parent.parent):
        if not (folder / "settings.yaml").is_file():
            continue
        saved = read_settings(folder / "settings.yaml")
        if folder in (path, path.parent.parent) or saved.init == str(path):
            leaves = {"backbone.name": saved.backbone.name, "backbone.options": saved.backbone.options}
            return [Given(key, value, f"init {init}") for key, value in leaves.items()]
    return []


def backbone_note(recipe: str | None, command: Command, settings: Settings) -> str | None:
    """A line for the person if the run has the backbone of its `init` and not the recipe's."""
    of_recipe = Settings().backbone.model_dump() | read_recipe(recipe or DEFAULT_RECIPES[command]).get(
        "backbone", {}
    )
    inherited = {
        given.key.removeprefix("backbone."): given.value for given in inherited_backbone(settings.init)
    }
    now = {key: getattr(settings.backbone, key) for key in inherited}
    if not inherited or now != inherited or all(of_recipe[key] == value for key, value in now.items()):
        return None
    was, now_is = (f"{each['name']} with options {each['options']}" for each in (of_recipe, inherited))
    return f"the backbone is that of {settings.init}, {now_is}, in place of the recipe's {was}"


def read_settings(path: str | Path) -> Settings:
    """The settings of a run, as `dump_settings` wrote them.

    Raises: SettingsError if the file is missing, is not YAML, or holds wrong settings (names the file and
        every mistake).
    """
    return validate(*merge(cut(read_mapping(Path(path)), str(path))))


def dump_settings(settings: Settings) -> str:
    """The whole tree as YAML, without what the method does not read; `read_settings` gives equal settings
    back."""
    leaves = cut(settings.model_dump(mode="json"), "")
    return dump_yaml(merge(leaf for leaf in leaves if settings.method in readers(leaf.key))[0])


def differences(saved: Settings, given: Settings) -> list[tuple[str, Any, Any]]:
    """(dotted key, saved value, given value) wherever a resume would train another run.

    Left out are the keys that may differ, and those where an `auto` was given, which stands for the value the
    run resolved and saved.
    """
    before, now = (
        {leaf.key: leaf.value for leaf in cut(settings.model_dump(mode="json"), "")}
        for settings in (saved, given)
    )
    different = [
        (key, before[key], value) for key, value in now.items() if value not in (before[key], "auto")
    ]
    # Where an epoch is chosen, which ones are measured decides the result; lazy rows are settled at each.
    chooses = ("eval.every_epochs",) if saved.eval.choose == "best" or saved.head.lazy else ()
    return [row for row in different if row[0] in chooses or not row[0].startswith(FREE_ON_RESUME)]


def _check_command(tree: dict[str, Any], origins: Mapping[str, str], command: Command | None) -> None:
    """Fill the command's own method in where none is named, or refuse a method of another command."""
    if command is None:
        return
    method = tree.setdefault("method", DEFAULT_METHODS[command])
    if method in METHODS and METHODS[method].command != command:
        fitting = [
            name for name, _ in list_recipes() if METHODS[read_recipe(name)["method"]].command == command
        ]
        raise SettingsError(
            f"{origins['method']} is for `vitds {METHODS[method].command}` (method {method}); recipes for "
            f"`vitds {command}`: {', '.join(fitting)}"
        )
