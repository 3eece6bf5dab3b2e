"""`vitds plan`: memory of one GPU, traffic of a step and hours of a run, before anything is paid for."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from vitds.config.deepspeed import DsConfig, load_ds_config, resolve_ds_config
from vitds.config.load import load_settings, other_backbone
from vitds.config.tree import Settings
from vitds.data.beton import open_beton
from vitds.data.digits import embedded_digits
from vitds.data.order import steps_per_epoch
from vitds.engine.memory import module_sizes
from vitds.engine.process import start_ranks
from vitds.errors import SettingsError
from vitds.jobs.timed_steps import train_steps
from vitds.methods import method_class
from vitds.methods.base import SetSize
from vitds.models.build import build_backbone
from vitds.plan.case import Case, ModuleSizes, make_case, micro_choices
from vitds.plan.memory import MOMENTS
from vitds.plan.totals import GB, MemoryPlan, plan_memory
from vitds.plan.traffic import step_traffic

RECIPE = "idmm_deit_tiny"
TIMED_STEPS = 4  # the first one warms up


def plan(
    *,
    model: str | None = None,
    rows: int,
    batch: int | None = None,
    gpus: int = 1,
    ds_config: str | None = None,
    recipe: str | None = None,
    set: Sequence[str] = (),
    images_per_s: float | None = None,
    hours: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Plan a pretraining and print it.

    Args:
        model: a timm model in place of the recipe's.
        rows: N, the images.
        batch: images of a step, over all GPUs.
        gpus: R.
        ds_config: name or path of a DeepSpeed JSON.
        recipe: name or path.
        set: assignments to settings, KEY=VALUE.
        images_per_s: throughput of all GPUs together.
        hours: measure that here instead, on one device.
        as_json: print one JSON object and nothing else.
    Returns: what --json prints: bytes by part and moment, traffic, steps, hours.
    Raises: SettingsError for an unknown model, what does not divide, a wrong recipe or DeepSpeed JSON.
    """
    _check_words(rows, gpus, images_per_s, hours)
    ds, given = load_ds_config(ds_config), _settings(recipe or RECIPE, model, batch, set)
    head_rows = method_class(given.method).rows(SetSize(rows, 0))
    with torch.device("meta"):
        backbone = build_backbone(given.backbone, crop_px=given.views.crop_px, seed=0)
    sizes = module_sizes(backbone, given)
    choices = micro_choices(given, gpus)
    case = _case(_resolve(given, ds, sizes, head_rows, choices[0]), ds, sizes, head_rows, gpus)
    memory = plan_memory(case)
    found = {
        **_facts(case, rows),
        **_bytes(memory),
        "micro_batches": {
            str(images): _peak(case.settings, ds, sizes, head_rows, gpus, images) for images in choices
        },
        "traffic_bytes": step_traffic(case),
        **_time(given, ds, rows, gpus, images_per_s, hours),
    }
    if as_json:
        print(json.dumps(found))
    else:
        _show(found, case, memory)
    return found


def _case(settings: Settings, ds: DsConfig, sizes: ModuleSizes, rows: int, gpus: int) -> Case:
    """What is planned.

    Raises: SettingsError as a run with this JSON and this recipe would.
    """
    case = make_case(settings, ds, sizes, rows=rows, ranks=gpus, on_gpu=True)
    resolve_ds_config(
        ds,
        settings,
        micro_images=case.images,
        accumulation=case.accumulation,
        ranks=gpus,
        precision=settings.engine.precision,
    )
    return case


def _facts(case: Case, rows: int) -> dict[str, Any]:
    """Of what is planned, in a few words and numbers."""
    settings, sizes = case.settings, case.sizes
    # Without a classifier: what the method trains, or copies, beside the backbone.
    others = ", ".join(part for part in sizes.trained | sizes.frozen if part != "backbone")
    return {
        "model": settings.backbone.name,
        "parameters": sum(sizes.trained.get("backbone", ())) + sizes.frozen.get("backbone", 0),
        "rows": rows,
        "gpus": case.ranks,
        "zero_stage": case.stage,
        "precision": settings.engine.precision,
        "head": f"{settings.head.kind} head of {rows:,} rows" if case.rows else others,
        "global_images": settings.batch.global_images,
        "micro_images": case.images,
        "accumulation": case.accumulation,
        "counts_activations": sizes.stages is not None,
    }


