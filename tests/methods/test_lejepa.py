"""LeJEPA's terms: against a plain reference, SIGReg's known values, its symmetries, its directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.methods.reference import lejepa_terms
from vitds.methods.lejepa import draw_directions, invariance, sigreg

CHUNKS, VIEWS, K, D, GLOBAL = 2, 3, 6, 5, 2


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def directions(chunks: int = CHUNKS, width: int = D, count: int = 7) -> Tensor:
    return draw_directions(width, count, 0, 3, torch.arange(chunks).numpy())


def padded(*real: int) -> Tensor:
    return torch.arange(K)[None] < torch.tensor(real)[:, None]


def statistic(x_N: Tensor) -> float:
    """Of one chunk and view with one direction."""
    z = x_N.view(1, 1, -1, 1)
    return float(sigreg(z, torch.ones(1, len(x_N), dtype=torch.bool), torch.ones(1, 1, 1)))


@pytest.mark.parametrize("real", [(K, K), (K, 1), (2, 0)], ids=str)
def test_terms_equal_the_plain_reference_padding_included(real: tuple[int, ...]) -> None:
    z, is_real = features(0, CHUNKS, VIEWS, K, D), padded(*real)
    expected = lejepa_terms(z, is_real, directions(), GLOBAL)
    found = invariance(z, GLOBAL), sigreg(z, is_real, directions())
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences_and_padding_has_none() -> None:
    z, is_real = features(1, CHUNKS, VIEWS, K, D).requires_grad_(), padded(4, 0)
    assert torch.autograd.gradcheck(lambda x: invariance(x, GLOBAL).sum(), z)
    assert torch.autograd.gradcheck(lambda x: sigreg(x, is_real, directions()).sum(), z)
    sigreg(z, is_real, directions()).sum().backward()
    is_used = is_real[:, None].expand(-1, VIEWS, -1)
    assert z.grad[is_used].any() and not z.grad[~is_used].any()


def test_the_statistic_of_a_normal_sample_is_1_whatever_its_size() -> None:
    for size in (16, 256):
        x = features(2, 2000, size)
        z, is_real = x[:, None, :, None], torch.ones(2000, size, dtype=torch.bool)
        found = sigreg(z, is_real, torch.ones(2000, 1, 1))
        assert found.mean().item() == pytest.approx(1.0525, abs=0.06)
        assert found.std().item() == pytest.approx(0.95, abs=0.06)


def test_the_weights_of_the_points_are_the_integral_of_their_window() -> None:
    """Over a period of all cosines they cancel: what images cost more alone than together is the sum."""
    period = 2 * math.pi / (3 / 16)
    x = torch.linspace(0, period, 65, dtype=torch.float64)[:-1]
    together = statistic(x) / 64
    alone = sum(statistic(each[None]) for each in x) / 64
    # At t = 0 both functions are 1, so nothing tells its weight of 3 / 16.
    assert alone - together + 3 / 16 == pytest.approx(2.4997, abs=1e-4)


@pytest.mark.parametrize(
    ("scale", "shift", "of_n", "constant"),
    [
        (0.0, 0.0, 0.40205, 0.0),  # collapse
        (0.5, 0.0, 0.1512, 0.4535),
        (0.8, 0.0, 0.0218, 0.84),
        (1.2, 0.0, 0.0168, 1.227),
        (2.0, 0.0, 0.2361, 1.66),
        (1.0, 0.1, 0.0048, 1.0525),
        (1.0, 0.5, 0.118, 1.0525),
        (1.0, 1.0, 0.444, 1.0525),
    ],
)
def test_what_is_not_standard_normal_grows_with_the_images(
    scale: float, shift: float, of_n: float, constant: float
) -> None:
    size, repeats = 256, 200
    x = scale * features(3, repeats, size) + shift
    z, is_real = x[:, None, :, None], torch.ones(repeats, size, dtype=torch.bool)
    found = sigreg(z, is_real, torch.ones(repeats, 1, 1)).mean().item()
    assert found == pytest.approx(of_n * size + constant, rel=0.1, abs=0.1)


def test_features_of_length_one_are_far_from_normal() -> None:
    """So a normalisation that should not be there is seen at once."""
    z = torch.nn.functional.normalize(features(4, 1, 1, 256, 128), dim=3)
    found = sigreg(z, torch.ones(1, 256, dtype=torch.bool), directions(1, 128, 64))
    assert found.item() == pytest.approx(0.390 * 256, rel=0.02)


def test_the_statistic_does_not_change_with_sign_or_order_and_hardly_with_rotation() -> None:
    z, is_real = features(5, 1, 1, 64, D) * 1.5, torch.ones(1, 64, dtype=torch.bool)
    along = directions(1, D, 4096)
    expected = sigreg(z, is_real, along)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sigreg(-z, is_real, along), expected)
    torch.testing.assert_close(sigreg(z[:, :, order], is_real, along), expected)
    rotation = torch.linalg.qr(features(6, D, D))[0]
    assert sigreg(z @ rotation, is_real, along).item() == pytest.approx(expected.item(), rel=0.03)


def test_the_gradient_of_a_statistic_is_bounded() -> None:
    x = (10 * features(7, 1, 1, 64, 1)).requires_grad_()
    sigreg(x, torch.ones(1, 64, dtype=torch.bool), torch.ones(1, 1, 1)).sum().backward()
    assert 0 < x.grad.abs().max() <= 8


def test_views_alone_or_in_other_chunks_change_nothing() -> None:
    z, is_real = features(8, CHUNKS, VIEWS, K, D), padded(K, 4)
    whole = sigreg(z, is_real, directions())
    for chunk in range(CHUNKS):
        own = slice(chunk, chunk + 1)
        by_view = [sigreg(z[own, [view]], is_real[own], directions()[own]) for view in range(VIEWS)]
        torch.testing.assert_close(torch.stack(by_view).mean(0), whole[own])


def test_eight_images_end_with_equal_views_and_a_normal_spread() -> None:
    """Features of their own, without a network: invariance goes to 0 while the statistic stays near 1."""
    z = (3 * features(9, 1, 2, 8, 2) + 2).requires_grad_()
    is_real = torch.ones(1, 8, dtype=torch.bool)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for step in range(120):
        along = draw_directions(2, 16, 0, step, torch.zeros(1, dtype=torch.int64).numpy())
        terms = invariance(z, 2).mean(), sigreg(z, is_real, along).mean()
        optimizer.zero_grad()
        (0.95 * terms[0] + 0.05 * terms[1]).backward()
        optimizer.step()
    assert terms[0] < 1e-3 and 0.0 < terms[1] < 2.0


# Directions


def test_directions_have_length_one_and_are_evenly_spread() -> None:
    found = draw_directions(16, 4096, 1, 2, torch.arange(2).numpy()).double()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, 4096, dtype=torch.float64))
    covariance = found[0] @ found[0].T / 4096 * 16
    assert (covariance - torch.eye(16)).abs().max() < 0.1 and found[0].mean(1).abs().max() < 0.02


def test_directions_are_a_function_of_seed_step_and_chunk_alone() -> None:
    together = draw_directions(D, 7, 1, 2, torch.arange(4).numpy())
    parts = [draw_directions(D, 7, 1, 2, torch.arange(first, first + 2).numpy()) for first in (0, 2)]
    assert torch.equal(torch.cat(parts), together)
    others = [draw_directions(D, 7, *key, torch.arange(4).numpy()) for key in ((1, 3), (2, 2))]
    assert not any(torch.equal(other, together) for other in others) and not torch.equal(*together[:2])
