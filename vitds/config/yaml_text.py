"""YAML as people expect it: YAML 1.2's scalars, no key twice, and a mistake with its file and line.

PyYAML reads YAML 1.1, where `1e-3` is a string, `off` a boolean, `1:30` a number in base sixty and
`2026-01-01` a date.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from vitds.errors import SettingsError

# The core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3.2), each with its first letters; the first
# match counts.
SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class Loader(yaml.SafeLoader):
    """Reads plain data only."""

    yaml_implicit_resolvers: dict = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Builds a value whole at once, which refuses one that holds itself."""
        return super().construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuses a key that stands twice, of which PyYAML takes the last."""
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            twice = next(i for i, key in enumerate(keys) if key in keys[:i])
            raise yaml.constructor.ConstructorError(
                None, None, f"key {keys[twice]} stands twice", node.value[twice][0].start_mark
            )
        return mapping


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back to the same values."""

    yaml_implicit_resolvers: dict = {}

    def represent_list(self, values: list) -> yaml.SequenceNode:
        """In one line, unless it holds mappings."""
        return self.represent_sequence(
            "tag:yaml.org,2002:seq", values, flow_style=not any(isinstance(v, dict) for v in values)
        )


Dumper.add_representer(list, Dumper.represent_list)


for _name, (_pattern, _first) in SCALARS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document.

    Args:
        where: what the text is, for messages: a file's path, or a flag.
    Raises: SettingsError if the text is not YAML, or has a key twice (names `where`, and line and column of a
        text with lines).
    """
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if "\n" in text else ""
        raise SettingsError(f"{where}{place}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SettingsError(
            f"{where}:{line}: not valid YAML: character {error.character!r} is not allowed"
        ) from None
    except Exception as error:  # a tag, as in !!int abc, a number too long, or brackets too deep
        raise SettingsError(f"{where}: not valid YAML: a value cannot be read: {error}") from None


def dump_yaml(values: Any) -> str:
    """YAML text, a key a line and plain lists on one line.

    `parse_yaml` gives equal values back, floats to the last bit.
    """
    return yaml.dump(
        values, Dumper=Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120
    )
