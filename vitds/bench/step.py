"""`vitds bench step`: a whole training step beside a bare loop of the same module on one batch."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from pathlib import Path

import torch

from vitds import dist
from vitds.bench.report import print_rows
from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.recipes import DEFAULT_RECIPES
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, open_beton
from vitds.data.digits import embedded_digits
from vitds.data.loader import TrainLoader
from vitds.engine.optimizer import build_optimizer
from vitds.engine.process import start_ranks
from vitds.jobs.timed_steps import train_steps
from vitds.methods import method_class
from vitds.methods.base import SetSize
from vitds.models.build import build_backbone, patch_count
from vitds.models.patches import multiply_patches
from vitds.models.precision import AUTOCAST
from vitds.models.stochastic import StochasticDraws


def bench_step(
    *,
    recipe: str | None = None,
    data: str | None = None,
    ds_config: str | None = None,
    rounds: int = 3,
    as_json: bool = False,
) -> list[dict[str, float | str]]:
    """Milliseconds of a step: ours whole (input, mixing, engine, metrics), and forward plus backward alone,
    in turn.

    Args:
        recipe: of pretraining.
        data: a .beton; the embedded digits by default.
        ds_config: a DeepSpeed JSON or a packaged one's name.
        rounds: of one epoch of ours and as many bare steps.
        as_json: print one JSON object.
    Returns: rows bare, bare with optimizer, step, and what of the step lies outside its own forward and
        backward; ratio is to the first.
    """
    settings = load_settings(
        recipe=recipe or DEFAULT_RECIPES["pretrain"], command="pretrain", flags={"epochs": 1}
    )
    ds = load_ds_config(ds_config)
    device = start_ranks()
    file = open_beton(Path(data) if data else embedded_digits("data")[0])
    rows = method_class(settings.method).rows(SetSize(file.images, len(file.manifest.classes)))
    names = ("bare forward and backward", "bare with optimizer", "step", "step, outside forward and backward")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        ours = train_steps(settings, ds, file, rows, device)
        bare, with_optimizer = bare_steps(ours.settings, file, len(ours.whole_s), ours.accumulation, device)
        times["step"] += ours.whole_s[1:]  # the first one warms up
        times["step, outside forward and backward"] += ours.outside_s[1:]
        times["bare forward and backward"] += bare[1:]
        times["bare with optimizer"] += with_optimizer[1:]
    medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
    floor = medians["bare forward and backward"]
    found = [
        {"name": name, "ms": round(ms, 2), "ratio": round(ms / floor, 3)} for name, ms in medians.items()
    ]
    if dist.is_main():
        print_rows("a training step", found, as_json=as_json)
    return found


def bare_steps(
    settings: Settings, file: BetonFile, steps: int, accumulation: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each step without and with AdamW: no loader, no engine, no metrics, the same tensors each
    time."""
    crops = settings.batch.micro_images * settings.views.count
    backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
    rows = method_class(settings.method).rows(SetSize(file.images, len(file.manifest.classes)))
    method = method_class(settings.method)(settings, backbone, rows)
    method.learn_labels(file.labels)
    module = torch.nn.ModuleList([method.module, *method.outside]).to(device).train()
    if device.type == "cuda":
        for part in method.backbones:
            multiply_patches(part)
    if settings.engine.compile == "on":
        for part in method.backbones:
            part.compile()
    StochasticDraws(backbone, seed=0, rows_per_chunk=crops, patches=patch_count(backbone)).fill(0, 0, 1)
    optimizer = build_optimizer(module, settings.optimizer, lr_scales={})
    share = {"rank": dist.rank(), "ranks": dist.world_size(), "micro_images": settings.batch.micro_images}
    with closing(TrainLoader(file, settings, **share).batches(0, 1)) as batches:
        batch = method.prepare(next(batches), settings, device)
    dtype = AUTOCAST.get(settings.engine.precision)
    bare_s: list[float] = []
    with_optimizer_s: list[float] = []
    for _ in range(steps):
        started = time.perf_counter()
        for _ in range(accumulation):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = method.losses(method.module, batch, 0).sum()
            loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        bare_s.append(time.perf_counter() - started)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        with_optimizer_s.append(time.perf_counter() - started)
    return bare_s, with_optimizer_s
