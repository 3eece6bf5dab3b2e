"""Finished runs for the tests of the page, and a browser that opens it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.engine import training
from tests.engine.training import small_run_path
from tests.report import browser as chromium
from vitds.cli import main
from vitds.runs.checkpoint import list_checkpoints

# As a class: it ends a script, an attribute and an element, and is longer than a phone is wide.
HOSTILE = """</script><img src=x onerror=alert(1)>"'&{{ 7*7 }} """ + "x" * 60


# Its last features are a grid of 2 x 2.
RESNET = {key.replace(".", "__"): value for key, value in training.RESNET.items()} | {"views__crop_px": 64}


@pytest.fixture(scope="session")
def browser() -> Iterator[chromium.Browser]:
    """One for the session; skips, saying why, where Chromium is missing and cannot be installed."""
    if reason := chromium.installed():
        pytest.skip(reason)
    with chromium.started() as started:
        yield started


@pytest.fixture(scope="session")
def hostile_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Digits of three classes, one with a hostile name, in hostile files; 24 training and 12 test images."""
    folder, digits = tmp_path_factory.mktemp("hostile"), load_digits()
    (folder / "images").mkdir()
    with open(folder / "labels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "label"))
        for label, name in enumerate((HOSTILE, "one", "two")):
            for image in np.flatnonzero(digits.target == label)[:12]:
                pixels = Image.fromarray((digits.images[image] * 15.9).astype(np.uint8))
                pixels.resize((60, 50)).save(folder / "images" / f"<b>{image}.png")
                table.writerow((f"<b>{image}.png", name))
    words = ["--labels", str(folder / "labels.csv"), "--test_fraction", "0.34", "--workers", "1"]
    assert main(["data", "build", str(folder / "images"), "--out", str(folder / "h.beton"), *words]) == 0
    return str(folder / "h-train.beton"), str(folder / "h-test.beton")


@pytest.fixture(scope="session")
def runs(rank_pool: Callable, digit_files, hostile_files, tmp_path_factory) -> dict[str, Path]:
    """By name: pretrained with probes and checkpoints; fine-tuned with two seeds and with hostile names; a
    ResNet; one of images without a test half."""
    folder = tmp_path_factory.mktemp("runs")
    alone = (digit_files[0], None)
    kinds = {
        "pre": (digit_files, "idmm", {"eval__every_epochs": 1, "checkpoint__every_epochs": 1}),
        "fine-seed0": (digit_files, "supervised", {}),
        "fine-seed1": (digit_files, "supervised", {"seed": 1}),
        "hostile": (hostile_files, "supervised", {}),
        "resnet": (digit_files, "supervised", RESNET),
        "alone": (alone, "idmm", {}),
    }
    return {
        name: Path(rank_pool(1).run(small_run_path, str(folder / name), data, method=method, **changes)[0])
        for name, (data, method, changes) in kinds.items()
    }


@pytest.fixture(scope="session")
def pages(runs: dict[str, Path], tmp_path_factory) -> dict[str, Path]:
    """A page of each run, `pre` with the figures of its theory along training, and one of three."""
    assert main(["eval", "theory", *map(str, list_checkpoints(runs["pre"] / "checkpoints"))]) == 0
    for run in runs.values():
        assert main(["report", str(run)]) == 0
    several = tmp_path_factory.mktemp("several") / "page.html"
    names = [str(runs[name]) for name in ("fine-seed0", "fine-seed1", "pre")]
    assert main(["report", *names, "--out", str(several)]) == 0
    return {name: run / "report.html" for name, run in runs.items()} | {"several": several}


@pytest.fixture
def own_run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A fine-tuned run to change."""
    shutil.copytree(
        runs["fine-seed0"], tmp_path / "run", ignore=shutil.ignore_patterns("page.json", "*.html")
    )
    return tmp_path / "run"