def _bytes(memory: MemoryPlan) -> dict[str, Any]:
    """The parts and their sums."""
    parts = (*memory.parts, *memory.host_parts)
    return {
        "parts": [vars(part) | {"moments": list(part.moments)} for part in parts],
        "moments": memory.moments,
        "peak_bytes": memory.peak,
        "host_bytes": memory.host,
    }


def _check_words(rows: int, gpus: int, images_per_s: float | None, hours: bool) -> None:
    """Raises: SettingsError for a number that is too small, or two that exclude each other."""
    if min(rows, gpus) < 1 or (images_per_s is not None and images_per_s <= 0):
        raise SettingsError(
            f"--rows {rows} --gpus {gpus} --images_per_s {images_per_s}: rows and gpus from 1 on, "
            "images_per_s above 0"
        )
    if hours and images_per_s is not None:
        raise SettingsError("--hours measures what --images_per_s states; leave one out")


def _settings(recipe: str, model: str | None, batch: int | None, words: Sequence[str]) -> Settings:
    """The recipe's, with another model and batch; the recipe's backbone.options belong to its own model."""
    extra: dict[str, Any] = dict(other_backbone(model, words))
    if batch is not None:
        extra["batch"] = {"global_images": batch}
    return load_settings(recipe=recipe, command="pretrain", assignments=words, flags={}, extra=extra)


def _resolve(settings: Settings, ds: DsConfig, sizes: ModuleSizes, rows: int, smallest: int) -> Settings:
    """`auto` as a GPU with bf16 would resolve it.

    The micro batch, for which the GPU's size would have to be known, is the smallest one.
    """
    precision = settings.engine.precision if settings.engine.precision != "auto" else ds.precision or "bf16"
    micro = settings.batch.micro_images if settings.batch.micro_images != "auto" else smallest
    resolved = settings.model_copy(
        update={
            "engine": settings.engine.model_copy(update={"precision": precision}),
            "batch": settings.batch.model_copy(update={"micro_images": micro}),
        }
    )
    return method_class(settings.method).resolve(resolved, rows, sizes.width)


def _peak(settings: Settings, ds: DsConfig, sizes: ModuleSizes, rows: int, gpus: int, images: int) -> int:
    """Bytes of one GPU with another micro batch."""
    other = settings.model_copy(update={"batch": settings.batch.model_copy(update={"micro_images": images})})
    return plan_memory(make_case(other, ds, sizes, rows=rows, ranks=gpus, on_gpu=True)).peak


class Peak(NamedTuple):
    """What a training takes at least: bytes of a GPU, and numbers that it trains."""

    bytes: int
    weights: int


def peak_bytes(settings: Settings, images: int, classes: int) -> Peak:
    """Of one GPU with the smallest micro batch, for any method.

    Args:
        settings: with their `auto`.
        images: N, of the training file.
        classes: C.
    """
    ds, rows = load_ds_config(None), method_class(settings.method).rows(SetSize(images, classes))
    with torch.device("meta"):
        backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
    sizes = module_sizes(backbone, settings)
    smallest = micro_choices(settings, 1)[0]
    resolved = _resolve(settings, ds, sizes, rows, smallest)
    return Peak(_peak(resolved, ds, sizes, rows, 1, smallest), sizes.numbers + rows * sizes.width)


