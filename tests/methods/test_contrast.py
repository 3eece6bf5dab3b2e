"""The contrastive losses: against a plain reference, their known values at collapse, at random and at their
floor, their symmetries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.reference import chunk_norm, mocov3_losses, simclr_losses
from vitds.heads.contrast import among_all_views, among_other_view
from vitds.heads.projector import ChunkNorm, Projector

CHUNKS, K, D = 3, 5, 7


def crops(seed: int = 0, chunks: int = CHUNKS, images: int = K, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(chunks, 2, images, width, dtype=torch.float64, generator=generator)


def padded(*real: int) -> Tensor:
    """Which images are real: so many of each chunk's K."""
    return torch.arange(K)[None] < torch.tensor(real)[:, None]


def both_views(is_real: Tensor) -> Tensor:
    return is_real[:, None].expand(-1, 2, -1)


def simclr(z: Tensor, is_real: Tensor, temperature: float) -> Tensor:
    return among_all_views(z.flatten(0, 2), both_views(is_real).flatten(1), temperature).view(z.shape[:3])


def mocov3(query: Tensor, key: Tensor, is_real: Tensor, temperature: float) -> Tensor:
    found = among_other_view(query.flatten(0, 2), key.flatten(0, 2), both_views(is_real), temperature)
    return found.view(query.shape[:3])


@pytest.mark.parametrize("real", [(K, K, K), (K, 3, 1), (K, 2, 0)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_losses_equal_the_plain_reference_padding_included(real: tuple[int, ...], temperature: float) -> None:
    z, key, is_real = crops(0), crops(1), padded(*real)
    torch.testing.assert_close(simclr(z, is_real, temperature), simclr_losses(z, is_real, temperature))
    torch.testing.assert_close(
        mocov3(z, key, is_real, temperature), mocov3_losses(z, key, is_real, temperature)
    )


@pytest.mark.parametrize("real", [(K, K, K), (K, 3, 1), (2, 1, 0)], ids=str)
def test_gradients_are_those_of_finite_differences_and_padding_has_none(real: tuple[int, ...]) -> None:
    is_real = padded(*real)
    z, key = crops(2).requires_grad_(), crops(3)
    assert torch.autograd.gradcheck(lambda x: simclr(x, is_real, 0.3).sum(), z)
    assert torch.autograd.gradcheck(lambda x: mocov3(x, key, is_real, 0.3).sum(), z)
    (simclr(z, is_real, 0.3) + mocov3(z, key, is_real, 0.3)).sum().backward()
    assert z.grad.isfinite().all() and not z.grad[~both_views(is_real)].any()


@pytest.mark.parametrize("images", [256, 512])
def test_collapsed_features_give_log_of_the_candidates(images: int) -> None:
    z = torch.ones(1, 2, images, 4, dtype=torch.float64)
    is_real = torch.ones(1, images, dtype=torch.bool)
    assert simclr(z, is_real, 0.5).mean().item() == pytest.approx(math.log(2 * images - 1))  # 6.2364, 6.9305
    assert mocov3(z, z, is_real, 0.2).mean().item() == pytest.approx(math.log(images))


@pytest.mark.parametrize(
    ("temperature", "width", "expected", "tolerance"),
    [
        (0.5, 128, 6.258, 0.012),
        (0.2, 256, 6.287, 0.02),
        (0.1, 128, 6.649, 0.06),
        (0.07, 128, 7.03, 0.06),
    ],
)
def test_random_features_start_a_little_above(
    temperature: float, width: int, expected: float, tolerance: float
) -> None:
    """An expansion gives 1 / (2 d T²) more than at collapse, where it is 6.2364: the tolerances tell them
    apart."""
    z = crops(4, 8, 256, width)
    loss = simclr(z, torch.ones(8, 256, dtype=torch.bool), temperature).mean().item()
    assert loss == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("temperature", "width", "expected"), [(0.5, 128, 4.264), (0.2, 256, 1.528), (0.1, 128, 0.034)]
)
def test_equal_views_of_random_features_are_nearly_at_the_floor(
    temperature: float, width: int, expected: float
) -> None:
    """So a loss that begins there has drawn both views alike."""
    z = crops(4, 1, 256, width)[:, :1].expand(-1, 2, -1, -1)
    loss = simclr(z, torch.ones(1, 256, dtype=torch.bool), temperature).mean().item()
    assert loss == pytest.approx(expected, abs=4e-3)


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 4.241), (0.2, 1.475), (0.1, 0.022)])
def test_the_floor_is_reached_by_the_corners_of_a_simplex(temperature: float, expected: float) -> None:
    images = 256
    corners = torch.eye(images, dtype=torch.float64) - 1 / images
    z = torch.stack([corners, corners])[None]
    is_real = torch.ones(1, images, dtype=torch.bool)
    assert simclr(z, is_real, temperature).mean().item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("images", "start", "floor"), [(256, 4.436, 0.790), (512, 4.991, 1.187), (1024, 5.545, 1.649)]
)
def test_mocov3_starts_at_four_t_log_n_and_its_floor_is_known(
    images: int, start: float, floor: float
) -> None:
    is_real = torch.ones(1, images, dtype=torch.bool)
    same = torch.ones(1, 2, images, 4, dtype=torch.float64)
    corners = torch.eye(images, dtype=torch.float64) - 1 / images
    best = torch.stack([corners, corners])[None]
    assert 4 * 0.2 * mocov3(same, same, is_real, 0.2).mean().item() == pytest.approx(start, abs=1e-3)
    assert 4 * 0.2 * mocov3(best, best, is_real, 0.2).mean().item() == pytest.approx(floor, abs=1e-3)


