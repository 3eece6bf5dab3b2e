"""docs/configuration.md names every setting with its default, and every packaged DeepSpeed file."""

import re
from pathlib import Path

from vitds.config.tree import Section, Settings
from vitds.config.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "configuration.md").read_text("utf-8")


def defaults(section: Section, above: str = "") -> dict[str, object]:
    """Every leaf of the tree with its value, as YAML would give it."""
    leaves: dict[str, object] = {}
    for key, value in section:
        if isinstance(value, Section):
            leaves |= defaults(value, f"{above}{key}.")
        else:
            leaves[f"{above}{key}"] = section.model_dump(mode="json")[key]
    return leaves


def test_table_has_every_setting_with_its_default():
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| `(.*?)` \|", TEXT, re.MULTILINE)
    assert {key: parse_yaml(text, key) for key, text in rows} == defaults(Settings())


def test_table_has_every_packaged_deepspeed_file():
    names = re.findall(r"^\| `((?:zero|large)\w+)`", TEXT, re.MULTILINE)
    assert sorted(names) == sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
