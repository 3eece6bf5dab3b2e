"""Written plainly: the loss of full logits by torch's own cross-entropy, sampled negatives, lean AdamW."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitds import rng
from vitds.batch import Targets
from vitds.rng import Purpose


def full_logits(
    features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | None = None
) -> Tensor:
    """(M, N); cosine form with a temperature."""
    if temperature is not None:
        weight = weight / weight.norm(dim=1, keepdim=True)
        features = features / features.norm(dim=1, keepdim=True) / temperature
    return features @ weight.T + (0 if bias is None else bias)


def mixed_cross_entropy(logits: Tensor, a: Tensor, b: Tensor, lam: Tensor, label_smoothing: float) -> Tensor:
    """lam CE(logits, a) + (1 - lam) CE(logits, b), a value a row."""
    loss = torch.nn.functional.cross_entropy
    first, second = (
        loss(logits, target, reduction="none", label_smoothing=label_smoothing) for target in (a, b)
    )
    return lam * first + (1 - lam) * second


def drawn_counts(rows: int, rate: float, seed: int, step: int) -> Tensor:
    """How often each row counts as a negative.

    One row of each stratum of 1 / rate rows counts as often as the stratum has rows, the others not at all.
    """
    counts, stratum, start = torch.zeros(rows), 0, 0
    while start < rows:
        stop = min(int((stratum + 1) / rate), rows)
        counts[start + int(float(rng.uniform(Purpose.NEGATIVES, seed, step, stratum)) * (stop - start))] = (
            stop - start
        )
        stratum, start = stratum + 1, stop
    return counts


def sampled_loss(logits: Tensor, counts: Tensor, targets: Targets, label_smoothing: float) -> Tensor:
    """The loss of each row where row k of the head stands for counts[k] rows."""
    total = (counts * logits.exp()).sum(1).log()
    row = torch.arange(len(logits))
    target = targets.lam * logits[row, targets.a] + (1 - targets.lam) * logits[row, targets.b]
    return (
        total - (1 - label_smoothing) * target - label_smoothing * (counts * logits).sum(1) / logits.shape[1]
    )


def lean_adamw(
    weight: Tensor,
    gradients: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """The weight after a step for each gradient."""
    rows = weight.double().clone()
    for row in range(len(rows)):
        mean_of_squares, moments = 0.0, [0.0] * rows.shape[1]
        for step, gradient in enumerate(gradients, 1):
            g = gradient[row].double().tolist()
            mean_of_squares = betas[1] * mean_of_squares + (1 - betas[1]) * sum(
                value**2 for value in g
            ) / len(g)
            divisor = (mean_of_squares / (1 - betas[1] ** step)) ** 0.5 + eps
            for column, value in enumerate(g):
                moment = betas[0] * moments[column] + (1 - betas[0]) * value
                rows[row, column] *= 1 - lr * weight_decay
                rows[row, column] -= lr * moment / (1 - betas[0] ** step) / divisor
                moments[column] = float(torch.tensor(moment).bfloat16())
    return rows.to(weight.dtype)


class Allocations(TorchDispatchMode):
    """Notes the size of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = function(*args, **(kwargs or {}))
        if (
            isinstance(out, Tensor)
            and not any(out is given for given in (*args, *(kwargs or {}).values()))
            and not function.is_view
        ):
            self.numbers.append(out.numel())
        return out
