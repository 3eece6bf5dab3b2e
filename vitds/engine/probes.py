"""Probes every eval.every_epochs epochs: what the training loss does not say. Each has a forward pass of its own, timed apart.

The images are the first PROBE_IMAGES of epoch 0 with their un-mixed views of that epoch: always the same, so curves can be compared.
"""

from __future__ import annotations

from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitds import dist
from vitds.augment.mix import normalise
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.loader import TrainLoader, eval_batches
from vitds.engine.head_shard import HeadShard
from vitds.evaluate.features import Features, extract_features
from vitds.evaluate.knn import knn_accuracy
from vitds.evaluate.probes import alignment, rankme, uniformity
from vitds.heads.dense import scaled_features
from vitds.heads.logsumexp import highest_logits
from vitds.models.build import build_backbone
from vitds.models.precision import AUTOCAST
from vitds.runs.backbone import load_backbone

PROBE_IMAGES = 1024


class Probes:
    """The probes of one run; called by every rank.

    Args:
        test_file: queries of the kNN probe; None, or a training file without labels, leaves it out.
    """

    def __init__(
        self, settings: Settings, file: BetonFile, test_file: BetonFile | None, device: torch.device
    ) -> None:
        self.settings, self.file, self.test_file, self.device = settings, file, test_file, device
        self.loader = TrainLoader(
            file,
            settings,
            rank=dist.rank(),
            ranks=dist.world_size(),
            micro_images=settings.batch.micro_images,
        )
        self.backbone = build_backbone(
            settings.backbone, crop_px=settings.views.crop_px, seed=settings.seed
        ).to(device)
        self.autocast = AUTOCAST.get(settings.engine.precision)

    def measure(self, weights: dict[str, Tensor], head: HeadShard | None) -> dict[str, float]:
        """probe/… numbers of the present weights.

        Args:
            weights: of the whole module by name, as EngineState.weights gives them. head: the sharded head, if there is one.
        """
        load_backbone(
            self.backbone,
            {name: value for name, value in weights.items() if name.startswith("backbone.")},
            "this run",
        )
        found: dict[str, float] = {}
        if self.settings.method == "idmm":
            first_MD, second_MD, index_M = self._two_views()
            found["probe/alignment"] = alignment(first_MD, second_MD)
            found["probe/uniformity"], found["probe/rankme"] = uniformity(first_MD), rankme(first_MD)
            found["probe/instance_top1"] = 100 * self._share_recognised(first_MD, index_M, weights, head)
        if self.test_file is not None and self.file.manifest.classes and self.test_file.manifest.classes:
            bank, query = (self._features(file) for file in (self.file, self.test_file))
            k = self.settings.eval.knn_k
            classes = len(self.file.manifest.classes)
            scores = knn_accuracy(
                bank.rows_MD, bank.label_M, query.rows_MD, query.label_M, k=k, classes=classes
            )
            found |= {f"probe/knn{number}_top1": score.top1 for number, score in scores.items()}
        return found

    @torch.inference_mode()
    def _two_views(self) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"], Int[Tensor, "M"]]:
        """Features of the first and the last view of the probe images, of all ranks, and the images' indices."""
        global_images = self.settings.batch.global_images
        steps = min(self.loader.steps_per_epoch, -(-PROBE_IMAGES // global_images))
        self.backbone.eval()
        parts = []
        for batch in islice(self.loader.batches(0, steps), steps * self.loader.accumulation):
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                views = (
                    normalise(batch.crops[:, view].to(self.device), self.settings.views) for view in (0, -1)
                )
                first_BD, second_BD = (self.backbone(images).float().cpu() for images in views)
            parts.append((first_BD[batch.is_real], second_BD[batch.is_real], batch.index[batch.is_real]))
        everyone = [
            part
            for rank in dist.gather_objects([tuple(map(Tensor.numpy, part)) for part in parts])
            for part in rank
        ]
        first, second, index = (
            torch.cat([torch.from_numpy(part[column]) for part in everyone]) for column in range(3)
        )
        return first, second, index

    def _features(self, file: BetonFile) -> Features:
        batches = eval_batches(file, self.settings.views, batch_images=self.settings.eval.batch_images)
        views = self.settings.views
        return extract_features(
            self.backbone, batches, mean=views.mean, std=views.std, device=self.device, autocast=self.autocast
        )

    @torch.inference_mode()
    def _share_recognised(
        self,
        x_MD: Float[Tensor, "M D"],
        index_M: Int[Tensor, "M"],
        weights: dict[str, Tensor],
        head: HeadShard | None,
    ) -> float:
        """The share of un-mixed first views whose own instance has the highest logit."""
        if head is None:
            first, weight, bias = 0, weights["head.weight"], weights.get("head.bias")
        else:
            first, weight, bias = head.module.first, head.module.weight, head.module.bias
        x_MD, local_M = (tensor.to(weight.device) for tensor in (x_MD, index_M - first))
        x_MD = scaled_features(
            x_MD, self.settings.head.form["temperature"]
        )  # beside a bias their length counts
        highest_M, own_M = map(
            dist.all_reduce_max,
            highest_logits(x_MD, weight, bias, local_M, is_cosine=self.settings.head.cosine),
        )
        return float((own_M == highest_M).double().mean())
