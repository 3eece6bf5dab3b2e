"""Recipes: the YAML files under vitds/recipes, and a person's own of the same form.

A packaged recipe starts with four comment lines, `# Command:`, `# Time:`, `# Expect:` and `# About:`. Any
recipe may name another as its `base` and say what differs.
"""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

from vitds.config.names import did_you_mean
from vitds.config.yaml_text import parse_yaml
from vitds.errors import SettingsError

# Of each command: on the embedded digits, and what to begin with on photographs.
DEFAULT_RECIPES = {"pretrain": "idmm_digits", "finetune": "finetune_digits"}
RECIPES_OF_PHOTOGRAPHS = {"pretrain": "idmm_deit_tiny", "finetune": "finetune_deit_tiny_224"}


def _packaged() -> dict[str, Path]:
    folder = importlib.resources.files("vitds") / "recipes"
    return {path.stem: path for path in sorted(map(Path, folder.iterdir())) if path.suffix == ".yaml"}


def list_recipes() -> list[tuple[str, str]]:
    """(name, one line about it) of every packaged recipe, by name."""
    return [(name, read_header(path)["About"]) for name, path in _packaged().items()]


def read_header(path: Path) -> dict[str, str]:
    """The comment lines at the top of a packaged recipe: `# Time: 3 min` gives {"Time": "3 min"}."""
    top = re.match(r"(#.*\n)*", path.read_text("utf-8")).group()
    return dict(re.findall(r"^# (\w+): (.*)$", top, re.MULTILINE))


def _is_path(recipe: str) -> bool:
    return "/" in recipe or recipe.endswith((".yaml", ".yml"))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe's name, or of a path (a word with a slash, or ending in .yaml or .yml).

    Raises: SettingsError if no recipe has the name (names the nearest), or no file stands at the path.
    """
    if _is_path(recipe):
        path = Path(recipe).expanduser()
        if not path.is_file():
            raise SettingsError(f"recipe {recipe}: no such file")
        return path
    packaged = _packaged()
    if recipe not in packaged:
        raise SettingsError(
            f"recipe {recipe} is unknown; {did_you_mean(recipe, packaged)} (a file of your own: its path, "
            "ending in .yaml)"
        )
    return packaged[recipe]


def recipe_layers(recipe: str) -> list[tuple[str, dict[str, Any]]]:
    """Name or path, and settings, of a recipe's `base`, where it names one, and of itself, unchecked.

    A base's file is looked for from the recipe's folder, then from the current one. Its test set belongs to
    its own training data, and is left out where the recipe names others.

    Raises: SettingsError if it or its base cannot be found or read, is not YAML, or holds no mapping of
        settings (names the file); or if the base has a base too.
    """
    path = find_recipe(recipe)
    own = read_mapping(path)
    if "base" not in own:
        return [(recipe, own)]
    name = str(own.pop("base"))
    if _is_path(name) and (path.parent / name).is_file():
        name = str(path.parent / name)
    base = read_mapping(find_recipe(name))
    if "base" in base:
        raise SettingsError(
            f"recipe {recipe}: its base {name} has a base itself, {base['base']}; one step is all there is"
        )
    data, own_data = base.get("data"), own.get("data")
    if isinstance(data, dict) and isinstance(own_data, dict) and "train" in own_data:
        data.pop("test", None)
    return [(name, base), (recipe, own)]


def read_recipe(recipe: str) -> dict[str, Any]:
    """The settings that a recipe gives, over those of its `base` where it names one, unchecked.

    Key by key within a section; lists and the backbone's options are replaced whole.

    Raises: SettingsError as `recipe_layers`.
    """
    (_, settings), *over = recipe_layers(recipe)
    for key, value in (item for _, own in over for item in own.items()):
        is_section = isinstance(value, dict) and isinstance(settings.get(key), dict)
        settings[key] = settings[key] | value if is_section else value
    return settings


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises: SettingsError if the file cannot be read, is not YAML, or holds something else (names the file).
    """
    try:
        values = parse_yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
        ) from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: holds no settings; expected lines like `epochs: 100`")
    return values
