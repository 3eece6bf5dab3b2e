"""SimCLR on the digits by lightly, another library, beside ours.

    python -m tests.outside_simclr [--epochs 16] [--seeds 3]

Lightly makes the views, the projector, the loss and the kNN, timm the backbone and torch the updates, in a
plain loop. Of vitds it takes the recipe's settings and the digits as arrays, nothing else. Beside each of its
runs stands `vitds pretrain` of the same seed. Ends with status 1 if the losses differ by more than rounding,
or the means of the kNN by more than the larger of the two deviations over seeds. docs/experiments.md says how
to install lightly, and what came out.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import lightly
import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightly.utils.benchmarking import knn_predict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision import transforms

from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.data.digits import digit_images
from vitds.heads.contrast import among_all_views
from vitds.jobs.train import pretrain

RECIPE = "simclr_digits"
K, TEMPERATURE = 20, 0.07  # of the kNN
CLASSES = 10


def half(split: str) -> tuple[list[Image.Image], Tensor]:
    """The pictures of one half of the digits, and their classes (n,)."""
    images = digit_images(split).images
    label_n = torch.tensor([int(each.class_name) for each in images])
    return [Image.fromarray(each.pixels) for each in images], label_n


def network(settings: Settings) -> nn.Module:
    """The recipe's backbone as timm makes it; its weights come from torch's generator."""
    side, words = settings.views.crop_px, settings.backbone.options
    return timm.create_model(settings.backbone.name, num_classes=0, img_size=side, **words)


def trained_outside(settings: Settings, seed: int) -> nn.Module:
    """A backbone that lightly's SimCLR trained, as the settings say."""
    views, own, adamw = settings.views, settings.simclr, settings.optimizer
    torch.manual_seed(seed)
    backbone = network(settings)
    head = SimCLRProjectionHead(backbone.num_features, own.hidden, own.width, own.layers)
    two_views = SimCLRTransform(
        views.crop_px,
        min_scale=views.groups[0].scale[0],
        cj_prob=views.colour,
        random_gray_scale=views.grey,
        gaussian_blur=views.blur,
        hf_prob=views.flip,
        normalize={"mean": list(views.mean), "std": list(views.std)},
    )
    loss_of = NTXentLoss(own.temperature)
    optimizer = torch.optim.AdamW(
        [*backbone.parameters(), *head.parameters()],
        lr=adamw.lr_peak,
        betas=adamw.betas,
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
    )
    pictures, _ = half("train")
    steps = math.ceil(len(pictures) / settings.batch.global_images)
    total = settings.epochs * steps
    warmup = round(min(settings.schedule.warmup_epochs, settings.epochs / 10) * steps)

    def rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(settings.epochs):
        for images in torch.randperm(len(pictures)).split(settings.batch.global_images):
            optimizer.zero_grad()
            # Negatives and batch norm see a chunk, in which both views stand.
            for chunk in images.split(settings.batch.chunk_images):
                first, second = zip(*(two_views(pictures[i]) for i in chunk), strict=True)
                z = head(backbone(torch.stack([*first, *second])))
                (loss_of(*z.chunk(2)) * len(chunk) / len(images)).backward()
            optimizer.step()
            schedule.step()
    return backbone


def knn_outside(backbone: nn.Module, settings: Settings) -> float:
    """Percent of the test half that the training half's features classify."""
    side = settings.views.crop_px
    central = transforms.Compose(
        [
            transforms.Resize(round(side * 256 / 224), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(settings.views.mean, settings.views.std),
        ]
    )

    @torch.inference_mode()
    def features(pictures: list[Image.Image]) -> Tensor:
        return normalize(backbone.eval()(torch.stack([central(picture) for picture in pictures])))

    (bank, bank_label), (query, label) = half("train"), half("test")
    found = knn_predict(features(query), features(bank).T, bank_label, CLASSES, K, TEMPERATURE)[:, 0]
    return 100 * (found == label).double().mean().item()


def outside(settings: Settings, seed: int) -> float:
    """Top-1 of the kNN of a run by lightly, in percent."""
    return knn_outside(trained_outside(settings, seed), settings)


def ours(settings: Settings, seed: int) -> float:
    """Top-1 of the kNN of a run by vitds, as `vitds eval knn` has it; prints lightly's beside it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        run = pretrain(recipe=RECIPE, epochs=settings.epochs, seed=seed, run=path, set="log.page=false")
        top1 = run.summary["knn"][str(K)]["top1"]
        backbone = network(settings)
        backbone.load_state_dict(load_file(path / "backbone.safetensors"))
    print(f"lightly's kNN of the same weights: {knn_outside(backbone, settings):.2f} %, ours {top1:.2f} %")
    return top1


def loss_differences(settings: Settings) -> tuple[float, float]:
    """How far our NT-Xent of a chunk of random projections is from lightly's, in float64.

    Returns: the difference of the losses, and the largest one of their gradients as a share of the largest
        number in the gradient.
    """
    chunk, own = settings.batch.chunk_images, settings.simclr
    z_MD = torch.randn(2 * chunk, own.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_MD.requires_grad_()
    is_real_cA = torch.ones(1, 2 * chunk, dtype=torch.bool)
    losses = (
        NTXentLoss(own.temperature)(*z_MD.chunk(2)),
        among_all_views(z_MD, is_real_cA, own.temperature).mean(),
    )
    theirs, ours = (torch.autograd.grad(loss, z_MD)[0] for loss in losses)
    loss = (losses[0] - losses[1]).abs().item()
    return loss, ((theirs - ours).abs().max() / theirs.abs().max()).item()


def main() -> None:
    """See the file."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--epochs", type=int, default=16)
    words.add_argument("--seeds", type=int, default=3)
    given = words.parse_args()
    settings = load_settings(recipe=RECIPE, command="pretrain", flags={"epochs": given.epochs})
    differences = loss_differences(settings)
    print("NT-Xent in float64 differs by {:.1e}, its gradient by {:.1e}".format(*differences), flush=True)
    if max(differences) > 1e-12:
        sys.exit("the losses differ by more than rounding")
    sides = {f"lightly {lightly.__version__}": outside, "vitds": ours}
    top1 = {side: [] for side in sides}
    seconds = {side: [] for side in sides}
    for seed in range(given.seeds):
        for side, knn in sides.items():
            began = time.process_time()
            top1[side].append(knn(settings, seed))
            seconds[side].append(time.process_time() - began)
            print(
                f"{side}, seed {seed}: {top1[side][-1]:.2f} %, {seconds[side][-1]:.0f} CPU seconds",
                flush=True,
            )
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"\n{RECIPE}, {given.epochs} epochs, kNN (k = {K}), {versions}")
    for side in sides:
        each = ", ".join(f"{value:.2f}" for value in top1[side])
        spread = f"{mean(top1[side]):.2f} ± {stdev(top1[side]):.2f} %"
        print(f"{side}: {spread} ({each}), {mean(seconds[side]):.0f} CPU seconds a run")
    theirs, own = top1.values()
    difference, deviations = mean(own) - mean(theirs), (stdev(theirs), stdev(own))
    error = math.hypot(*deviations) / math.sqrt(given.seeds)
    is_within = abs(difference) <= max(deviations)
    judged = "within" if is_within else "NOT within"
    print(f"difference {difference:+.2f}, standard error {error:.2f}: {judged} the spread of the seeds")
    sys.exit(not is_within)


if __name__ == "__main__":
    main()
