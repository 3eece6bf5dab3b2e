"""`vitds bench gpu`, part numbers: the head in every form, mixing and the first losses, to references."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitds.augment.images import gpu_writer
from vitds.augment.mix import mix_batch
from vitds.batch import CropBatch, Targets
from vitds.bench.gpu_check import Check
from vitds.errors import NumericsError
from vitds.heads import DenseHead, ShardedHead
from vitds.heads.sampling import drawn_rows
from vitds.jobs.train import pretrain
from vitds.models.precision import AUTOCAST
from vitds.runs.metrics import read_metrics

# Relative errors that arithmetic in that precision explains.
HEAD_BOUNDS = {"fp32": 1e-4, "bf16": 2e-2}
LOSS_BOUNDS = {"fp32": 1e-4, "bf16": 1e-2}
LOSS_STEPS = 5
SEED, STEP, RATE = 0, 3, 0.1


def numbers(check: Check) -> None:
    """Raises: NumericsError if anything is further from its reference than its precision explains."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = [*heads(check, device), *mixing(check, device), *first_losses(check, device)]
    if wrong:
        raise NumericsError("; ".join(wrong))


# The instance head -----------------------------------------------------------------------------------------


def heads(check: Check, device: torch.device) -> list[str]:
    """Loss and gradients of every form against float64; what is too far off."""
    rows, dim, batch = (300, 16, 24) if check.toy else (20_000, 192, 512)
    forms = [
        {"kind": kind, "bias": bias, "label_smoothing": smoothing, "temperature": temperature, **more}
        for kind, bias, smoothing, temperature, more in product(
            ("dense", "sharded"),
            (False, True),
            (0.0, 0.1),
            (None, 0.1),
            ({"keep_bytes": 0}, {"keep_bytes": 1 << 30}, {"sample_rate": RATE}),
        )
        if kind == "sharded" or "sample_rate" not in more
    ]
    features, targets = _head_batch(rows, dim, batch, device)
    wrong = []
    for precision, bound in HEAD_BOUNDS.items():
        worst = 0.0
        for form in forms:
            error = _head_error(form, precision, rows, features, targets)
            worst = max(worst, error)
            if not error < bound:  # also where it is not a number
                wrong.append(f"head {form} in {precision} is off by {error:.1e}")
        name = f"head, loss and gradients of {len(forms)} forms in {precision}, from float64"
        check.found(name, worst, goal=f"< {bound:g}")
    return wrong


def _head_batch(rows: int, dim: int, batch: int, device: torch.device) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(SEED)
    features = torch.randn(batch, dim, generator=generator).to(device)
    a, b = (torch.randint(0, rows, (batch,), generator=generator).to(device) for _ in range(2))
    lam = torch.rand(batch, generator=generator).to(device)
    return features, Targets(a, b, lam, torch.full_like(lam, 1 / batch), torch.zeros_like(a))


def _head_error(form: dict[str, Any], precision: str, rows: int, features: Tensor, targets: Targets) -> float:
    """The largest relative error of the loss and of each gradient."""
    options = {key: value for key, value in form.items() if key != "kind"}
    kind = DenseHead if form["kind"] == "dense" else ShardedHead
    head = kind(rows, features.shape[1], seed=SEED, **options).to(features.device)
    if head.bias is not None:
        nn.init.normal_(head.bias, generator=torch.Generator(features.device).manual_seed(SEED))
    x = features.clone().requires_grad_()
    dtype = AUTOCAST.get(precision)
    with torch.autocast(features.device.type, dtype, enabled=dtype is not None):
        loss = head(x, targets, STEP).sum()
    loss.backward()
    parameters = list(head.parameters())
    exact = _exact_head(form, features, targets, *(each.detach() for each in parameters))
    ours = (loss.detach(), x.grad, *(each.grad for each in parameters))
    return max(
        float((own.double() - right).norm() / right.norm()) for own, right in zip(ours, exact, strict=True)
    )


