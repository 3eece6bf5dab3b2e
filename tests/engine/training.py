"""Small real trainings that tests start on real ranks: the recipe's whole path, from .beton to weights."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

from deepspeed.accelerator import get_accelerator

from tests.ranks import ForkedProgram
from vitds import dist
from vitds.cli import main
from vitds.config.deepspeed import load_ds_config
from vitds.config.methods import readers
from vitds.engine import process, resolve, watchdog
from vitds.errors import Stopped
from vitds.jobs.train import finetune, pretrain
from vitds.runs.checkpoint import list_checkpoints
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# 52 images in steps of 24: three steps an epoch, the last with 4 real images. Six chunks of 4 divide over 1,
# 2 and 3 ranks.
SMALL: dict[str, Any] = {
    "views.crop_px": 16,
    "views.groups": "[{name: global, views: 2, scale: [0.14, 1.0]}, "
    "{name: local, views: 1, scale: [0.05, 0.4]}]",
    "batch.global_images": 24,
    "batch.chunk_images": 4,
    "backbone.name": "vit_tiny_patch16_224",
    "backbone.options": "{patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}",
    "backbone.drop_path": 0.2,
    "head.init": "noise",
    "optimizer.lr_peak": 1e-2,
    "engine.precision": "fp32",
    "engine.compile": "off",
    "log.tensorboard": "false",
    "log.page": "false",
    "eval.knn_k": "[5]",
}


# A backbone with BatchNorm, whose running statistics are state that no optimizer knows. At 16 px torch 2.14
# gives a bf16 convolution over one pixel a gradient out of memory nobody wrote, on processors like this one.
RESNET = {
    "backbone.name": "resnet18",
    "backbone.options": "{layers: [1, 1, 1, 1], channels: [8, 8, 16, 24]}",
    "backbone.patch_drop": 0,
    "views.crop_px": 32,
}


# What a recipe says of the method itself.
RECIPES = {
    "idmm": "idmm_digits",
    "supervised": "finetune_digits",
    "simclr": "simclr_digits",
    "mocov3": "mocov3_digits",
    "lejepa": "lejepa_digits",
    "supcon": "supcon_digits",
    "dino": "dino_digits",
    "mae": "mae_digits",
}
TWO_VIEWS = (
    "[{name: first, views: 1, scale: [0.3, 1.0]}, {name: second, views: 1, scale: [0.3, 1.0], solarise: 0.3}]"
)
METHODS: dict[str, dict[str, Any]] = {
    "idmm": {},
    "supervised": {"views.groups": "[{name: train, views: 1, scale: [0.3, 1.0]}]"},
    "simclr": {
        "views.groups": "[{name: views, views: 2, scale: [0.3, 1.0]}]",
        "simclr.hidden": 32,
        "simclr.width": 16,
    },
    "mocov3": {
        "views.groups": TWO_VIEWS,
        "mocov3.hidden": 32,
        "mocov3.width": 16,
        # A batch norm over four nearly equal features makes much of rounding: eight images a chunk, small
        # steps.
        "batch.global_images": 48,
        "batch.chunk_images": 8,
        "optimizer.lr_peak": 3e-4,
    },
    # The projector's norms as above.
    "lejepa": {
        "lejepa.hidden": 32,
        "lejepa.width": 16,
        "lejepa.directions": 32,
        "batch.global_images": 48,
        "batch.chunk_images": 8,
        "optimizer.lr_peak": 1e-3,
    },
    "dino": {
        "dino.prototypes": 32,
        "dino.hidden": 24,
        "dino.width": 16,
        "dino.momentum": 0.6,
        "optimizer.lr_peak": 1e-3,
    },
    # Two views, of which probes say how alike they are.
    "mae": {"backbone.patch_drop": 0.5, "mae.width": 32, "views.groups": "[{name: view, views: 2}]"},
    "supcon": {"views.groups": "[{name: views, views: 2, scale: [0.3, 1.0]}]", "supcon.width": 16},
}


def small_run(
    run: str,
    data: tuple[str, str],
    *,
    stage: int | str = 0,
    method: str = "idmm",
    precision: str = "fp32",
    backbone: str = "vit",
    epochs: int = 2,
    **changes: Any,
) -> Run:
    """Train on this rank; changes are settings with `__` for the dot: head__kind="sharded".

    Args:
        precision: fp32, fp16, bf16 (autocast), or bf16_parameters: DeepSpeed's own, with float32 masters. All
            can be had here: a CPU is slow at them, and as exact.
    """
    settings = SMALL | METHODS[method] | {key.replace("__", "."): value for key, value in changes.items()}
    settings |= {"engine.precision": precision.partition("_")[0]} | (RESNET if backbone == "resnet" else {})
    settings = {key: value for key, value in settings.items() if method in readers(key)}
    job = finetune if method == "supervised" else pretrain
    words = [f"{key}={value}" for key, value in settings.items()]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(resolve, "resolve_precision", lambda wanted, device, has_teacher: wanted),
        mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda accelerator: True),
    ):
        ds_config = f"zero{stage}"
        if precision == "bf16_parameters":
            values = dict(load_ds_config(ds_config).values) | {
                "bf16": {"enabled": True},
                "torch_autocast": {"enabled": False},
            }
            ds_config = f"{folder}/bf16.json"
            Path(ds_config).write_text(json.dumps(values))
        return job(
            recipe=RECIPES[method],
            run=run,
            data=data[0],
            test=data[1],
            epochs=epochs,
            ds_config=ds_config,
            set=words,
        )


def small_run_path(run: str, data: tuple[str, str], **options: Any) -> str:
    """The same, for a pool of ranks to call."""
    return str(small_run(run, data, **options).path)


def outcome(run: Path) -> tuple[bytes, list[str]]:
    """All of a finished run that is promised to the bit."""
    return (run / "backbone.safetensors").read_bytes(), untimed(run)


def rewound(run: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run as a kill leaves it that came when `step` was the last step saved, and more
    steps were logged."""
    shutil.copytree(run, copy)
    for name in ("summary.json", "backbone.safetensors", "head.safetensors"):
        (copy / name).unlink(missing_ok=True)
    saved = list_checkpoints(copy / "checkpoints")
    for path in saved:
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    assert list_checkpoints(copy / "checkpoints")[-1].name == f"step-{step:08d}"
    return copy


