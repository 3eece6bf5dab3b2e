"""linear_logsumexp against torch.logsumexp on full logits: values, gradients, memory, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.heads.reference import Allocations, full_logits
from vitds.errors import ShapeError
from vitds.heads import linear_logsumexp
from vitds.heads.logsumexp import highest_logits
from vitds.heads.tiles import choose_tiling

M, D, N = 7, 5, 23


def inputs(
    dtype: torch.dtype = torch.float64, rows: int = N, bias: bool = True, scale: float = 3.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(M, D), (rows, D), (rows,)] if bias else [(M, D), (rows, D)]
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for shape in shapes
    ]


def outcome(function, tensors: list[Tensor]) -> list[Tensor]:
    """The values, and the gradients of a sum that weighs every row differently."""
    values = function(*tensors)
    gradients = torch.autograd.grad((values * torch.linspace(0.5, 2, M)).sum(), tensors)
    return [values.detach(), *gradients]


def reference(tensors: list[Tensor]) -> list[Tensor]:
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    return outcome(lambda x, w, b=None: full_logits(x, w, b).logsumexp(1), exact)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20], ids=["recomputed", "kept"])
@pytest.mark.parametrize("tile_rows", [1, 4, 23, 100, "auto"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_logsumexp_of_full_logits(keep_bytes: int, tile_rows: int | str, bias: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        tensors = inputs(dtype, bias=bias)
        found = outcome(
            lambda *given: linear_logsumexp(*given, tile_rows=tile_rows, keep_bytes=keep_bytes), tensors
        )
        for value, expected in zip(found, reference(tensors), strict=True):
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20], ids=["recomputed", "kept"])
def test_gradients_pass_a_check_by_differences(keep_bytes: int) -> None:
    torch.autograd.gradcheck(
        lambda *given: linear_logsumexp(*given, tile_rows=6, keep_bytes=keep_bytes), inputs(scale=1.0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep_bytes", [0, 1 << 20], ids=["recomputed", "kept"])
def test_half_precision_is_summed_in_float32(keep_bytes: int, dtype: torch.dtype) -> None:
    """bfloat16 takes the kernel, float16 torch's softmax, as all numbers do on a GPU."""
    tensors = inputs(dtype, rows=400, scale=1.0)
    value, *gradients = outcome(
        lambda *given: linear_logsumexp(*given, tile_rows=30, keep_bytes=keep_bytes), tensors
    )
    expected, *expected_gradients = reference(tensors)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=0.02)
    for found, exact, given in zip(gradients, expected_gradients, tensors, strict=True):
        assert found.dtype == given.dtype == dtype
        assert (found.double() - exact).norm() < 0.01 * exact.norm()


def test_autocast_multiplies_in_its_dtype_and_returns_float32() -> None:
    tensors = inputs(torch.float32, scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_tiling(*tensors[:2]).product == torch.bfloat16
        values = linear_logsumexp(*tensors)
    values.sum().backward()
    assert [values.dtype, *(tensor.grad.dtype for tensor in tensors)] == [torch.float32] * 4
    exact = full_logits(*(tensor.detach().double() for tensor in tensors)).logsumexp(1)
    assert 1e-5 < (values.detach() - exact).abs().max() < 0.03


@pytest.mark.parametrize("shift", [-1e6, -1e4, 1e4, 1e6])
def test_large_logits_lose_nothing(shift: float) -> None:
    features, weight = torch.eye(1, D), torch.zeros(N, D)
    weight[:, 0] = shift
    weight[3, 0] = 0.0  # one logit of 0 beside 22 of `shift`, in a tile of its own kind
    features, weight = features.requires_grad_(), weight.requires_grad_()
    value = linear_logsumexp(features, weight, tile_rows=2)
    value.sum().backward()
    exact = full_logits(features.detach().double(), weight.detach().double(), None).logsumexp(1)
    torch.testing.assert_close(value.double(), exact, rtol=2e-7, atol=0)
    expected = torch.softmax(full_logits(features.detach().double(), weight.detach().double(), None), 1)[0]
    torch.testing.assert_close(weight.grad[:, 0].double(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    features, weight, bias = (tensor.detach() for tensor in inputs(torch.float32))
    features[2, 1] = bad
    values = linear_logsumexp(features, weight, bias, tile_rows=4)
    assert torch.isfinite(values).tolist() == [row != 2 for row in range(M)]
    weight[11] = float("nan")
    assert not torch.isfinite(linear_logsumexp(features, weight, bias, tile_rows=4)).any()


def test_the_logits_never_lie_in_memory_whole() -> None:
    features, weight = torch.randn(64, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    with Allocations() as made:
        linear_logsumexp(features, weight, tile_rows=100, keep_bytes=0).sum().backward()
    large = [numbers for numbers in made.numbers if numbers > 64 * 100]
    assert large == [5000 * 8]  # the weight's gradient


def test_tiles_are_sized_for_the_cache_and_for_many_features() -> None:
    weight = torch.empty(1_281_167, 1)
    for features, rows in ((100, 5232), (512, 1136), (100_000, 1136)):
        assert choose_tiling(torch.empty(features, 1), weight, keep_bytes=0).tile_rows == rows


def test_a_second_backward_pass_says_so() -> None:
    value = linear_logsumexp(*inputs()).sum()
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_a_gradient_of_the_gradient_says_so() -> None:
    tensors = inputs()
    with pytest.raises(
        NotImplementedError, match="can be differentiated once: call backward without create_graph"
    ):
        torch.autograd.grad(linear_logsumexp(*tensors).sum(), tensors[:1], create_graph=True)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, bias = (tensor.detach() for tensor in inputs())
    with pytest.raises(
        ShapeError, match="features are 5 wide, the head's rows 4; was it built for another backbone"
    ):
        linear_logsumexp(x, weight[:, :4])
    with pytest.raises(ShapeError, match="the head has no rows: a log-sum-exp needs one at least"):
        linear_logsumexp(x, weight[:0])
    with pytest.raises(ShapeError, match="the head has 23 rows and 22 biases"):
        linear_logsumexp(x, weight, bias[:22])
    with pytest.raises(ValueError, match="tile_rows must be 1 or more, got 0"):
        linear_logsumexp(x, weight, tile_rows=0)


@pytest.mark.parametrize("is_cosine", [True, False])
def test_highest_logits_are_those_of_the_full_matrix(
    is_cosine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitds.heads.tiles.CPU_TILE_NUMBERS", {4: 1})  # sixteen rows a tile
    x, weight, bias = (tensor.detach() for tensor in inputs(torch.float32))
    rows = weight / weight.norm(dim=1, keepdim=True) if is_cosine else weight
    logits = full_logits(x, rows, bias)
    best = logits.argmax(1)
    highest, own = highest_logits(x, weight, bias, best, is_cosine=is_cosine)
    assert torch.equal(highest, own)
    torch.testing.assert_close(highest, logits.amax(1))
    highest, own = highest_logits(
        x, weight, bias, torch.tensor([-1, 23, 0, 1, 15, 16, 22]), is_cosine=is_cosine
    )
    assert own[:2].tolist() == [-torch.inf] * 2
    torch.testing.assert_close(own[2:], logits[torch.arange(2, 7), torch.tensor([0, 1, 15, 16, 22])])
