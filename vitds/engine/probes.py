"""Probes every eval.every_epochs epochs: what the training loss does not say. Each has a forward pass of its
own, timed separately.

The images are the first PROBE_IMAGES of epoch 0 with their un-mixed views of that epoch: always the same, so
curves can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitds import dist
from vitds.augment.images import normalise
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, labelled
from vitds.data.loader import TrainLoader
from vitds.evaluate.answers import answers_of, balanced_means
from vitds.evaluate.features import Features
from vitds.evaluate.files import file_features
from vitds.evaluate.knn import knn_accuracy
from vitds.evaluate.norms import measure_norms
from vitds.evaluate.probes import alignment, rankme, uniformity
from vitds.methods.base import Method
from vitds.models.build import build_backbone
from vitds.models.precision import AUTOCAST
from vitds.runs.backbone import load_backbone

PROBE_IMAGES = 1024


class Probes:
    """The probes of one run; called by every rank.

    Args:
        settings: of the run, resolved.
        file: the training images.
        test_file: labelled images that are classified, by the nearest training images and by the class head
            that trains; None, or a training file without labels, leaves it out.
        device: that trains.
    """

    def __init__(
        self, settings: Settings, file: BetonFile, test_file: BetonFile | None, device: torch.device
    ) -> None:
        self.settings = settings
        self.file = file
        self.test_file = test_file
        self.device = device
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

    def measure(
        self, weights: dict[str, Tensor], method: Method, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """probe/… numbers of the present weights.

        Args:
            weights: of the method's whole module by name, as EngineState.weights gives them.
            method: adds its own.
            on_batch: called before each; on a slow machine a probe of many images takes an hour.
        """
        load_backbone(self.backbone, method.exported(weights), "this run")
        measure_norms(self.settings, self.backbone, self.file, self.device, on_batch=on_batch)
        found: dict[str, float] = {}
        if not method.leaves_class_head or self.settings.views.count > 1:
            first_MD, last_MD, index_M = self._two_views(on_batch)
            if self.settings.views.count > 1:
                found["probe/alignment"] = alignment(first_MD, last_MD)
            found["probe/uniformity"] = uniformity(first_MD)
            found["probe/rankme"] = rankme(first_MD)
            found["probe/rankme_centred"] = rankme(first_MD, is_centred=True)
            found |= method.probes(first_MD, index_M, weights)
        return found | self._accuracy(method, weights, on_batch)

    @torch.inference_mode()
    def _two_views(
        self, on_batch: Callable[[], None]
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"], Int[Tensor, "M"]]:
        """First and last view of the probe images: features, and the images' indices, of all ranks.

        Of one view they are the same.
        """
        global_images = self.settings.batch.global_images
        steps = min(self.loader.steps_per_epoch, -(-PROBE_IMAGES // global_images))
        self.backbone.eval()
        autocast = AUTOCAST.get(self.settings.engine.precision)
        parts = []
        for batch in islice(self.loader.batches(0, steps), steps * self.loader.accumulation):
            on_batch()
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                first_BD, last_BD = (
                    self.backbone(normalise(batch.crops[:, view].to(self.device), self.settings.views))
                    .float()
                    .cpu()
                    for view in (0, -1)
                )
            parts.append((first_BD[batch.is_real], last_BD[batch.is_real], batch.index[batch.is_real]))
        everyone = [part for rank in dist.gather_objects(_as_numpy(parts)) for part in rank]
        first, last, index = (
            torch.cat([torch.from_numpy(part[column]) for part in everyone]) for column in range(3)
        )
        return first, last, index

    def _accuracy(
        self, method: Method, weights: dict[str, Tensor], on_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Accuracy on the test images, where they and the training images have labels."""
        if self.test_file is None or not self.file.manifest.classes or not self.test_file.manifest.classes:
            return {}
        features = partial(file_features, self.settings, self.backbone, device=self.device, on_batch=on_batch)
        query = features(self.test_file)
        found = _of_class_head(query, weights) if method.leaves_class_head else {}
        bank = features(labelled(self.file))
        scores = knn_accuracy(
            bank.rows_MD,
            bank.label_M,
            query.rows_MD,
            query.label_M,
            k=self.settings.eval.knn_k,
            classes=len(self.file.manifest.classes),
        )
        return found | {f"probe/knn{number}_top1": score.top1 for number, score in scores.items()}


def _of_class_head(query: Features, weights: dict[str, Tensor]) -> dict[str, float]:
    """Percent of the images that the class head gets right, and the same for unequal classes."""
    head = {name: weights[f"head.{name}"].cpu() for name in ("weight", "bias") if f"head.{name}" in weights}
    answers = answers_of(F.linear(query.rows_MD, **head), query.label_M)
    balanced_R, f1_R = balanced_means(
        answers.label_M[None], answers.predicted_M[None], classes=len(head["weight"])
    )
    return {
        "probe/top1": answers.top(1),
        "probe/balanced_accuracy": 100 * float(balanced_R[0]),
        "probe/macro_f1": 100 * float(f1_R[0]),
    }


def _as_numpy(parts: list[tuple[Tensor, ...]]) -> list[tuple[object, ...]]:
    """Arrays travel between processes as bytes; tensors would take shared memory."""
    return [tuple(map(Tensor.numpy, part)) for part in parts]
