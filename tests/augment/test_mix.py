"""Mixing against a plain reference, and its statistics against the values known of the paper's code (METHOD
3.3)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vitds import rng
from vitds.augment.images import normalise
from vitds.augment.mix import draw_cutmix_box, draw_lambda, draw_partners, kind_in_epoch, mix_batch
from vitds.batch import CropBatch, TrainBatch
from vitds.config.tree import Mix, ViewGroup, Views
from vitds.rng import Purpose

VIEWS = Views(crop_px=8, groups=(ViewGroup(name="global", views=2), ViewGroup(name="local", views=1)))
CPU = torch.device("cpu")
K = 4  # images of a chunk


def make_batch(
    chunks: int = 2, chunk_images: int = K, padded: int = 0, epoch: int = 1, first_chunk: int = 3
) -> CropBatch:
    images = chunks * chunk_images
    generator = torch.Generator().manual_seed(0)
    return CropBatch(
        crops=torch.randint(0, 256, (images, VIEWS.count, 3, 8, 8), dtype=torch.uint8, generator=generator),
        index=torch.arange(images) + 100,
        label=torch.arange(images) % 3,
        is_real=torch.arange(images) < images - padded,
        epoch=epoch,
        step=5,
        first_chunk=first_chunk,
        real_images=40,
    )


def mix_plainly(
    batch: CropBatch, mix: Mix, seed: int
) -> tuple[list[Tensor], list[tuple[int, int, float, float]]]:
    """Row by row: (image, (target a, target b, lambda, weight))."""
    images, targets = [], []
    mean, std = (
        torch.tensor(VIEWS.mean).double().view(3, 1, 1),
        torch.tensor(VIEWS.std).double().view(3, 1, 1),
    )
    for chunk in range(len(batch.index) // K):
        members = range(chunk * K, (chunk + 1) * K)
        view = 0
        for number, group in enumerate(VIEWS.groups):
            rows = [(image, view + v) for v in range(group.views) for image in members]
            view += group.views
            real = [row for row, (image, _) in enumerate(rows) if batch.is_real[image]]
            key = (seed, batch.step, batch.first_chunk + chunk, number)
            order = rng.permutation(len(real), Purpose.PARTNERS, *key)
            partner = {row: real[order[place]] for place, row in enumerate(real)}
            lam0 = float(draw_lambda(mix.alpha, *key))
            box = draw_cutmix_box(8, mix.alpha, *key)
            for row, (image, v) in enumerate(rows):
                other_image, other_v = rows[partner.get(row, row)]
                own = (batch.crops[image, v].double() / 255 - mean) / std
                other = (batch.crops[other_image, other_v].double() / 255 - mean) / std
                if mix.kind == "mixup":
                    mixed, lam = lam0 * own + (1 - lam0) * other, lam0
                else:
                    mixed, lam = own.clone(), box.lam
                    mixed[:, box.top : box.bottom, box.left : box.right] = other[
                        :, box.top : box.bottom, box.left : box.right
                    ]
                weight = float(batch.is_real[image]) / (group.views * batch.real_images)
                images.append(mixed)
                targets.append((int(batch.index[image]), int(batch.index[other_image]), lam, weight))
    return images, targets


def in_reference_order(mixed: TrainBatch, chunks: int) -> tuple[Tensor, Tensor]:
    targets = torch.stack(
        [mixed.targets.a, mixed.targets.b, mixed.targets.lam, mixed.targets.weight], 1
    ).double()
    return mixed.images.double(), targets


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
@pytest.mark.parametrize("padded", [0, 3, 6])
def test_mixing_equals_the_plain_reference(kind: str, padded: int) -> None:
    batch, mix = make_batch(padded=padded), Mix(kind=kind)
    images, targets = in_reference_order(
        mix_batch(batch, batch.index, VIEWS, mix, chunk_images=K, seed=9, device=CPU), 2
    )
    expected_images, expected_targets = mix_plainly(batch, mix, 9)
    assert torch.allclose(images, torch.stack(expected_images), atol=1e-5)
    assert torch.allclose(targets, torch.tensor(expected_targets, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("type_16", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "cutmix", "mixup"])
def test_images_of_16_bits_are_those_of_32_rounded_last(kind: str, type_16: torch.dtype) -> None:
    batch, mix = make_batch(padded=1), Mix(kind=kind)
    wide, narrow = (
        mix_batch(batch, batch.index, VIEWS, mix, chunk_images=K, seed=9, device=CPU, dtype=dtype).images
        for dtype in (torch.float32, type_16)
    )
    assert torch.equal(narrow, wide.to(type_16))


def test_mixing_does_not_depend_on_how_chunks_are_spread_over_micro_batches() -> None:
    mix, whole = Mix(), make_batch(chunks=2)
    both = mix_batch(whole, whole.index, VIEWS, mix, chunk_images=K, seed=9, device=CPU)
    for chunk in range(2):
        own = slice(chunk * 4, chunk * 4 + 4)
        part = CropBatch(
            whole.crops[own], whole.index[own], whole.label[own], whole.is_real[own], 1, 5, 3 + chunk, 40
        )
        rows = slice(chunk * 12, chunk * 12 + 12)
        assert torch.equal(
            mix_batch(part, part.index, VIEWS, mix, chunk_images=K, seed=9, device=CPU).images,
            both.images[rows],
        )


def test_padded_rows_are_nobodys_partner() -> None:
    is_real = np.array([True] * 5 + [False] * 3)
    partners = draw_partners(is_real[None], 1, 2, 3, 4)[0]
    assert sorted(partners[:5]) == [0, 1, 2, 3, 4] and list(partners[5:]) == [5, 6, 7]


def test_the_weights_of_a_group_sum_to_one_over_a_step() -> None:
    batch = make_batch(chunks=10, chunk_images=4)
    targets = mix_batch(batch, batch.index, VIEWS, Mix(), chunk_images=K, seed=0, device=CPU).targets
    for group in (0, 1):
        assert float(targets.weight[targets.group == group].sum()) == pytest.approx(1.0)


def test_without_mixing_every_row_is_its_own() -> None:
    batch = make_batch()
    mixed = mix_batch(batch, batch.label, VIEWS, Mix(kind="none"), chunk_images=K, seed=0, device=CPU)
    assert torch.equal(mixed.targets.a, mixed.targets.b) and torch.all(mixed.targets.lam == 1)


def test_alternate_mixes_up_in_even_epochs_and_cuts_in_odd_ones() -> None:
    mix = Mix(kind="alternate")
    assert [kind_in_epoch(mix, epoch) for epoch in range(3)] == ["mixup", "cutmix", "mixup"]


def test_the_folded_lambda_has_the_known_mean() -> None:
    drawn = draw_lambda(0.5, 0, np.arange(20_000), 0, 0)
    assert drawn.min() >= 0.5
    assert drawn.mean() == pytest.approx(0.5 + 1 / math.pi, abs=0.004)


@pytest.mark.parametrize(("side_px", "mean"), [(112, 0.868), (224, 0.866)])
def test_the_clipped_lambda_has_the_known_statistics(side_px: int, mean: float) -> None:
    drawn = draw_cutmix_box(side_px, 0.5, 0, np.arange(20_000), 0, 0).lam
    assert drawn.min() >= 0.5
    assert drawn.mean() == pytest.approx(mean, abs=0.003)
    if side_px == 112:
        assert np.median(drawn) == pytest.approx(0.895, abs=0.006)
        assert (drawn == 1).mean() == pytest.approx(0.023, abs=0.004)


def test_boxes_lie_inside_and_lambda_is_their_area() -> None:
    for step in range(2_000):
        box = draw_cutmix_box(33, 0.5, 1, step, 0, 0)
        assert 0 <= box.top <= box.bottom <= 33 and 0 <= box.left <= box.right <= 33
        assert box.lam == pytest.approx(1 - (box.bottom - box.top) * (box.right - box.left) / 33**2)


def test_normalise_is_pixel_over_255_less_mean_over_std() -> None:
    crops = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor(VIEWS.mean).view(3, 1, 1), torch.tensor(VIEWS.std).view(3, 1, 1)
    assert torch.allclose(normalise(crops, VIEWS), (crops / 255 - mean) / std, atol=1e-5)
