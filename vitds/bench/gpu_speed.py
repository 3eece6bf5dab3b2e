"""`vitds bench gpu`, parts machine, speed, head and memory: what it takes beside what it could take."""

from __future__ import annotations

import gc
import statistics
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from vitds.bench.gpu_check import Check
from vitds.bench.head import bench_head
from vitds.bench.loader import IMAGES, first_images, measure, pipelines
from vitds.bench.step import bare_steps
from vitds.bench.steps import best_seconds
from vitds.config.deepspeed import load_ds_config
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, open_beton
from vitds.data.loader import TrainLoader
from vitds.engine.process import start_ranks
from vitds.engine.resolve import resolve_settings
from vitds.errors import ResourceError
from vitds.jobs.doctor import run_checks
from vitds.jobs.plan import plan
from vitds.jobs.timed_steps import train_steps
from vitds.models.build import build_backbone
from vitds.models.precision import AUTOCAST

IMAGENET = 1_281_167
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
STEPS, FED_STEPS = 20, 60
# By the memory bandwidth of an H200: what DeiT-Tiny's activations, weights and moments move in a step of 256
# images x 6 crops.
LEAST_STEP_MS = 15.0


def machine(check: Check) -> None:
    """What is installed, the ceilings of copies and products, and the images' files.

    Raises: ResourceError if a line of `vitds doctor` is broken.
    """
    lines = run_checks()
    for line in lines:
        check.found(line.name, line.found if line.state == "ok" else f"{line.state}: {line.found}")
    _ceilings(check)
    for storage in ("raw", "jpg"):
        check.found(f"{storage}.beton", check.images(storage).stat().st_size / 1e6, "MB")
    settings = check.choose().settings
    micro = settings.batch.global_images
    loader = TrainLoader(open_beton(check.images()), settings, rank=0, ranks=1, micro_images=micro)
    batches = loader.batches(0, 1)
    check.found("the loader's crops are in pinned memory", str(next(batches).crops.is_pinned()))
    batches.close()
    if broken := [line.name for line in lines if line.state == "broken"]:
        raise ResourceError(f"vitds doctor: {', '.join(broken)} broken")


def _ceilings(check: Check) -> None:
    """The best rates of plain operations on this device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number, side = (1 << 18, 256) if check.toy else (1 << 28, 8192)
    host, there = (
        torch.empty(number, dtype=torch.uint8),
        torch.empty(number, dtype=torch.uint8, device=device),
    )
    copy = torch.empty_like(there)
    one = {
        dtype: torch.randn(side, side, device=device).to(dtype) for dtype in (torch.bfloat16, torch.float32)
    }
    steps = {
        "host to device, GB/s": lambda: there.copy_(host, non_blocking=True),
        "device to device, read and written, GB/s": lambda: copy.copy_(there),
        **{f"product in {dtype}, TFLOP/s": lambda m=m: m @ m for dtype, m in one.items()},
    }
    if device.type == "cuda":
        pinned = host.pin_memory()
        steps["pinned host to device, GB/s"] = lambda: there.copy_(pinned, non_blocking=True)
    work = {"GB/s": number / 1e9, "TFLOP/s": 2 * side**3 / 1e12}
    for name, seconds in best_seconds(steps, [], 3 if check.toy else 20, device).items():
        what, _, unit = name.rpartition(", ")
        check.found(what, (2 if "written" in what else 1) * work[unit] / seconds, unit)


# A step ----------------------------------------------------------------------------------------------------


def speed(check: Check) -> None:
    """A step on fixed tensors, eager with each kind of attention and compiled; the loader alone; both."""
    device = start_ranks()
    steps, fed_steps = (4, 6) if check.toy else (STEPS, FED_STEPS)
    files = {storage: open_beton(check.images(storage)) for storage in ("raw", "jpg")}
    file = files["jpg"]
    eager = _resolved(check, file, device, "off")
    crops = eager.batch.global_images * eager.views.count
    check.found("step on fixed tensors, eager", _fixed_ms(eager, file, device, steps), "ms")
    for backend in BACKENDS:
        name = f"step on fixed tensors, eager, attention {backend.name}"
        if reason := _why_not(backend, device, eager.engine.precision):
            check.found(f"{name}: {reason}", None)
            continue
        # MATH behind it for the one crop that every backbone is tried with, on the processor.
        with sdpa_kernel([backend, SDPBackend.MATH], set_priority=True):
            check.found(name, _fixed_ms(eager, file, device, steps), "ms")
    compiled = _resolved(check, file, device, "on")
    fixed_ms = _fixed_ms(compiled, file, device, steps)
    check.found("step on fixed tensors, compiled", fixed_ms, "ms")
    for storage, each in files.items():
        row = _loader_row(each, compiled)
        check.found(f"loader alone, {storage}", row.crops_per_s_core * compiled.data.workers, "crops/s")
    fed_ms = 1000 * statistics.median(_train(compiled, file, device, fed_steps)[fed_steps // 3 :])
    check.found("step from data, compiled", fed_ms, "ms")
    check.found("crops from data", 1000 * crops / fed_ms, "crops/s", goal=">= 100,000")
    check.found("speed from data, to that on fixed tensors", fixed_ms / fed_ms, goal=">= 0.97")
    check.found("share reached of a step bounded by memory bandwidth", LEAST_STEP_MS / fed_ms)
    _profile(check, compiled, file, device)


def _resolved(check: Check, file: BetonFile, device: torch.device, compiled: str) -> Settings:
    """No `auto` is left; all images of a step at once."""
    given = check.choose(engine__compile=compiled).settings
    batch = given.batch.model_copy(update={"micro_images": given.batch.global_images})
    given = given.model_copy(update={"batch": batch})
    backbone = build_backbone(given.backbone, crop_px=given.views.crop_px, seed=0)
    options = {"ds": load_ds_config(None), "device": device, "rows": file.images, "images": file.images}
    return resolve_settings(given, backbone, **options)


def _why_not(backend: SDPBackend, device: torch.device, precision: str) -> str | None:
    """What keeps this device from that kind of attention, at DeiT-Tiny's shape; None where nothing does."""
    dtype = AUTOCAST.get(precision, torch.float32)
    query = torch.zeros(2, 3, 50, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        with sdpa_kernel(backend):
            scaled_dot_product_attention(query, query, query).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0][:80]
    return None


