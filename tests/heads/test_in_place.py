"""The head's way on a GPU (in_place.py): values and gradients against full logits, with its kernels on
Triton's interpreter; the choice of it; its launches and its memory, by tensors without numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.heads import test_heads, test_logsumexp
from tests.heads.reference import full_logits
from tests.heads.test_heads import differing, form, make_rows
from tests.heads.test_logsumexp import inputs, outcome
from tests.interpreted import Interpreted
from tests.methods.fake_card import CardKernels
from vitds.config.tree import Head
from vitds.heads import ShardedHead, linear_logsumexp, tiles
from vitds.heads.bytes import work_bytes
from vitds.heads.logsumexp import row_terms
from vitds.heads.tiles import choose_softmax

ROWS, M, D = 200_000, 1536, 384  # of launches and memory
BLOCK = 16  # logits that a program of a kernel holds at once here; no width is a multiple of it

# In the interpreter's process ------------------------------------------------------------------------------


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """Tensors of the CPU go the way of a GPU's."""
    from vitds.kernels import softmax_gpu as kernels  # only where TRITON_INTERPRET was set before

    with (
        patch.object(tiles, "choose_softmax", lambda device, product: "Triton"),
        patch("vitds.heads.in_place.gpu_kernels", lambda: kernels),
        patch.multiple(kernels, FIND_NUMBERS=BLOCK, WEIGH_NUMBERS=BLOCK),
    ):
        yield


def logsumexp(dtype: torch.dtype, rows: int, *, scale: float, bias: bool, **options: Any) -> list[Tensor]:
    with on_a_gpu():
        return outcome(
            lambda *given: linear_logsumexp(*given, **options), inputs(dtype, rows, bias=bias, scale=scale)
        )


def autocast_logsumexp() -> list[Tensor]:
    with on_a_gpu(), torch.autocast("cpu", torch.bfloat16):
        return outcome(
            lambda *given: linear_logsumexp(*given, tile_rows=30, keep_bytes=0),
            inputs(torch.float32, 400, scale=1.0),
        )


def values(*tensors: Tensor) -> Tensor:
    with on_a_gpu():
        return linear_logsumexp(*tensors, tile_rows=6)


def large_logits(shift: float) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of one logit of 0 beside 22 of `shift`, and the gradient of these logits."""
    features, weight = torch.eye(1, 5, requires_grad=True), torch.zeros(23, 5)
    weight[:, 0] = shift
    weight[3, 0] = 0.0
    weight.requires_grad_()
    with on_a_gpu():
        value = linear_logsumexp(features, weight, tile_rows=2)
        value.sum().backward()
    return value.detach(), weight.grad[:, 0]


def dense(rows: int, kept: bool, options: dict[str, Any]) -> dict[str, np.ndarray]:
    with on_a_gpu():
        return test_heads.dense(rows, kept, **options)


def sharded(options: dict[str, Any], micro_steps: int) -> dict[str, np.ndarray]:
    with on_a_gpu():
        return test_heads.sharded_on_a_rank(50, options, micro_steps)


def bfloat16_rows(dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    """Losses, and the gradients of features and rows, of rows that are bfloat16 numbers."""
    features, targets = make_rows(50)
    head, x = ShardedHead(50, features.shape[1], dtype=dtype, **options), features.clone().requires_grad_()
    head.weight.data.copy_(head.weight.data.bfloat16())
    with on_a_gpu():
        losses, _ = head.crop_losses(x, targets)
        (losses * targets.weight).sum().backward()
    return [losses.detach(), x.grad, head.weight.grad]


def two_backward_passes(keep_bytes: int) -> list[Tensor] | str:
    """The gradients of the features, or the error's text."""
    x, weight = inputs(torch.float32, bias=False)
    with on_a_gpu():
        value = linear_logsumexp(x, weight, keep_bytes=keep_bytes).sum()
        try:
            return [torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2)]
        except RuntimeError as error:
            return str(error)


