"""A real training whose process says how much memory it took, beside what the plan says."""

from __future__ import annotations

import ctypes
import gc
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.bench.head import _status_bytes
from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, open_beton
from vitds.engine.loop import Trainer
from vitds.engine.memory import backbone_sizes
from vitds.engine.process import noise_into, start_ranks
from vitds.engine.resolve import resolve_settings
from vitds.jobs.train import build_trainer
from vitds.models.build import build_backbone
from vitds.plan.case import Case, make_case
from vitds.plan.totals import MemoryPlan, plan_memory
from vitds.runs.directory import Run

M_MMAP_THRESHOLD = -3  # of malloc.h
WIDE: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 512,
    "depth": 6,
    "num_heads": 8,
    "global_pool": "avg",
}  # 76 MB
NARROW = WIDE | {"embed_dim": 256}  # 19 MB
TINY = WIDE | {"embed_dim": 24, "depth": 2, "num_heads": 3}


def measured_and_planned(
    data: str, stage: int | str, rows: int, options: dict[str, Any], changes: dict[str, Any]
) -> tuple[int, int, str]:
    """Bytes that this rank's process grew by from before the model was built, two steps and a checkpoint long; the plan's; its parts.

    What is freed is given back at once meanwhile: glibc would keep freed memory (a fifth of the whole, seen), no part of any plan.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    try:
        file = open_beton(Path(data))
        _train(file, stage, 60, changes, TINY)  # code, threads and libraries' own memory are there before
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = _status_bytes("VmRSS")
        plan = _train(file, stage, rows, changes, options)
        return _status_bytes("VmHWM") - before, plan.peak, plan.line()
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # what glibc's own rule grows to


def _train(
    file: BetonFile, stage: int | str, rows: int, changes: dict[str, Any], options: dict[str, Any]
) -> MemoryPlan:
    folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
    with noise_into(folder / "log.txt"):
        trainer, case = built_trainer(file, folder, stage, rows, changes, options)
        trainer.rate = replace(trainer.rate, total=2)
        trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return plan_memory(case)


def built_trainer(
    file: BetonFile,
    folder: Path,
    stage: int | str,
    rows: int,
    changes: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Trainer, Case]:
    """A trainer as a training command builds it, and its case."""
    device, ds, given = start_ranks(), load_ds_config(f"zero{stage}"), _settings(changes, options)
    backbone = build_backbone(given.backbone, crop_px=given.views.crop_px, seed=0)
    settings = resolve_settings(given, backbone, ds=ds, device=device, rows=rows, images=file.images)
    case = make_case(
        settings,
        ds,
        backbone_sizes(backbone, settings),
        rows=rows,
        ranks=dist.world_size(),
        on_gpu=False,
    )
    return build_trainer(Run(folder), settings, ds, file, backbone, rows, device), case


def _settings(changes: dict[str, Any], options: dict[str, Any]) -> Settings:
    own = {
        "views.crop_px": 32,
        "batch.global_images": 8,
        "batch.chunk_images": 2,
        "engine.compile": "off",
        "log.tensorboard": "false",
    }
    own |= {"backbone.patch_drop": 0.0, "head.init": "noise"}
    words = [f"{key}={value}" for key, value in (own | changes).items()]
    return load_settings(
        recipe="idmm_digits",
        command="pretrain",
        assignments=words,
        flags={},
        extra={"backbone": {"options": options}},
    )
