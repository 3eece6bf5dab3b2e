"""Every command and snippet in README and docs, as it stands there.

Quick commands run in a folder that has what they name. Of a training, which takes hours, the words and the
settings are checked, as its first second would.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tests.engine.training import small_run
from vitds.cli import COMMANDS, main
from vitds.config.deepspeed import load_ds_config
from vitds.config.flags import TrainFlags
from vitds.config.load import settings_of
from vitds.console import find_command
from vitds.jobs.train import pretrain
from vitds.words import checked_words

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:(?<=\n\n)(?:    .*\n)+)|(?:(?<=```)(?:\w*)\n(?:.*\n)*?(?=```))")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
QUICK = (
    "data info",
    "data list",
    "data preview",
    "data verify",
    "data build digits",
    "recipes",
    "plan",
    "checkpoint",
    "eval",
    "predict",
    "embed",
    "similar",
    "export timm",
    "export hf",
    "export onnx",
    "runs",
    "report",
)
# What cannot be had in a test: a download, a set that its publisher ships, a model with its published
# weights, a run of some minutes.
WORDS_ONLY = (
    "--download",
    "/data",
    "deit_tiny_patch16_224 --data",
    "photos/",
    ".tar",
    "runs/theory-",
    "runs/methods/",
)


class Line(NamedTuple):
    page: str
    command: str


def commands() -> list[Line]:
    """Every line of a code block that begins with vitds, comments left out; forms with placeholders are no
    commands."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for block in BLOCK.findall(text):
            for line in block.splitlines():
                line = line.strip().removeprefix("$ ").partition("  #")[0].strip()
                is_form = "..." in line or "[" in line or re.search(r"\b(RUN|FILE|COMMAND)\b", line)
                if line.startswith("vitds ") and not is_form and ":" not in line.partition(" --")[0]:
                    found.append(Line(page.name, line))
    return sorted(set(found))


@pytest.fixture(scope="module")
def folder(digit_files, tmp_path_factory, rank_pool) -> Path:
    """What the pages' commands name: .beton files, photographs, a recipe, a pretrained and a fine-tuned
    run."""
    root = tmp_path_factory.mktemp("docs")
    names = {
        "train": ("my-train", "train", "my", "k2", "k5", "k5-train", "nette50-train"),
        "test": ("my-test", "test", "other-test"),
    }
    for split, source in zip(("train", "test"), digit_files, strict=True):
        for name in names[split]:
            for suffix in (".beton", ".beton.json"):
                shutil.copy(Path(source).with_suffix(suffix), root / f"{name}{suffix}")
    shutil.copy(ROOT / "vitds" / "recipes" / "idmm_digits.yaml", root / "mine.yaml")
    for label in ("cat", "dog"):
        (root / "photos" / label).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (40, 30), (40 * number, 90, 10)).save(root / "photos" / label / f"{number}.png")
    shutil.copytree(root / "photos" / "cat", root / "new")
    for number in (1, 2):
        Image.open(root / "new" / f"{number}.png").save(root / "new" / f"{number}.jpg")
    data = (str(root / "train.beton"), str(root / "test.beton"))
    small_run(str(root / "runs" / "pre"), data, epochs=1)
    small_run(str(root / "runs" / "fine"), data, epochs=1, method="supervised")
    saved = root / "runs" / "pre" / "checkpoints"
    shutil.copytree(next(saved.glob("step-*")), saved / "step-00012000")
    pretrain(
        recipe="idmm_digits",
        run=str(root / "runs" / "idmm_digits-1"),
        epochs=1,
        set=["log.tensorboard=false", "log.page=false"],
    )
    return root


def is_quick(command: str) -> bool:
    words = command.removeprefix("vitds ")
    return words.startswith(QUICK) and not any(part in command for part in WORDS_ONLY)


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 30 and {line.page for line in commands()} >= {
        "README.md",
        "running.md",
        "data.md",
    }


def several(folded: str) -> tuple[str, ...]:
    """The values of a flag that may be repeated."""
    return tuple(json.loads(folded))


@pytest.mark.parametrize("line", commands(), ids=lambda line: f"{line.page}: {line.command}")
def test_a_command_of_the_pages_has_words_and_settings_that_are_taken(
    line: Line, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    name, function, rest = find_command(COMMANDS, shlex.split(line.command)[1:])
    checked = checked_words(function, rest, name)
    if name not in ("vitds pretrain", "vitds finetune") or "epochs=0" in line.command:
        return
    given = dict(word.removeprefix("--").split("=", 1) for word in checked)
    kinds = {"data": several, "set": several, "epochs": int, "seed": int, "hold_out": float}
    flags = TrainFlags(**{key: kinds.get(key, str)(value) for key, value in given.items()})
    for file in (*flags.data, flags.test, flags.init):
        assert file is None or (folder / file).exists(), f"{file} is named by {line}"
    given = settings_of(name.removeprefix("vitds "), flags)
    load_ds_config(flags.ds_config)
    assert given.epochs > 0


@pytest.mark.parametrize(
    "line", [line for line in commands() if is_quick(line.command)], ids=lambda line: line.command
)
def test_a_quick_command_of_the_pages_runs(
    line: Line, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    if "digits-train.beton" in line.command and not Path("digits-train.beton").exists():
        main(["data", "build", "digits", "--out", "digits.beton"])
    assert main(shlex.split(line.command)[1:]) == 0, capsys.readouterr().err


SHOWN = re.compile(r"^    \$ (vitds (?:data|recipes).*)\n((?:    (?!\$).*\n)+)", re.MULTILINE)


@pytest.mark.parametrize(("command", "output"), SHOWN.findall((ROOT / "README.md").read_text("utf-8")))
def test_the_readme_shows_what_a_command_prints(
    command: str, output: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    assert main(shlex.split(command)[1:]) == 0
    shown, printed = (
        [re.sub(r"[\d.]+ s$", "T s", " ".join(line.split())) for line in text.splitlines()]
        for text in (output, capsys.readouterr().out)
    )
    if "..." not in shown:
        assert shown == printed
        return
    # Lines that are left out; those that are shown stand in the same order.
    places = [printed.index(line) for line in shown if line != "..."]
    assert places == sorted(places) and len(shown) < len(printed)


def test_the_wrong_settings_of_the_pages_are_refused_in_the_words_shown(
    capsys: pytest.CaptureFixture,
) -> None:
    shown = re.search(
        r"    \$ (vitds pretrain --set epochs=0.*)\n((?:    .*\n)+)", (ROOT / "README.md").read_text("utf-8")
    )
    assert main(shlex.split(shown[1])[1:]) == 2
    expected = "".join(line.removeprefix("    ") + "\n" for line in shown[2].splitlines())
    assert capsys.readouterr().err == expected


def snippets() -> list[tuple[str, str]]:
    return [(page.name, code) for page in PAGES for code in PYTHON.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "code"), snippets(), ids=[page for page, _ in snippets()])
def test_a_python_snippet_of_the_pages_runs(
    page: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if "vitds.pretrain(" in code or "vitds.fit(" in code:  # of the paper's length, or of an hour
        assert compile(code, page, "exec").co_names
        return
    names = {"__name__": page}
    exec(compile(code, page, "exec"), names)
    assert names.keys() > {"__name__", "__builtins__"}  # it came to its end, and made something