def _time(
    settings: Settings, ds: DsConfig, rows: int, gpus: int, images_per_s: float | None, measures: bool
) -> dict[str, Any]:
    """Steps, and hours where a throughput is given or measured."""
    steps = settings.epochs * steps_per_epoch(rows, settings.batch.global_images)
    if measures:
        images_per_s = gpus * _measured_images_per_s(settings, ds, rows, gpus)
    seconds = steps * settings.batch.global_images / images_per_s if images_per_s else None
    return {
        "steps": steps,
        "images_per_s": images_per_s,
        "is_measured": measures,
        "hours": seconds and seconds / 3600,
    }


def _measured_images_per_s(settings: Settings, ds: DsConfig, rows: int, gpus: int) -> float:
    """Of one GPU's share of a step, on this machine's device and the embedded digits, with all N rows.

    One of R GPUs has R times the features, those of all GPUs, on 1 / R of the rows: the same work.
    """
    images = settings.batch.global_images // gpus
    batch = settings.batch.model_copy(update={"global_images": images, "micro_images": "auto"})
    # Rows that start as features would need N images, and the digits are fewer.
    head = settings.head.model_copy(update={"init": "noise"})
    with tempfile.TemporaryDirectory(prefix="vitds-plan-") as folder:  # a plan leaves nothing behind
        file = open_beton(embedded_digits(folder)[0])
        epochs = -(-TIMED_STEPS // steps_per_epoch(file.images, images))
        own = settings.model_copy(update={"batch": batch, "epochs": epochs, "head": head})
        head_rows = method_class(settings.method).rows(SetSize(max(rows, file.images), 0))
        timed = train_steps(own, ds, file, head_rows, start_ranks(), steps=TIMED_STEPS)
    return images / statistics.median(timed.whole_s[1:])


def _show(found: dict[str, Any], case: Case, memory: MemoryPlan) -> None:
    """Print the plan for people."""
    console = Console()
    views = case.settings.views
    console.print(
        f"{found['model']} ({found['parameters']:,} parameters), {found['head']}; "
        f"steps of {found['global_images']:,} images = {case.ranks} GPU(s) x {case.accumulation} micro "
        f"batch(es) of {case.images} images x {views.count} views at {views.crop_px} px; "
        f"ZeRO {found['zero_stage']}, {found['precision']}",
        highlight=False,
    )
    console.print(_table(case, memory))
    lines = [f"highest: {memory.peak / GB:.2f} GB, at the {memory.worst}"]
    if not found["counts_activations"]:
        lines.append(
            f"activations are not counted: {found['model']} is no plain Vision Transformer, T2T-ViT or PVT v2"
        )
    others = ", ".join(f"{images}: {held / GB:.2f}" for images, held in found["micro_batches"].items())
    lines.append(f"by micro batch (images: GB): {others}")
    if memory.host:
        lines.append(f"host memory a GPU: {memory.host / GB:.2f} GB")
    sent = "; ".join(f"{kind} {held / GB:.3f}" for kind, held in found["traffic_bytes"].items())
    lines.append(f"sent by a GPU in a step, GB: {sent or 'nothing, there is one'}")
    lines.append(f"steps: {found['steps']:,}{_hours_text(found)}")
    for line in lines:
        console.print(line, highlight=False)


def _table(case: Case, memory: MemoryPlan) -> Table:
    """A line a part, a column a moment."""
    table = Table(
        title=f"Memory of one GPU of {case.ranks}", caption="beside the CUDA context and the libraries"
    )
    table.add_column("GB")
    for moment in MOMENTS:
        table.add_column(moment, justify="right")
    for part in memory.parts:
        held = f"{part.bytes / GB:.3f}"
        table.add_row(part.name, *(held if moment in part.moments else "" for moment in MOMENTS))
    table.add_section()
    table.add_row("together", *(f"{memory.moments[moment] / GB:.3f}" for moment in MOMENTS))
    return table


def _hours_text(found: dict[str, Any]) -> str:
    if found["hours"] is None:
        return "; --images_per_s or --hours gives hours"
    how = (
        f"measured here on one device, times {found['gpus']}, without communication"
        if found["is_measured"]
        else "as stated"
    )
    return f"; {found['hours']:,.1f} h at {found['images_per_s']:,.1f} images/s ({how})"