def _fixed_ms(settings: Settings, file: BetonFile, device: torch.device, steps: int) -> float:
    """Milliseconds of a step with its optimizer, without loader and engine; the first quarter warms up."""
    _, seconds = bare_steps(settings, file, steps, 1, device)
    return 1000 * statistics.median(seconds[steps // 4 :])


def _loader_row(file: BetonFile, settings: Settings) -> Any:
    file = first_images(file, min(IMAGES, file.images))
    return measure("complete_u8", pipelines(file, settings)["complete_u8"], file.images, settings)


def _train(
    settings: Settings, file: BetonFile, device: torch.device, steps: int, **options: Any
) -> list[float]:
    """Seconds of each step of a training that stops after so many."""
    settings = settings.model_copy(update={"epochs": -(-steps * settings.batch.global_images // file.images)})
    ds, rows = load_ds_config(options.get("ds_config")), options.get("rows", file.images)
    return train_steps(settings, ds, file, rows, device, steps=steps).whole_s


def _profile(check: Check, settings: Settings, file: BetonFile, device: torch.device) -> None:
    """The thirty operations that take most of the device's time, to profile.txt."""
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiler:
        _train(settings, file, device, 6)
    key = f"self_{device.type}_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60)
    (check.out / "profile.txt").write_text(table)
    check.found("profile of 6 steps", "profile.txt")


# The head and the memory -----------------------------------------------------------------------------------


def head(check: Check) -> None:
    """Time and memory of the instance head: by chunks, at the default, with all logits kept; and others'."""
    case = (
        {"rows": 3000, "dim": 16, "batch": 64} if check.toy else {"rows": 200_000, "dim": 192, "batch": 1536}
    )
    logits_mb = 1 + case["rows"] * case["batch"] * 4 // 2**20
    for about, keep_mb in (("by chunks", 0), ("default", 64), ("all logits kept", logits_mb)):
        table = bench_head(
            **case, precision="fp32" if check.toy else "bf16", rounds=1 if check.toy else 10, keep_mb=keep_mb
        )
        for row in table:
            is_ours = row["name"].startswith("ours")
            if not is_ours and about != "default":
                continue  # theirs are the same each time
            name = f"{row['name']}, {about}" if is_ours else row["name"]
            if row["ms"] is None:
                check.found(name, None)
                continue
            aims = ("<= 1.6", "<= 64") if is_ours and about == "default" else ("", "")
            check.found(f"{name}, time", row["ms"], "ms")
            check.found(f"{name}, to four products", row["ratio"], goal=aims[0])
            check.found(f"{name}, gradients off by", row["off"])
            check.found(f"{name}, memory beside weight and gradient", row["extra_mb"], "MB", goal=aims[1])


def memory(check: Check) -> None:
    """The peak of a large backbone and of a large head, beside `vitds plan`'s."""
    device = start_ranks()
    file = open_beton(check.images())
    rows = 2000 if check.toy else IMAGENET
    cases = {"zero3_offload": (file.images, 3 if check.toy else 20), "zero0": (rows, 3 if check.toy else 5)}
    for ds_config, (head_rows, steps) in cases.items():
        changes = {"batch__global_images": 128, "batch__micro_images": 24 if check.toy else 128}
        choice = check.choose("idmm_vit_large", **changes)
        settings, words = choice.settings, {"recipe": choice.recipe, "set": choice.words}
        planned = plan(rows=head_rows, ds_config=ds_config, as_json=True, **words)["peak_bytes"]
        name = f"{settings.backbone.name}, {ds_config}, {head_rows:,} rows"
        check.found(f"{name}, planned", planned / 1e9, "GB")
        seconds = _train(settings, file, device, steps, ds_config=ds_config, rows=head_rows)
        check.found(f"{name}, median step", statistics.median(seconds[1:]), "s")
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            check.found(f"{name}, peak", peak / 1e9, "GB")
            check.found(f"{name}, peak to the plan's", peak / planned, goal="0.9 to 1.1")
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