def _exact_head(
    form: dict[str, Any], features: Tensor, targets: Targets, *parameters: Tensor
) -> tuple[Tensor, ...]:
    """Loss and gradients of features, rows and bias in float64, with all logits held at once."""
    leaves = [each.double().requires_grad_() for each in (features, *parameters)]
    x, weight = leaves[:2]
    rows, eps = len(weight), form["label_smoothing"]
    if form["temperature"] is not None:
        x, weight = normalize(x) / form["temperature"], normalize(weight)
    logits = x @ weight.T
    if form["bias"]:
        logits = logits + leaves[2]
    counts = torch.ones(rows, device=logits.device, dtype=torch.float64)
    if "sample_rate" in form:
        counts = drawn_rows(rows, 0, rows, rate=RATE, seed=SEED, step=STEP).to(counts)
        counts[targets.a] = counts[targets.b] = 1
    lse = (logits + counts.log()).logsumexp(1)  # a row that is not drawn counts 0 times, and log 0 is -inf
    own_a, own_b = (logits.gather(1, target[:, None])[:, 0] for target in (targets.a, targets.b))
    own = targets.lam * own_a + (1 - targets.lam) * own_b
    losses = lse - (1 - eps) * own - eps * (counts * logits).sum(1) / rows
    loss = (targets.weight * losses).sum()
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


# Mixing ----------------------------------------------------------------------------------------------------


def mixing(check: Check, device: torch.device) -> list[str]:
    """Images and targets of the device against the processor's, bit by bit; what differs."""
    settings = check.choose().settings
    images, chunk = settings.batch.global_images, settings.batch.chunk_images
    generator = torch.Generator().manual_seed(SEED)
    shape = (images, settings.views.count, 3, settings.views.crop_px, settings.views.crop_px)
    crops = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    index, is_real = torch.arange(images), torch.arange(images) < images - 1
    if device.type == "cuda":
        check.found("crops become images by", gpu_writer().__module__, goal="vitds.kernels.mix_gpu")
    wrong = []
    for kind, dtype in product(("none", "cutmix", "mixup"), (torch.float32, torch.bfloat16)):
        mix = settings.mix.model_copy(update={"kind": kind})
        batch = CropBatch(crops, index, index, is_real, 0, STEP, 0, images - 1)
        there, here = (
            mix_batch(
                batch, index, settings.views, mix, chunk_images=chunk, seed=SEED, device=place, dtype=dtype
            )
            for place in (device, torch.device("cpu"))
        )
        pairs = {"images": (there.images, here.images)}
        for name in ("a", "b", "lam", "weight", "group"):
            pairs[name] = (getattr(there.targets, name), getattr(here.targets, name))
        differ = [name for name, (one, other) in pairs.items() if not torch.equal(one.cpu(), other)]
        what = f"mixing {kind} in {str(dtype).removeprefix('torch.')}"
        check.found(f"{what}, bits that differ from the processor's", ", ".join(differ) or "none")
        wrong += [f"{what}: other {name} than on the processor" for name in differ]
    return wrong


# The first losses ------------------------------------------------------------------------------------------


def first_losses(check: Check, device: torch.device) -> list[str]:
    """Five steps of training here against the same on the processor in fp32; what is too far off."""
    batch = check.choose().settings.batch.global_images if check.toy else 64
    sizes = {"batch__global_images": batch, "batch__micro_images": batch, "engine__compile": "off"}
    file = check.images("raw", total=LOSS_STEPS * batch)
    choice, run = check.choose(**sizes, engine__precision="fp32"), check.work / "on-processor"
    words = (*choice.flags, "--data", str(file), "--run", str(run), "--epochs", "1")
    # Where torch sees no GPU: DeepSpeed takes one device for the whole process.
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-m", "vitds", "pretrain", *words], env=hidden, check=True)
    right = _losses(run)
    wrong = []
    for precision, bound in LOSS_BOUNDS.items():
        if device.type == "cpu" and precision == "bf16":
            continue  # not every processor has it
        choice, run = check.choose(**sizes, engine__precision=precision), check.work / f"in-{precision}"
        pretrain(recipe=choice.recipe, set=choice.words, data=str(file), run=str(run), epochs=1)
        losses = _losses(run)
        error = max(abs(own / other - 1) for own, other in zip(losses, right, strict=True))
        name = f"{LOSS_STEPS} losses in {precision}, from the processor's in fp32"
        check.found(name, error, goal=f"< {bound:g}")
        if not error < bound:
            wrong.append(f"losses in {precision} {losses}, on the processor {right}")
    return wrong


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
