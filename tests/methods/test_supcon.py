"""SupCon's loss: against a plain reference, SimCLR where every image is its own class, its floors, its
symmetries."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from tests.methods.reference import simclr_losses, supcon_losses
from vitds.augment.mix import plain_batch
from vitds.batch import CropBatch
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.data.build import build_beton
from vitds.errors import DataError
from vitds.heads.contrast import among_class
from vitds.jobs.data_files import training_files
from vitds.methods.supcon import Method
from vitds.models.build import build_backbone

CHUNKS, K, D, T = 3, 6, 7, 0.1
LABELS = torch.tensor([[0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5]])


def crops(seed: int = 0, views: int = 2, chunks: int = CHUNKS, images: int = K, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(chunks, views, images, width, dtype=torch.float64, generator=generator)


def padded(*real: int) -> Tensor:
    return torch.arange(K)[None] < torch.tensor(real)[:, None]


def supcon(z: Tensor, label: Tensor, is_real: Tensor, temperature: float = T) -> Tensor:
    label, is_real = (each[:, None].expand(z.shape[:3]).flatten(1) for each in (label, is_real))
    return among_class(z.flatten(0, 2), label, is_real, temperature).view(z.shape[:3])


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("real", [(K, K, K), (K, 3, 1), (K, 2, 0)], ids=str)
def test_losses_equal_the_plain_reference_padding_included(views: int, real: tuple[int, ...]) -> None:
    z, is_real = crops(0, views), padded(*real)
    torch.testing.assert_close(supcon(z, LABELS, is_real), supcon_losses(z, LABELS, is_real, T))


def test_gradients_are_those_of_finite_differences_and_padding_has_none() -> None:
    z, is_real = crops(1).requires_grad_(), padded(K, 2, 0)
    assert torch.autograd.gradcheck(lambda x: supcon(x, LABELS, is_real, 0.3).sum(), z)
    supcon(z, LABELS, is_real).sum().backward()
    assert z.grad.isfinite().all() and not z.grad[~is_real[:, None].expand(-1, 2, -1)].any()


def test_with_a_class_for_each_image_it_is_simclrs() -> None:
    z, is_real = crops(2), padded(K, K, 4)
    own = torch.arange(K).expand(CHUNKS, K)
    torch.testing.assert_close(supcon(z, own, is_real), simclr_losses(z, is_real, T))


def test_an_image_alone_in_its_class_with_one_view_adds_nothing() -> None:
    z = crops(3, views=1).requires_grad_()
    loss = supcon(z, torch.arange(K).expand(CHUNKS, K), padded(K, K, 1))
    loss.sum().backward()
    assert not loss.any() and not z.grad.any()


@pytest.mark.parametrize("images", [8, 256])
def test_with_one_class_alone_no_crop_gets_below_log_of_the_others(images: int) -> None:
    """So a chunk of one class pulls nothing together: equal features are at the floor."""
    is_real, label = torch.ones(1, images, dtype=torch.bool), torch.zeros(1, images, dtype=torch.int64)
    floor = math.log(2 * images - 1)
    same = torch.ones(1, 2, images, 4, dtype=torch.float64)
    assert supcon(same, label, is_real).mean().item() == pytest.approx(floor)
    assert supcon(crops(4, chunks=1, images=images), label, is_real).min() > floor


def test_a_crop_is_bound_by_log_of_how_many_it_has_to_find_and_reaches_it() -> None:
    corners = torch.eye(7, dtype=torch.float64)[LABELS]
    z = torch.stack([corners, corners], 1)
    others = torch.stack([(row[:, None] == row).sum(1) for row in LABELS]) * 2 - 1
    found = supcon(z, LABELS, padded(K, K, K), 0.02)
    torch.testing.assert_close(found[:, 0], others.double().log(), rtol=0, atol=1e-9)
    assert (supcon(crops(5), LABELS, padded(K, K, K)) > others[:, None].log()).all()


def test_losses_do_not_change_with_names_of_classes_scale_rotation_views_or_order() -> None:
    z, is_real = crops(6), padded(K, K, K)
    expected = supcon(z, LABELS, is_real)
    rotation = torch.linalg.qr(crops(7, 1, 1, D, D)[0, 0])[0]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2))
    names = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(supcon(z, names[LABELS], is_real), expected)
    torch.testing.assert_close(supcon(3 * z, LABELS, is_real), expected)
    torch.testing.assert_close(supcon(z @ rotation, LABELS, is_real), expected)
    torch.testing.assert_close(supcon(z.flip(1), LABELS, is_real), expected.flip(1))
    torch.testing.assert_close(supcon(z[:, :, order], LABELS[:, order], is_real), expected[:, :, order])


def test_chunks_do_not_see_each_other() -> None:
    z, is_real = crops(8), padded(K, 4, 2)
    whole = supcon(z, LABELS, is_real)
    for chunk in range(CHUNKS):
        own = slice(chunk, chunk + 1)
        torch.testing.assert_close(supcon(z[own], LABELS[own], is_real[own]), whole[own])


def test_the_methods_term_is_the_mean_over_all_crops_by_classes_times_the_authors_factor() -> None:
    words = ["batch.global_images=12", "batch.chunk_images=6"]
    settings = load_settings(recipe="supcon_digits", command="pretrain", assignments=words, flags={})
    side, images = settings.views.crop_px, 12
    batch = CropBatch(
        crops=torch.randint(0, 256, (images, 2, 3, side, side), dtype=torch.uint8),
        index=torch.arange(images),
        label=torch.arange(images) % 3,
        is_real=torch.arange(images) < 11,
        epoch=0,
        step=0,
        first_chunk=0,
        real_images=11,
    )
    method = Method(settings, build_backbone(settings.backbone, crop_px=side, seed=0), 0)
    cpu = torch.device("cpu")
    (term,) = method.losses(method.module, method.prepare(batch, settings, cpu), 0)
    plain = plain_batch(batch, settings.views, chunk_images=6, device=cpu)
    z = method.module.projector(method.module.backbone(plain.images)).unflatten(0, (2, 2, 6))
    expected = (
        supcon_losses(z.detach().double(), batch.label.view(2, 6), batch.is_real.view(2, 6), T).sum() / 22
    )
    assert term.item() == pytest.approx(T / 0.07 * expected.item(), rel=1e-5)


# Labels


def settings_on(file: Path) -> Settings:
    words = [f"data.train={file}", "data.test=null"]
    return load_settings(recipe="supcon_digits", command="pretrain", assignments=words, flags={})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two digits of two classes each, and three of which nothing is said."""
    root, images = tmp_path_factory.mktemp("images"), load_digits().images
    for number, place in enumerate(["a/zero", "a/one", "a/zero", "a/one", "b", "b", "b"]):
        (root / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[number] * 15.9).astype(np.uint8)).save(root / place / f"{number}.png")
    return root / "a", root / "b"


def test_images_without_a_label_are_left_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    build_beton([folders[0]], tmp_path / "some.beton", unlabelled=folders[1], workers=1)
    file, _ = training_files(settings_on(tmp_path / "some.beton"))
    assert file.images == 4 and set(file.labels.tolist()) == {0, 1}


def test_a_file_without_labels_is_refused_with_what_trains_without(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    build_beton([folders[1]], tmp_path / "none.beton", workers=1)
    with pytest.raises(DataError, match=r"none.beton has no labels; training on labels needs two classes"):
        training_files(settings_on(tmp_path / "none.beton"))


def test_training_without_test_images_needs_no_class_head_to_be_measured(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    build_beton([folders[0]], tmp_path / "a.beton", workers=1)
    settings = settings_on(tmp_path / "a.beton")
    settings = settings.model_copy(update={"eval": settings.eval.model_copy(update={"every_epochs": 1})})
    assert training_files(settings)[1] is None
