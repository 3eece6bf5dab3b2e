"""The wheel, installed into an environment without the source, trains on the digits."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def other_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with our wheel of its own, and with this one's packages, but for the editable vitds.

    A line of a .pth file adds a folder to the path without reading the .pth files in it, so the editable
    link stays behind.
    """
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        ROOT,
        cwd=folder,
    )
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "env" / "native").symlink_to(Path(sys.prefix) / "native")
    (wheel,) = folder.glob("vitds-*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    return folder


def test_the_wheel_trains_on_the_digits_without_the_source(other_environment: Path) -> None:
    vitds = other_environment / "env" / "bin" / "vitds"
    python = other_environment / "env" / "bin" / "python"
    where = run(python, "-c", "import vitds; print(vitds.__file__)", cwd=other_environment).strip()
    assert where.startswith(str(other_environment))
    settings = ("views.crop_px=8", "log.tensorboard=false", "engine.precision=fp32")
    words = [word for setting in settings for word in ("--set", setting)]
    run(vitds, "pretrain", "--ds_config", "zero1", "--epochs", "1", *words, cwd=other_environment)
    summary = json.loads((other_environment / "runs" / "idmm_digits-1" / "summary.json").read_text())
    assert summary["steps"] > 0 and "20" in summary["knn"]
    # The page's template, style sheet and script are in the wheel.
    assert (other_environment / "runs" / "idmm_digits-1" / "report.html").exists()