# Values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20], ids=["recomputed", "kept"])
@pytest.mark.parametrize("tile_rows", [5, 23, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_logsumexp_of_full_logits(
    bias: bool, tile_rows: int, keep_bytes: int, interpreted: Interpreted
) -> None:
    options = {"tile_rows": tile_rows, "keep_bytes": keep_bytes}
    found = interpreted(logsumexp, torch.float32, 23, scale=3.0, bias=bias, **options)
    for value, expected in zip(found, test_logsumexp.reference(inputs(bias=bias)), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20], ids=["recomputed", "kept"])
def test_bfloat16_is_summed_in_float32(keep_bytes: int, interpreted: Interpreted) -> None:
    options = {"tile_rows": 30, "keep_bytes": keep_bytes}
    value, *gradients = interpreted(logsumexp, torch.bfloat16, 400, scale=1.0, bias=True, **options)
    expected, *exact = test_logsumexp.reference(inputs(torch.bfloat16, 400, scale=1.0))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=0.02)
    for found, right in zip(gradients, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - right).norm() < 0.01 * right.norm()


def test_autocast_puts_float32_sums_into_float32_gradients(interpreted: Interpreted) -> None:
    value, *gradients = interpreted(autocast_logsumexp)
    expected, *exact = test_logsumexp.reference(inputs(torch.float32, 400, scale=1.0))
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=0.03)
    for found, right in zip(gradients, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - right).norm() < 0.02 * right.norm()
        # They were never rounded to bfloat16 on the way.
        assert (found != found.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("shift", [-1e6, -1e4, 1e4, 1e6])
def test_large_logits_lose_nothing(shift: float, interpreted: Interpreted) -> None:
    value, gradient = interpreted(large_logits, shift)
    logits = torch.full((23,), shift, dtype=torch.float64)
    logits[3] = 0.0
    torch.testing.assert_close(value.double(), logits.logsumexp(0)[None], rtol=2e-7, atol=0)
    torch.testing.assert_close(gradient.double(), logits.softmax(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_crop(bad: float, interpreted: Interpreted) -> None:
    features, weight, bias = (tensor.detach() for tensor in inputs(torch.float32))
    features[2, 1] = bad
    found = interpreted(values, features, weight, bias)
    assert torch.isfinite(found).tolist() == [crop != 2 for crop in range(len(features))]
    weight[11] = math.nan
    assert not torch.isfinite(interpreted(values, features, weight, bias)).any()


def test_a_row_with_a_bias_of_minus_infinity_takes_no_part(interpreted: Interpreted) -> None:
    features, weight, bias = (tensor.detach() for tensor in inputs(torch.float32))
    bias[4] = -math.inf
    bias[12:18] = -math.inf  # all rows of a tile
    exact = full_logits(features, weight, bias).logsumexp(1)
    torch.testing.assert_close(interpreted(values, features, weight, bias), exact, rtol=1e-5, atol=1e-5)
    bias.fill_(-math.inf)
    assert not torch.isfinite(interpreted(values, features, weight, bias)).any()


@pytest.mark.parametrize(
    "options",
    [form(bias=False), form(), form(label_smoothing=0.0), form(temperature=0.2), form(False, 0.0, 0.05)],
    ids=str,
)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rows", [50, 3])
def test_dense_head_equals_cross_entropy(
    rows: int, kept: bool, options: dict[str, Any], interpreted: Interpreted
) -> None:
    assert differing(interpreted(dense, rows, kept, options), test_heads.reference(rows, **options)) == []


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_micro_steps_add_up_in_the_sharded_heads_memory(
    temperature: float | None, interpreted: Interpreted
) -> None:
    options = form(temperature=temperature)
    assert differing(interpreted(sharded, options, 1), test_heads.reference(50, **options)) == []
    once, thrice = (interpreted(sharded, options, micro_steps) for micro_steps in (1, 3))
    for name in ("features", "weight", "bias"):
        np.testing.assert_allclose(thrice[name], 3 * once[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [None, 0.2])
def test_bfloat16_rows_get_the_gradient_of_their_values_rounded(
    temperature: float | None, interpreted: Interpreted
) -> None:
    options = form(temperature=temperature)
    rounded, exact = (interpreted(bfloat16_rows, dtype, options) for dtype in (torch.bfloat16, torch.float32))
    assert rounded[2].dtype == torch.bfloat16
    torch.testing.assert_close(rounded[2].float(), exact[2], rtol=0.02, atol=5e-4)
    # Losses and the features' gradients are not rounded.
    torch.testing.assert_close(rounded[:2], exact[:2], rtol=1e-5, atol=1e-5)


def test_a_second_backward_pass_is_right_or_refused(interpreted: Interpreted) -> None:
    first, second = interpreted(two_backward_passes, 0)
    assert torch.equal(first, second)
    # The logits that were kept are their gradient by then.
    assert "modified by an inplace operation" in interpreted(two_backward_passes, 1 << 20)


# The choice ------------------------------------------------------------------------------------------------


def test_who_makes_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    host, card = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(tiles, "gpu_kernels", lambda: CardKernels)
    for dtype in (torch.float32, torch.bfloat16):
        assert (choose_softmax(host, dtype), choose_softmax(card, dtype)) == ("C", "Triton")
    for dtype in (torch.float16, torch.float64):
        assert (choose_softmax(host, dtype), choose_softmax(card, dtype)) == ("torch", "torch")
    monkeypatch.setattr(tiles, "gpu_kernels", lambda: None)
    assert choose_softmax(card, torch.float32) == "torch"


def test_where_the_kernels_do_not_run_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with patch.object(tiles, "import_module", side_effect=ImportError("no x")):
        assert tiles.gpu_kernels.__wrapped__() is None
    assert "torch's operations, which are slower, take their place: ImportError: no x" in caplog.text


# Launches and memory ---------------------------------------------------------------------------------------


class Card(TorchDispatchMode):
    """Counts launches, and the most bytes that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.most, self._living = 0, 0, {}

    def living(self) -> int:
        self._living = {key: each for key, each in self._living.items() if not each[0].expired()}
        return sum(size for _, size in self._living.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            is_memory_alone = function.is_view or "empty" in function.name() or "detach" in function.name()
            self.launches += not is_memory_alone
            storage = out.untyped_storage()
            self._living.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
            self.most = max(self.most, self.living())
        return out


def step_on_a_card(rows: int, *, dtype: torch.dtype, bias: bool, cosine: bool, adds: bool) -> tuple[int, int]:
    """Launches of a step with bf16 products; bytes beyond rows, biases and their gradients."""
    CardKernels.launches = 0
    with (
        FakeTensorMode(),
        Card() as card,
        patch.object(tiles, "choose_softmax", lambda device, product: "Triton"),
        patch("vitds.heads.in_place.gpu_kernels", lambda: CardKernels),
    ):
        weight = torch.empty(rows, D, dtype=dtype, requires_grad=True)
        gradient = torch.empty(rows, D, dtype=dtype)
        shift = torch.empty(rows, requires_grad=True) if bias else None
        features, picks = torch.empty(M, D, requires_grad=True), torch.empty(M, 2, dtype=torch.int64)
        if adds:
            weight.grad = gradient
        before, card.launches = card.living(), 0
        with torch.autocast("cpu", torch.bfloat16):
            lse, logits, total = row_terms(
                features, weight, shift, picks, sums_rows=True, is_cosine=cosine, gradient=gradient
            )
            loss = (lse - logits.sum(1) - total).sum()
        loss.backward()
    return card.launches + CardKernels.launches, card.most - before - 4 * rows * bias


@pytest.mark.parametrize(
    ("form", "launches"),
    [
        ({}, 213),
        ({"adds": True}, 213),  # a later micro step
        ({"bias": False}, 187),
        ({"dtype": torch.bfloat16}, 173),
        ({"cosine": True, "bias": False}, 679),
    ],
    ids=str,
)
def test_launches_are_few_and_64_mb_are_enough(form: dict[str, Any], launches: int) -> None:
    form = {"dtype": torch.float32, "bias": True, "cosine": False, "adds": False} | form
    made, extra = step_on_a_card(ROWS, **form)
    assert made == launches
    assert extra <= 64e6
    # The plan says what it takes.
    planned = work_bytes(Head(cosine=form["cosine"]), ROWS, D, M, product=2, on_gpu=True)
    assert 0.95 * extra <= planned <= 1.4 * extra
