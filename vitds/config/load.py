"""Recipe, `--set` assignments, flags and Python arguments become one checked, frozen `Settings`; and settings
as YAML.

Every source is cut into (key, value, origin) at the leaves of the settings tree, so that one rule merges them
all: a later source wins key by key, and a message can say where a value came from.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from vitds.config.flags import TrainFlags
from vitds.config.methods import DEFAULT_METHODS, METHODS, Command, readers
from vitds.config.names import NO_TEXT, is_text, nearest
from vitds.config.recipes import DEFAULT_RECIPES, list_recipes, read_mapping, read_recipe, recipe_layers
from vitds.config.tree import Section, Settings
from vitds.config.yaml_text import dump_yaml, parse_yaml
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
PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid array": "a list",
    "an object": "a mapping, {key: value}",
    "match pattern": "be of the form",
}
PATH_KEYS = ("data.train", "data.test", "init")
# What may differ between a run's first start and its resume: none of these changes a number of the training.
FREE_ON_RESUME = (
    *("checkpoint.", "log.", "eval.every_epochs", "eval.batch_images", "eval.knn_k"),
    *("data.workers", "batch.micro_images"),
)


class Given(NamedTuple):
    """A value that one source gives: its dotted key, and words that tell a person where it stands."""

    key: str
    value: Any
    origin: str


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
    of_recipe = [
        given for name, values in recipe_layers(recipe) for given in _leaves(values, f"recipe {name}")
    ]
    if flags.get("hold_out"):
        of_recipe = [*(Given(key, value, "--hold_out") for key, value in OF_HOLD_OUT.items()), *of_recipe]
    of_person = [
        *_assigned([assignments] if isinstance(assignments, str) else assignments, said_as.get("set", "set")),
        *(
            Given(FLAG_KEYS[flag], value, f"--{said_as.get(flag, flag)}")
            for flag, value in flags.items()
            if value is not None
        ),
        *(given for key, value in extra.items() for given in _leaves({key: value}, f"argument {key}")),
    ]
    own_keys = {given.key for given in of_person}
    if "data.train" in own_keys:
        of_recipe = [given for given in of_recipe if given.key != "data.test"]
    of_person = [_expanded(given) for given in of_person]
    init = next((given.value for given in reversed([*of_recipe, *of_person]) if given.key == "init"), None)
    of_init = [] if "backbone.name" in own_keys else inherited_backbone(init, run)
    tree, origins = _merge([*map(_expanded, of_recipe), *of_init, *of_person])
    _check_command(tree, origins, command)
    return _validate(tree, origins)


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """What `--set` words set: dotted key -> value.

    Raises: SettingsError as `load_settings` for words that are none.
    """
    return {given.key: given.value for word in assignments for given in _leaves_of(word)}


def other_backbone(name: str | None, recipe: str, assignments: Sequence[str]) -> dict[str, Any]:
    """What puts another model in the place of a recipe's, whose options belong to its own model.

    Args:
        name: of the model; None keeps the recipe's.
        recipe: name or path.
        assignments: `--set` words; options among them are those of the new model.
    Returns: for `load_settings`' extra.
    """
    if name is None:
        return {}
    own = read_recipe(recipe).get("backbone")
    is_other = not isinstance(own, Mapping) or own.get("name") != name
    has_options = any(key.startswith("backbone.options") for key in assigned(assignments))
    return {"backbone": {"name": name} | ({"options": {}} if is_other and not has_options else {})}


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


def _leaves(values: Mapping[str, Any], origin: str) -> list[Given]:
    return list(_cut(values, origin))


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
    return _validate(*_merge(_cut(read_mapping(Path(path)), str(path))))


def dump_settings(settings: Settings) -> str:
    """The whole tree as YAML, without what the method does not read; `read_settings` gives equal settings
    back."""
    leaves = _cut(settings.model_dump(mode="json"), "")
    return dump_yaml(_merge(leaf for leaf in leaves if settings.method in readers(leaf.key))[0])


def differences(saved: Settings, given: Settings) -> list[tuple[str, Any, Any]]:
    """(dotted key, saved value, given value) wherever a resume would train another run.

    Left out are the keys that may differ, and those where an `auto` was given, which stands for the value the
    run resolved and saved.
    """
    before, now = (
        {leaf.key: leaf.value for leaf in _cut(settings.model_dump(mode="json"), "")}
        for settings in (saved, given)
    )
    different = [
        (key, before[key], value) for key, value in now.items() if value not in (before[key], "auto")
    ]
    # Where an epoch is chosen, which ones are measured decides the result; lazy rows are settled at each.
    chooses = ("eval.every_epochs",) if saved.eval.choose == "best" or saved.head.lazy else ()
    return [row for row in different if row[0] in chooses or not row[0].startswith(FREE_ON_RESUME)]


def _cut(
    values: Mapping[str, Any], origin: str, section: type[Section] = Settings, above: str = ""
) -> Iterator[Given]:
    """The leaves of nested mappings: whatever is no section of the tree is one value (a list of groups, the
    backbone's options)."""
    for key, value in values.items():
        inner = _section_of(section, str(key))
        if inner and isinstance(value, Mapping):
            yield from _cut(value, origin, inner, f"{above}{key}.")
        else:
            yield Given(f"{above}{key}", value, origin)


def _section_of(section: type[Section], key: str) -> type[Section] | None:
    """The section at a key, or that the list there is made of, if any."""
    field = section.model_fields.get(key)
    return next(_sections_in(field.annotation), None) if field else None


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a type is made of: ViewGroup for tuple[ViewGroup, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections_in(part)


def _assigned(assignments: Sequence[str], flag: str) -> list[Given]:
    """The leaves of all words of `--set`, or what it is called.

    Raises: SettingsError if a word has no `=`, its value is not YAML, or a key is assigned two values, or one
        value whole and in part.
    """
    leaves: dict[str, Given] = {}
    for given in (given for word in assignments for given in _leaves_of(word, flag)):
        first = leaves.setdefault(given.key, given)
        if first is not given and first.value != given.value:
            raise SettingsError(f"{given.key} is set twice: {first.origin} and {given.origin}; leave one out")
    for whole, part in itertools.permutations(leaves.values(), 2):
        if part.key.startswith(f"{whole.key}."):
            raise SettingsError(
                f"{whole.key} is set twice: {whole.origin} and, in part, {part.origin}; write one of them"
            )
    return list(leaves.values())


def _leaves_of(word: str, flag: str = "set") -> list[Given]:
    """The leaves of one `--set` word: more than one where a whole section is given, as in views={crop_px:
    96, flip: 0}."""
    origin = f"--{flag} {word}"
    key, _, text = word.partition("=")
    if not key or key == word:
        raise SettingsError(f"{origin}: write --{flag} key=value, as in --{flag} optimizer.lr_peak=1e-3")
    value = parse_yaml(text, origin)
    section: type[Section] | None = Settings
    for part in key.split("."):
        section = _section_of(section, part) if section else None
    return (
        list(_cut(value, origin, section, f"{key}."))
        if section and isinstance(value, Mapping)
        else [Given(key, value, origin)]
    )


def _merge(leaves: Sequence[Given] | Iterator[Given]) -> tuple[dict[str, Any], dict[str, str]]:
    """The nested mapping of all leaves, a later one over an earlier one, and each key's origin."""
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value, origin in leaves:
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise SettingsError(
                    f"{key} (from {origin}): {part} is one value, {place!r}, and has no keys; set it whole"
                )
        place[last] = value
        origins[key] = origin
    return tree, origins


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


def _validate(tree: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    """The checked tree.

    Strict JSON rules: true is no number, "3" is no 3, a list is a tuple, 1 is a float.
    """
    for leaf in _cut(tree, ""):
        for text in _texts_in([leaf.key, leaf.value]):
            if not is_text(text):
                raise SettingsError(f"{leaf.key}: {text!r} {NO_TEXT}{_origin(leaf.key, origins)}")
    try:
        settings = Settings.model_validate_json(json.dumps(tree, default=str), strict=True)
        mistakes = _unread(settings.method, origins)
        if not mistakes:
            return settings
    except ValidationError as error:
        mistakes = _mistakes(error, origins)
    if len(mistakes) == 1:
        raise SettingsError(mistakes[0])
    raise SettingsError("\n  ".join([f"{len(mistakes)} settings are wrong:", *mistakes]))


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, a mapping's keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_in([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def _unread(method: str, origins: Mapping[str, str]) -> list[str]:
    """A line for every key that was given and that the method does not read: it would change nothing, and
    look as if it did."""
    return [
        f"{key}: method {method} does not read it; it is for {' and '.join(readers(key)) or 'no method'}, "
        f"leave it out (from {origin})"
        for key, origin in origins.items()
        if method not in readers(key)
    ]


def _mistakes(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    """A line for every wrong key, in the order of the tree; the alternatives of a union share one."""
    wrong: dict[str, list[str]] = {}
    ends: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "too_short" and item["input"]:  # pydantic's echo of an item that is wrong itself
            continue
        key, holder, own = _locate(item["loc"])
        ends[key] = f", got {item['input']!r}"
        if item["type"] == "extra_forbidden":
            wrong[key], ends[key] = ["unknown key"], f"; {_nearest_key(key, holder)}"
        elif item["type"] == "value_error":  # a rule of tree.py: its text names the values
            wrong[key], ends[key] = [str(item["ctx"]["error"])], ""
        elif item["type"] == "missing":
            wrong[key], ends[key] = ["must be given"], ""
        elif item["type"] == "model_type":
            wrong[key] = [f"must be a section with the keys {', '.join(own.model_fields)}"]
        elif item["type"] in ("tuple_type", "list_type"):
            name = key.rpartition(".")[2]
            wrong.setdefault(key, []).append(f"must be a list{f' of {name}' if own else ''}")
        else:
            wrong.setdefault(key, []).append(_plain(item["msg"]))
    return [
        ": ".join(filter(None, [key, ", or ".join(texts)])) + ends[key] + _origin(key, origins)
        for key, texts in wrong.items()
    ]


def _plain(text: str) -> str:
    """What pydantic says, which speaks of inputs and of JSON, in the words of a recipe."""
    text = re.sub(r"^\w+ should ", "must ", text).replace(" after validation", "")
    for theirs, ours in PLAIN_WORDS.items():
        text = text.replace(theirs, ours)
    return text


def _locate(location: tuple[str | int, ...]) -> tuple[str, type[Section], type[Section] | None]:
    """The dotted key of a place that pydantic names, the section that holds it, and the section it is or
    lists, if any.

    Pydantic adds the alternative's name after a union's key; it is left out.
    """
    parts: list[str] = []
    holder: type[Section] = Settings
    own: type[Section] | None = Settings
    for part in location:
        if isinstance(part, int):
            parts.append(str(part))
        elif own:
            parts.append(part)
            holder, own = own, _section_of(own, part)
    return ".".join(parts), holder, own


def _nearest_key(key: str, holder: type[Section]) -> str:
    """What was meant by an unknown key: the same name elsewhere in the tree, a near one in its section, a
    near one elsewhere."""
    above, _, last = key.rpartition(".")
    everywhere = {leaf.key: leaf.key.rpartition(".")[2] for leaf in _cut(Settings().model_dump(), "")}
    meant = [full for full, name in everywhere.items() if name == last]
    if not meant and (near := nearest(last, holder.model_fields)):
        meant = [f"{above}.{near}" if above else near]
    if not meant and (near := nearest(last, everywhere.values())):
        meant = [full for full, name in everywhere.items() if name == near]
    return (
        f"did you mean {' or '.join(meant)}?"
        if meant
        else f"the keys here are {', '.join(holder.model_fields)}"
    )


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """` (from ...)` for the source that gave a key or what it lies in; nothing where the default is meant."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f" (from {origins[key]})" if key else ""
