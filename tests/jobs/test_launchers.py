"""The commands as a person types them: DeepSpeed's launcher and the installed command, real processes,
embedded digits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.training import free_port
from vitds.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
QUICK = (
    "--epochs",
    "1",
    "--set",
    "batch.chunk_images=24",
    "--set",
    "views.crop_px=8",
    "--set",
    "log.tensorboard=false",
    "--set",
    "log.page=false",
)


def deepspeed() -> tuple[str, ...]:
    """The launcher on a port of its own: other runs on this machine may have the usual one."""
    return ("deepspeed", "--master_port", str(free_port()))


def run_command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    # The environment's ninja before any other.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    } | {"PATH": path}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("ranks", [(), ("--num_gpus", "2")], ids=["one rank without flags", "two ranks"])
def test_the_launch_script_under_deepspeed(tmp_path: Path, ranks: tuple[str, ...]) -> None:
    words = (
        *deepspeed(),
        *ranks,
        str(ROOT / "launch/pretrain.py"),
        "--ds_config",
        str(ROOT / "ds_configs/zero2.json"),
        *QUICK,
    )
    done = run_command(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "idmm_digits-1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == len(read_metrics(run / "metrics.jsonl")) > 0 and "20" in summary["knn"]
    assert (run / "curve.png").stat().st_size > 10_000
    assert f"kNN, k = 20: top-1 {summary['knn']['20']['top1']:.1f} %" in done.stdout


def test_an_error_is_one_line_and_a_status_under_the_launcher(tmp_path: Path) -> None:
    done = run_command(
        tmp_path, *deepspeed(), "--num_gpus", "2", str(ROOT / "launch/pretrain.py"), "--data", "gone.beton"
    )
    assert done.returncode == 3
    said = [line for line in done.stderr.splitlines() if "gone.beton" in line and not line.startswith("[")]
    assert said and "Traceback" not in done.stderr