def small_losses(run: str, data: tuple[str, str], **options: Any) -> list[float]:
    """The loss of each step of a small run."""
    return [line["loss"] for line in read_metrics(small_run(run, data, **options).metrics)]


def untimed(run: Path) -> list[str]:
    """The lines of metrics.jsonl without their `time/` keys, as text."""
    lines = read_metrics(run / "metrics.jsonl")
    return [
        json.dumps({key: value for key, value in line.items() if not key.startswith("time/")})
        for line in lines
    ]


def stopped_run(
    run: str,
    data: tuple[str, str],
    *,
    after_lines: int,
    number: int = signal.SIGUSR1,
    on_rank: int = 0,
    **options: Any,
) -> str:
    """A small run that gets a signal on one of its ranks once metrics.jsonl has so many lines; returns what
    Stopped says."""
    if dist.rank() == on_rank:
        signal_after_lines(Path(run), after_lines, number)
    try:
        small_run(run, data, **options)
    except Stopped as stop:
        return str(stop)
    return "ran to its end"


def signal_after_lines(run: Path, lines: int, number: int = signal.SIGUSR1) -> None:
    """Send this process a signal as soon as the run's metrics have so many lines."""

    def watch() -> None:
        while len(read_metrics(run / "metrics.jsonl")) < lines:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def words_of(
    run: Path, data: tuple[str, str], *, epochs: int, stage: str = "0", **changes: object
) -> list[str]:
    """The words of a small pretraining, as small_run gives it settings."""
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    words = [
        "--recipe",
        "idmm_digits",
        "--run",
        str(run),
        "--data",
        data[0],
        "--test",
        data[1],
        "--epochs",
        str(epochs),
        "--ds_config",
        f"zero{stage}",
    ]
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_rank_process(
    rank: int,
    port: int,
    words: list[str],
    *,
    ranks: int = 2,
    meeting_s: float = 60.0,
    hung_after_s: float = 1500.0,
) -> ForkedProgram:
    """One rank of `vitds pretrain` as a process of its own; what it says is in its `stderr`."""
    group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    return ForkedProgram(
        _run_rank,
        words,
        meeting_s,
        hung_after_s,
        environment=group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    )


def _run_rank(words: list[str], meeting_s: float, hung_after_s: float) -> int:
    """A run as a person starts it, which soon loses patience with ranks that do not come; SIGUSR2 makes its
    main thread hang, with a watchdog that soon loses patience too.
    """

    def hang(*_: object) -> None:
        watchdog.HUNG_AFTER_S = 1.0
        time.sleep(600)

    watchdog.HUNG_AFTER_S = hung_after_s
    process.MEETING_TIMEOUT = datetime.timedelta(seconds=meeting_s)
    signal.signal(signal.SIGUSR2, hang)
    return main(["pretrain", *words])
