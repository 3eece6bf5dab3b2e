"""A merged tree becomes a checked `Settings`, or one message that lists every mistake in a recipe's words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from vitds.config.leaves import cut, section_of
from vitds.config.methods import readers
from vitds.config.names import NO_TEXT, is_text, nearest
from vitds.config.tree import Section, Settings
from vitds.errors import SettingsError

PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid array": "a list",
    "an object": "a mapping, {key: value}",
    "match pattern": "be of the form",
}


def validate(tree: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    """The checked tree.

    Strict JSON rules: true is no number, "3" is no 3, a list is a tuple, 1 is a float.

    Args:
        tree: nested mappings of all sources.
        origins: of each dotted key, where it was given.
    Raises: SettingsError with every mistake.
    """
    for leaf in cut(tree, ""):
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
            holder, own = own, section_of(own, part)
    return ".".join(parts), holder, own


def _nearest_key(key: str, holder: type[Section]) -> str:
    """What was meant by an unknown key: the same name elsewhere in the tree, a near one in its section, a
    near one elsewhere."""
    above, _, last = key.rpartition(".")
    everywhere = {leaf.key: leaf.key.rpartition(".")[2] for leaf in cut(Settings().model_dump(), "")}
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
