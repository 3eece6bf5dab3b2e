"""head.class_weight balanced: the loss that it means, the same for every number of ranks and micro steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.engine.training import small_losses, small_run_path
from vitds.batch import Targets
from vitds.data.build import build_beton
from vitds.methods.supervised import weighted
from vitds.runs.metrics import read_metrics


@pytest.fixture(scope="module")
def unequal_files(digit_files, tmp_path_factory) -> tuple[str, str]:
    """13, 13, 4 and 2 training images of four classes; the test images are those of digit_files."""
    folder, train = tmp_path_factory.mktemp("unequal"), Path(digit_files[0]).parent / "train"
    for label, images in enumerate((13, 13, 4, 2)):
        (folder / "images" / f"digit {label}").mkdir(parents=True)
        for image in sorted((train / f"digit {label}").iterdir())[:images]:
            (folder / "images" / f"digit {label}" / image.name).write_bytes(image.read_bytes())
    build_beton([folder / "images"], folder / "train.beton", workers=1)
    return str(folder / "train.beton"), digit_files[1]


BALANCED = {"method": "supervised", "head__class_weight": "balanced", "head__label_smoothing": 0.0}


def test_losses_do_not_depend_on_ranks_stage_or_accumulation(
    rank_pool, unequal_files, tmp_path: Path
) -> None:
    one = rank_pool(1).run(small_losses, str(tmp_path / "one"), unequal_files, **BALANCED)[0]
    options = {"stage": 2, "batch__micro_images": 4} | BALANCED
    two = rank_pool(2).run(small_losses, str(tmp_path / "two"), unequal_files, **options)[0]
    np.testing.assert_allclose(one, two, rtol=2e-5)
    plain = rank_pool(1).run(
        small_losses, str(tmp_path / "plain"), unequal_files, method="supervised", head__label_smoothing=0.0
    )[0]
    assert not np.allclose(plain, one, rtol=1e-2)


def test_an_epoch_of_first_losses_weighs_each_class_alike(rank_pool, unequal_files, tmp_path: Path) -> None:
    """A head that says nothing has the loss ln C for every image, so the weights' mean shows: it is 1."""
    still = {"optimizer__lr_peak": 1e-12, "mix__kind": "none", "epochs": 1}
    run = tmp_path / "run"
    rank_pool(1).run(small_run_path, str(run), unequal_files, **BALANCED, **still)
    first, second = read_metrics(run / "metrics.jsonl")  # 24 images, and the other 8 of 32
    mean = (24 * first["loss"] + 8 * second["loss"]) / 32
    assert mean == pytest.approx(np.log(4), rel=0.05) and abs(first["loss"] - second["loss"]) > 0.05


def test_weighted_targets_give_the_weighted_loss() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, weight_C = torch.randn(6, 3, generator=draw), torch.tensor([0.5, 2.0, 4.0])
    a, b = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 2, 1, 2, 0, 2])
    lam, own = torch.rand(6, generator=draw), torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.0])
    targets = weighted(Targets(a, b, lam, own, torch.zeros(6, dtype=torch.int64)), weight_C)
    losses = [F.cross_entropy(logits, each, reduction="none") for each in (a, b)]
    found = targets.weight * (targets.lam * losses[0] + (1 - targets.lam) * losses[1])
    expected = own * (lam * weight_C[a] * losses[0] + (1 - lam) * weight_C[b] * losses[1])
    torch.testing.assert_close(found, expected)
    assert targets.is_real.tolist() == [True] * 5 + [False]
