"""`vitds bench step`: a whole training step beside a bare loop of the same backbone and head on fixed synthetic tensors."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitds.batch import Targets
from vitds.bench.report import print_rows
from vitds.config.deepspeed import DsConfig, load_ds_config
from vitds.config.load import load_settings
from vitds.config.recipes import DEFAULT_RECIPES
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, open_beton
from vitds.data.digits import embedded_digits
from vitds.engine.build import build_optimizer
from vitds.engine.loop import Trainer, TrainModule
from vitds.engine.memory import backbone_sizes, out_of_memory_told
from vitds.engine.process import noise_into, start_ranks
from vitds.engine.resolve import resolve_settings
from vitds.heads.dense import DenseHead
from vitds.models.build import build_backbone, patch_count
from vitds.models.precision import AUTOCAST
from vitds.models.stochastic import StochasticDraws
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics


def bench_step(
    *,
    recipe: str | None = None,
    data: str | None = None,
    ds_config: str | None = None,
    rounds: int = 3,
    as_json: bool = False,
) -> list[dict[str, float | str]]:
    """Milliseconds of a step: ours whole (input, mixing, engine, metrics), and forward plus backward alone, in turn.

    Args:
        recipe: of pretraining. data: a .beton; the embedded digits by default. rounds: of one epoch of ours and as many bare steps.
    Returns: rows bare, bare with optimizer, step, and what of the step lies outside its own forward and backward; ratio is to the first.
    """
    settings = load_settings(
        recipe=recipe or DEFAULT_RECIPES["pretrain"], command="pretrain", flags={"epochs": 1}
    )
    ds = load_ds_config(ds_config)
    device = start_ranks()
    file = open_beton(Path(data) if data else embedded_digits("data")[0])
    names = ("bare forward and backward", "bare with optimizer", "step", "step, outside forward and backward")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        resolved, accumulation, outside, seconds = train_steps(settings, ds, file, file.images, device)
        bare, with_optimizer = _bare_steps(resolved, file.images, len(seconds), accumulation, device)
        times["step"] += seconds[1:]  # the first one warms up
        times["step, outside forward and backward"] += outside[1:]
        times["bare forward and backward"] += bare[1:]
        times["bare with optimizer"] += with_optimizer[1:]
    medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
    floor = medians["bare forward and backward"]
    rows = [{"name": name, "ms": round(ms, 2), "ratio": round(ms / floor, 3)} for name, ms in medians.items()]
    print_rows("a training step", rows, as_json=as_json)
    return rows


def train_steps(
    settings: Settings,
    ds: DsConfig,
    file: BetonFile,
    rows: int,
    device: torch.device,
    *,
    steps: int | None = None,
) -> tuple[Settings, int, list[float], list[float]]:
    """Train for a moment in a folder that is removed again.

    Args:
        rows: N of the instance head, the images of the file or more. steps: to stop after, at the end of the run by default.
    Returns: resolved settings, accumulation steps, each step's seconds outside forward and backward (on a GPU, which runs behind, those
        outside the calls), and each step's seconds.
    """
    inside: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            result = function(*args)
            inside.append(time.perf_counter() - began)
            return result

        return call

    with tempfile.TemporaryDirectory() as folder, noise_into(Path(folder) / "log.txt"):
        module = TrainModule(build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0), None)
        resolved = resolve_settings(settings, module.backbone, ds=ds, device=device, rows=rows, images=rows)
        with out_of_memory_told(backbone_sizes(module.backbone, resolved), resolved, ds, rows, device):
            trainer = Trainer(Run(Path(folder)), resolved, ds, file, module, rows, device, None)
            trainer.total = min(trainer.total, steps or trainer.total)
            trainer._forward, trainer.engine.backward = (
                timed(trainer._forward),
                timed(trainer.engine.backward),
            )
            trainer.train()
        seconds = [line["time/step_s"] for line in read_metrics(Path(folder) / "metrics.jsonl")]
    calls = 2 * trainer.accumulation
    outside = [took - sum(inside[step * calls : (step + 1) * calls]) for step, took in enumerate(seconds)]
    return resolved, trainer.accumulation, outside, seconds


def _bare_steps(
    settings: Settings, rows: int, steps: int, accumulation: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each step without and with AdamW: no loader, no engine, no metrics, the same tensors each time."""
    views, micro = settings.views, settings.batch.micro_images
    backbone = build_backbone(settings.backbone, crop_px=views.crop_px, seed=0)
    head = DenseHead(
        rows,
        backbone.num_features,
        bias=settings.head.bias,
        label_smoothing=settings.head.label_smoothing,
        seed=0,
    )
    module = TrainModule(backbone, head).to(device).train()
    if settings.engine.compile == "on":
        module.backbone.compile()
    StochasticDraws(backbone, seed=0, rows_per_chunk=micro * views.count, patches=patch_count(backbone)).fill(
        0, 0, 1
    )
    optimizer = build_optimizer(module, settings.optimizer)
    images = torch.randn(micro * views.count, 3, views.crop_px, views.crop_px, device=device)
    target = torch.randint(0, rows, (len(images),), device=device)
    weight = torch.full((len(images),), 1 / len(images), device=device)
    targets = Targets(target, target, torch.ones_like(weight), weight, torch.zeros_like(target))
    dtype = AUTOCAST.get(settings.engine.precision)
    bare, with_optimizer = [], []
    for _ in range(steps):
        started = time.perf_counter()
        for _ in range(accumulation):
            _forward_backward(module, images, targets, dtype)
        bare.append(time.perf_counter() - started)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with_optimizer.append(time.perf_counter() - started)
    return bare, with_optimizer


def _forward_backward(
    module: nn.Module, images: torch.Tensor, targets: Targets, dtype: torch.dtype | None
) -> None:
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        losses = module(images, targets)
    (losses * targets.weight).sum().backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize()