def test_mocov3_starts_at_four_t_log_n_with_the_largest_of_the_authors_batches() -> None:
    same = torch.ones(8192, 1)
    losses = among_other_view(same, same, torch.ones(1, 2, 4096, dtype=torch.bool), 0.2)
    assert 4 * 0.2 * losses.mean().item() == pytest.approx(6.654, abs=1e-3)


def test_losses_do_not_change_with_scale_rotation_swapped_views_or_order() -> None:
    z, is_real = crops(5), padded(K, K, K)
    rotation = torch.linalg.qr(
        torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )[0]
    lengths = torch.rand(*z.shape[:3], 1, dtype=torch.float64) + 0.5
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2))
    for loss in (lambda x: simclr(x, is_real, 0.3), lambda x: mocov3(x, x.flip(0), is_real, 0.3)):
        expected = loss(z)
        torch.testing.assert_close(loss(z * lengths), expected)
        torch.testing.assert_close(loss(z @ rotation), expected)
        torch.testing.assert_close(loss(z.flip(1)), expected.flip(1))
        torch.testing.assert_close(loss(z[:, :, order]), expected[:, :, order])


def test_simclrs_gradient_is_across_the_feature() -> None:
    z = crops(6).requires_grad_()
    simclr(z, padded(K, K, K), 0.3).sum().backward()
    along = (z.grad * z).sum(3)
    assert along.abs().max() < 1e-12 < z.grad.abs().max()


def test_chunks_do_not_see_each_other() -> None:
    z, is_real = crops(7), padded(K, 4, 2)
    whole = simclr(z, is_real, 0.3)
    for chunk in range(CHUNKS):
        own = slice(chunk, chunk + 1)
        torch.testing.assert_close(simclr(z[own], is_real[own], 0.3), whole[own])


# The projector and its norm


@pytest.mark.parametrize("real", [(K, K, K), (K, 3, 1)], ids=str)
def test_chunk_norm_equals_the_plain_reference(real: tuple[int, ...]) -> None:
    x, is_real = crops(8)[:, 0], padded(*real)
    found = ChunkNorm(D, "plain").double()(x.flatten(0, 1), is_real).view(x.shape)
    torch.testing.assert_close(found, chunk_norm(x, is_real))


def test_chunk_norm_of_one_whole_chunk_is_torchs_batch_norm_in_training() -> None:
    x = torch.randn(12, D, generator=torch.Generator().manual_seed(0))
    ours, theirs = ChunkNorm(D, "affine"), nn.BatchNorm1d(D)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, 0.3)
    torch.testing.assert_close(ours(x, torch.ones(1, 12, dtype=torch.bool)), theirs(x))


def test_padding_changes_nothing_of_the_real_crops_and_gets_finite_numbers() -> None:
    x, is_real = crops(9)[:, 0], padded(K, 3, 0)
    norm = ChunkNorm(D, "plain").double()
    changed = torch.where(is_real[..., None], x, 100.0)
    before, after = (norm(part.flatten(0, 1), is_real).view(x.shape) for part in (x, changed))
    assert torch.equal(before[is_real], after[is_real]) and after.isfinite().all()


def test_a_chunk_of_padding_alone_stays_finite_in_fp16_through_a_projector_and_back() -> None:
    """Divided by its variance of 0 it would grow 316-fold a layer."""
    torch.manual_seed(0)
    projector = Projector([8, 2048, 2048, 8], last="scale").half()
    x = 0.5 + torch.randn(2 * K, 8).half()
    found = projector(x, padded(K, 0))
    assert found.isfinite().all()
    found[:K].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in projector.parameters())


def test_chunk_norm_of_half_precision_is_that_of_the_rounded_numbers_in_float32() -> None:
    x, is_real = (3 + crops(10)[:, 0]).bfloat16(), padded(K, 3, 1)
    found = ChunkNorm(D, "affine")(x.flatten(0, 1), is_real).view(x.shape)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, chunk_norm(x.double(), is_real).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("last", "learned"), [("scale", 1), ("plain", 0)])
def test_a_projector_has_no_bias_in_its_layers_and_the_norm_that_is_asked_for_at_its_end(
    last: Any, learned: int
) -> None:
    projector = Projector([4, 8, 8, 3], last=last)
    assert [tuple(layer.weight.shape) for layer in projector.layers] == [(8, 4), (8, 8), (3, 8)]
    assert all(layer.bias is None for layer in projector.layers)
    assert [len(list(norm.parameters())) for norm in projector.norms] == [2, 2, learned]
    assert projector(torch.randn(6, 4), torch.ones(1, 6, dtype=torch.bool)).shape == (6, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_projector_of_16_bit_weights_takes_what_its_float32_norms_give(dtype: torch.dtype) -> None:
    projector = Projector([4, 8, 8, 3], last="scale").to(dtype)
    found = projector(torch.randn(6, 4, dtype=dtype), torch.ones(1, 6, dtype=torch.bool))
    assert found.dtype == torch.float32 and found.isfinite().all()
