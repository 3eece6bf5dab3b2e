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
from vitds.bench.steps import status_bytes
from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, open_beton
from vitds.engine.loop import Trainer
from vitds.engine.memory import module_sizes
from vitds.engine.process import noise_into, start_ranks
from vitds.engine.resolve import resolve_settings
from vitds.jobs.train import build_trainer
from vitds.models.build import build_backbone
from vitds.plan.case import Case, make_case
from vitds.plan.totals import MemoryPlan, plan_memory
from vitds.runs.directory import Run

M_MMAP_THRESHOLD = -3  # of malloc.h
RECIPE = "idmm_digits"
OPTIONS: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 512,
    "depth": 6,
    "num_heads": 8,
    "global_pool": "avg",
}
# Backbones as settings: 76 MB of weights, 19 MB, and so on.
WIDE: dict[str, Any] = {"options": OPTIONS}
NARROW = {"options": OPTIONS | {"embed_dim": 256}}
SHALLOW = {"options": OPTIONS | {"depth": 1}}
TINY = {"options": OPTIONS | {"embed_dim": 24, "depth": 2, "num_heads": 3}}
T2T = {"name": "t2t_vit_7", "options": {}}
PVT = {"name": "pvt_v2_b0", "options": {}}


def measured_and_planned(
    data: str,
    stage: int | str,
    rows: int,
    backbone: dict[str, Any],
    changes: dict[str, Any],
    recipe: str = RECIPE,
) -> tuple[int, int, str]:
    """Train two steps and save a checkpoint.

    What is freed is given back at once meanwhile: glibc would keep freed memory (a fifth of the whole, seen),
    which is no part of any plan.

    Args:
        data: the training file.
        stage: of ZeRO, or the rest of the name of a DeepSpeed JSON.
        rows: of the classifier; 0 for a method without one.
        backbone: its settings.
        changes: settings by their dotted names.
        recipe: whose other settings are taken.
    Returns: bytes by which this rank's process grew from before the model was built; the plan's bytes; its
        largest parts.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    try:
        file = open_beton(Path(data))
        # Code, threads and libraries' own memory are there before what is measured.
        _train(file, stage, min(rows, 60), changes, TINY, recipe)
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status_bytes("VmRSS")
        plan = _train(file, stage, rows, changes, backbone, recipe)
        return status_bytes("VmHWM") - before, plan.peak, plan.line()
    finally:
        # What glibc's own rule grows to.
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)


def _train(
    file: BetonFile,
    stage: int | str,
    rows: int,
    changes: dict[str, Any],
    backbone: dict[str, Any],
    recipe: str,
) -> MemoryPlan:
    """The plan of a case, after its training."""
    folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
    with noise_into(folder / "log.txt"):
        trainer, case = built_trainer(file, folder, stage, rows, changes, backbone, recipe)
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
    backbone: dict[str, Any],
    recipe: str = RECIPE,
) -> tuple[Trainer, Case]:
    """A trainer as a training command builds it, and its case."""
    device = start_ranks()
    ds = load_ds_config(f"zero{stage}")
    given = _settings(recipe, changes, backbone)
    model = build_backbone(given.backbone, crop_px=given.views.crop_px, seed=0)
    settings = resolve_settings(given, model, ds=ds, device=device, rows=rows, images=file.images)
    case = make_case(
        settings,
        ds,
        module_sizes(model, settings),
        rows=rows,
        ranks=dist.world_size(),
        on_gpu=False,
    )
    return build_trainer(Run(folder), settings, ds, file, model, rows, device), case


def _settings(recipe: str, changes: dict[str, Any], backbone: dict[str, Any]) -> Settings:
    own = {
        "views.crop_px": 32,
        "batch.global_images": 8,
        "batch.chunk_images": 2,
        "backbone.patch_drop": 0.0,
        "engine.compile": "off",
        "log.tensorboard": "false",
        "log.page": "false",
    }
    if recipe == RECIPE:
        own["head.init"] = "noise"
    words = [f"{key}={value}" for key, value in (own | changes).items()]
    return load_settings(
        recipe=recipe,
        command="pretrain",
        assignments=words,
        flags={},
        extra={"backbone": backbone},
    )
