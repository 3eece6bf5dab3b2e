"""The layout's promises, read from the imports in the source.

Rows stand in the order in which data flows; a module imports only from its own row and those above. Imports
stand at the top of a file, so that no cycle hides; only the command line and the package's front import
inside functions, so that help answers at once. Some libraries of others are loaded where they are used, so
that a training starts at once: they can be in no cycle.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (
    *(
        "errors",
        "launcher",
        "terminal",
        "config",
        "batch",
        "rng",
        "schedule",
        "dist",
        "kernels",
        "data",
        "augment",
        "models",
    ),
    *("heads", "methods", "plan", "runs", "evaluate", "use", "engine", "report", "jobs", "bench"),
    *("words", "console", "cli"),
)
FRONT = ("__init__.py", "__main__.py")  # of the package itself: above every row
LAZY = ("cli", "__init__.py")
LOADED_LATE = {"sklearn", "scipy.stats", "matplotlib", "jinja2"}


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, list[str]]]:
    """Every import statement with the modules it may load; `from vitds import dist` may load vitds.dist."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield node, [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield node, [node.module, *(f"{node.module}.{name.name}" for name in node.names)]


def row_of(module: str) -> int | None:
    """The row of vitds.x.y; None for the package itself and other packages."""
    parts = module.split(".")
    return ROWS.index(parts[1]) if parts[0] == "vitds" and len(parts) > 1 and parts[1] in ROWS else None


def upward_imports(package: Path) -> list[str]:
    """file:line of each import from a row below the file's own."""
    found = []
    for file in sorted(package.rglob("*.py")):
        own = file.relative_to(package).parts[0].removesuffix(".py")
        if file.parent == package and file.name in FRONT or own == "recipes":
            continue
        for node, modules in imports(ast.parse(file.read_text())):
            rows = [row for row in map(row_of, modules) if row is not None]
            if rows and max(rows) > ROWS.index(own):
                found.append(f"{file.relative_to(package)}:{node.lineno}")
    return found


def inner_imports(package: Path) -> list[str]:
    """file:line of each import inside a function or class."""
    found = []
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] in LAZY:
            continue
        for scope in ast.walk(ast.parse(file.read_text())):
            if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found += [
                    f"{file.relative_to(package)}:{node.lineno}"
                    for node, modules in imports(scope)
                    if not is_loaded_late(modules[0])
                ]
    return found


def is_loaded_late(module: str) -> bool:
    return any(f"{module}.".startswith(f"{late}.") for late in LOADED_LATE)


def loads(package: Path, module: str) -> set[str]:
    """What importing a module of the package loads: its own modules by way of their top-level imports, and
    other packages' names.
    """
    seen: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        queue += [name.rpartition(".")[0]] if "." in name else []
        file = package.parent.joinpath(*name.split("."))
        file = next((f for f in (file.with_suffix(".py"), file / "__init__.py") if f.exists()), None)
        if name.split(".")[0] == "vitds" and file and name != "vitds":
            queue += [
                found
                for node in ast.parse(file.read_text()).body
                for _, modules in imports_here(node)
                for found in modules
            ]
    return {name.split(".")[0] for name in seen if not name.startswith("vitds")}


def imports_here(node: ast.stmt) -> Iterator[tuple[ast.stmt, list[str]]]:
    """The imports of a top-level statement, function bodies left out."""
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield from imports(node)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / "vitds" / f"{name.replace('__in__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "vitds"


def test_modules_import_only_from_rows_above():
    assert upward_imports(ROOT / "vitds") == []


def test_every_module_belongs_to_a_row():
    names = {
        path.name.removesuffix(".py")
        for path in (ROOT / "vitds").iterdir()
        if path.suffix in ("", ".py") and path.name[0] != "_"
    }
    assert names - set(ROWS) - {"recipes", "ds_configs", "results"} == set()


def test_imports_stand_at_the_top():
    assert inner_imports(ROOT / "vitds") == []


def test_an_import_from_a_row_below_is_found(tmp_path):
    package = write(
        tmp_path,
        rng="from vitds import dist\n",
        data__in__a="import vitds.rng\n",
        engine="from vitds.jobs.x import y\n",
    )
    assert upward_imports(package) == ["engine.py:1", "rng.py:1"]


def test_an_import_inside_a_function_is_found(tmp_path):
    package = write(
        tmp_path,
        cli__in__plan="def f():\n    import torch\n",
        rng="import os\ndef f():\n    import torch\n",
        heads="def f():\n    from sklearn.metrics import x\n    import sklearns\n",
    )
    assert inner_imports(package) == ["heads.py:3", "rng.py:3"]


def test_a_training_starts_without_what_it_needs_at_its_end():
    check = (
        "import vitds.jobs.train, sys\n"
        f"print([name for name in {sorted(LOADED_LATE)} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "module", ["vitds.errors", "vitds.config.load", "vitds.config.deepspeed", "vitds.words", "vitds.cli"]
)
def test_settings_and_command_line_load_no_torch(module):
    assert loads(ROOT / "vitds", module) & {"torch", "deepspeed", "timm", "ffcv", "numpy"} == set()


@pytest.mark.parametrize(
    "module",
    [
        "vitds.evaluate.knn",
        "vitds.evaluate.linear",
        "vitds.runs.backbone",
        "vitds.jobs.evaluate",
        "vitds.jobs.predict",
    ],
)
def test_evaluation_loads_no_deepspeed(module):
    assert "torch" in loads(ROOT / "vitds", module)
    assert "deepspeed" not in loads(ROOT / "vitds", module)


@pytest.mark.parametrize(
    "statement", ["import vitds", "from vitds.cli import main; main(['pretrain', '--help'])"]
)
def test_help_and_the_bare_import_start_without_torch(statement):
    check = f"{statement}\nimport sys; assert not {{'torch', 'deepspeed', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_the_processes_of_the_suite_share_it_by_whole_files(request):
    assert request.node.nodeid.endswith("@tests/test_layering.py")
