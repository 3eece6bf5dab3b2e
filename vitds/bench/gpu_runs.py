"""`vitds bench gpu`, parts resume, train and resume_compiled: whole runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vitds.bench.gpu_check import Check
from vitds.config.deepspeed import load_ds_config
from vitds.data.beton import open_beton
from vitds.engine.process import start_ranks
from vitds.errors import RunError, Stopped
from vitds.jobs.timed_steps import train_steps
from vitds.jobs.train import pretrain
from vitds.runs.metrics import read_metrics

# 24 steps, on so few images that the digits suffice.
EPOCHS, EPOCH_STEPS, STOPPED_AFTER = 8, 3, 12
TRAIN_EPOCHS = 30


def resume(check: Check) -> None:
    """A deterministic run stopped in the middle ends in the same bytes; what deterministic kernels cost."""
    _compare(check, compiled="off")
    file = open_beton(_step_images(check))
    device, ds = start_ranks(), load_ds_config(None)
    milliseconds = {}
    for deterministic in (False, True):
        choice = check.choose(engine__compile="off", engine__deterministic=str(deterministic).lower())
        settings = choice.settings.model_copy(update={"epochs": EPOCHS})
        timed = train_steps(settings, ds, file, file.images, device)
        milliseconds[deterministic] = 1000 * statistics.median(timed.whole_s[1:])
    check.found("a step", milliseconds[False], "ms")
    cost = milliseconds[True] / milliseconds[False]
    check.found("a deterministic step, to that", cost, "x", goal="<= 1.15")


def resume_compiled(check: Check) -> None:
    """The same bytes where the backbone is compiled."""
    _compare(check, compiled="on")


def train(check: Check) -> None:
    """A whole training: the curve of its loss."""
    epochs = 2 if check.toy else TRAIN_EPOCHS
    choice, run = check.choose(engine__compile="on"), check.work / "train"
    file = _step_images(check) if check.toy else check.images()
    pretrain(recipe=choice.recipe, set=choice.words, data=str(file), run=str(run), epochs=epochs)
    lines = read_metrics(run / "metrics.jsonl")
    shutil.copy(run / "metrics.jsonl", check.out / "train-metrics.jsonl")
    for epoch in sorted({0, epochs // 3, 2 * epochs // 3, epochs - 1}):
        own = [line["loss"] for line in lines if line["epoch"] == epoch]
        check.found(f"loss in epoch {epoch + 1} of {epochs}", statistics.mean(own))
    rate = statistics.median(line["time/images_per_s"] for line in lines)
    check.found("in training, median step", rate, "images/s")


def _step_images(check: Check) -> Path:
    return check.images("raw", total=EPOCH_STEPS * check.choose().settings.batch.global_images)


def _compare(check: Check, *, compiled: str) -> None:
    """Two runs side by side, one of them stopped and started again.

    Raises: RunError if their weights or metrics differ, or if the stopped one ended before the signal.
    """
    choice = check.choose(engine__compile=compiled, engine__deterministic="true")
    file = _step_images(check)

    def start(name: str) -> subprocess.Popen:
        """A training in a run directory of this name, or one that goes on there."""
        run = check.work / f"{name}-{compiled}"
        words = (*choice.flags, "--data", str(file), "--epochs", str(EPOCHS), "--run", str(run))
        return subprocess.Popen([sys.executable, "-m", "vitds", "pretrain", *words])

    straight, stopped = start("straight"), start("stopped")
    at = _stop_in_the_middle(stopped, check.work / f"stopped-{compiled}" / "metrics.jsonl")
    again = start("stopped").wait()
    if status := straight.wait() or again:
        raise RunError(f"a run ended with status {status}; see log.txt")
    one, other = (_outcome(check.work / f"{name}-{compiled}") for name in ("straight", "stopped"))
    name = f"{EPOCHS * EPOCH_STEPS} steps straight, and stopped after {at} and resumed, compile {compiled}"
    differ = [kind for kind in one if one[kind] != other[kind]]
    check.found(name, f"other {', '.join(differ)}" if differ else "equal bytes", goal="equal bytes")
    if differ:
        raise RunError(f"{name}: {', '.join(differ)} differ")


def _stop_in_the_middle(process: subprocess.Popen, metrics: Path) -> int:
    """TERM after half of the steps; the steps that it had made when it ended."""
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= STOPPED_AFTER:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    if process.wait() != Stopped.exit_code:
        raise RunError(f"the run that was to be stopped ended with status {process.returncode}; see log.txt")
    return len(read_metrics(metrics))


def _outcome(run: Path) -> dict[str, Any]:
    """What has to be equal: the weights' hash, and the metrics without their times."""
    lines = read_metrics(run / "metrics.jsonl")
    kept = [{key: line[key] for key in line if not key.startswith("time/")} for line in lines]
    weights = hashlib.sha256((run / "backbone.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, "metrics": json.dumps(kept)}
