"""The leaves of a settings tree: (key, value, origin), so that one rule merges all sources and a message can
say where a value came from.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vitds.config.tree import Section, Settings
from vitds.config.yaml_text import parse_yaml
from vitds.errors import SettingsError


class Given(NamedTuple):
    """A value that one source gives: its dotted key, and words that tell a person where it stands."""

    key: str
    value: Any
    origin: str


def cut(
    values: Mapping[str, Any], origin: str, section: type[Section] = Settings, above: str = ""
) -> Iterator[Given]:
    """The leaves of nested mappings: whatever is no section of the tree is one value (a list of groups, the
    backbone's options)."""
    for key, value in values.items():
        inner = section_of(section, str(key))
        if inner and isinstance(value, Mapping):
            yield from cut(value, origin, inner, f"{above}{key}.")
        else:
            yield Given(f"{above}{key}", value, origin)


def assigned_leaves(assignments: Sequence[str], flag: str) -> list[Given]:
    """The leaves of all words of `--set`, or what it is called.

    Raises: SettingsError if a word has no `=`, its value is not YAML, or a key is assigned two values, or one
        value whole and in part.
    """
    leaves: dict[str, Given] = {}
    for given in (given for word in assignments for given in leaves_of_word(word, flag)):
        first = leaves.setdefault(given.key, given)
        if first is not given and first.value != given.value:
            raise SettingsError(f"{given.key} is set twice: {first.origin} and {given.origin}; leave one out")
    for whole, part in itertools.permutations(leaves.values(), 2):
        if part.key.startswith(f"{whole.key}."):
            raise SettingsError(
                f"{whole.key} is set twice: {whole.origin} and, in part, {part.origin}; write one of them"
            )
    return list(leaves.values())


def leaves_of_word(word: str, flag: str = "set") -> list[Given]:
    """The leaves of one `--set` word: more than one where a whole section is given, as in views={crop_px:
    96, flip: 0}."""
    origin = f"--{flag} {word}"
    key, _, text = word.partition("=")
    if not key or key == word:
        raise SettingsError(f"{origin}: write --{flag} key=value, as in --{flag} optimizer.lr_peak=1e-3")
    value = parse_yaml(text, origin)
    section: type[Section] | None = Settings
    for part in key.split("."):
        section = section_of(section, part) if section else None
    return (
        list(cut(value, origin, section, f"{key}."))
        if section and isinstance(value, Mapping)
        else [Given(key, value, origin)]
    )


def merge(leaves: Sequence[Given] | Iterator[Given]) -> tuple[dict[str, Any], dict[str, str]]:
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


def section_of(section: type[Section], key: str) -> type[Section] | None:
    """The section at a key, or that the list there is made of, if any."""
    field = section.model_fields.get(key)
    return next(_sections_in(field.annotation), None) if field else None


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a type is made of: ViewGroup for tuple[ViewGroup, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections_in(part)
