"""`vitds recipes` and `vitds recipes show R`."""

from __future__ import annotations

from vitds.config.load import dump_settings, load_settings
from vitds.config.recipes import list_recipes


def print_recipes() -> None:
    """A line for every packaged recipe."""
    recipes = list_recipes()
    width = max(len(name) for name, _ in recipes)
    for name, about in recipes:
        print(f"{name:{width}}  {about}")


def show_recipe(recipe: str) -> None:
    """The whole settings tree of a recipe, as YAML.

    Raises: SettingsError if there is no such recipe, or it is wrong.
    """
    print(dump_settings(load_settings(recipe=recipe, command=None, flags={})), end="")
