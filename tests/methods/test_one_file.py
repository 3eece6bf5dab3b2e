"""A method is one file: its name stands in its module, in its section of the settings, in recipes, tests and
docs, and nowhere else."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from vitds.config.load import load_settings
from vitds.config.methods import METHODS
from vitds.config.recipes import list_recipes, read_recipe
from vitds.methods import method_class
from vitds.methods.base import Method

PACKAGE = Path(__file__).parents[2] / "vitds"
# English words too: a comment or docstring may say "supervised training".
NAMES = re.compile(rf"\b({'|'.join(METHODS)})\b", re.IGNORECASE)


def words_of_code(text: str) -> list[tuple[int, str]]:
    """(line, word) of every name and every text in a Python file, docstrings and comments left out."""
    tree = ast.parse(text)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.append((node.lineno, node.value))
        for field in ("id", "attr", "name", "arg", "module"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                found.append((getattr(node, "lineno", 0), word))
    return found


def places(package: Path) -> list[str]:
    """file:line of every method's name outside the files that may have it."""
    allowed = {package / "config" / "methods.py", *(package / "methods" / f"{name}.py" for name in METHODS)}
    return [
        f"{file.relative_to(package)}:{line}"
        for file in sorted(package.rglob("*.py"))
        if file not in allowed
        for line, word in words_of_code(file.read_text("utf-8"))
        if NAMES.search(word)
    ]


def test_no_methods_name_stands_outside_its_own_places() -> None:
    assert places(PACKAGE) == []


def test_a_name_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    text = '"""Not this idmm."""\nif settings.method == "idmm":  # nor this\n    simclr = 1\n'
    (tmp_path / "engine" / "loop.py").write_text(text)
    assert sorted(places(tmp_path)) == ["engine/loop.py:2", "engine/loop.py:3"]


def test_methods_files_do_not_know_each_other() -> None:
    for name in METHODS:
        others = re.compile(rf"\b({'|'.join(set(METHODS) - {name})})\b")
        text = (PACKAGE / "methods" / f"{name}.py").read_text("utf-8")
        assert not [word for _, word in words_of_code(text) if others.search(word)], name


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_the_file_of_its_name_with_a_recipe_and_says_what_the_contract_asks(name: str) -> None:
    method = method_class(name)
    assert issubclass(method, Method) and not inspect.isabstract(method)
    assert Path(inspect.getfile(method)).stem == name
    assert any(read_recipe(recipe)["method"] == name for recipe, _ in list_recipes())


@pytest.mark.parametrize("recipe", [recipe for recipe, _ in list_recipes()])
def test_a_recipe_gives_no_setting_that_its_method_does_not_read(recipe: str) -> None:
    assert load_settings(recipe=recipe, command=None, flags={}).method == read_recipe(recipe)["method"]
