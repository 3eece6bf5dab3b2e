"""What a method's batch is made of when it was drawn ahead, and when it is drawn on demand, is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.methods.test_devices import built, micro_batch
from vitds.batch import TrainBatch, each_tensor


def tensors(record: TrainBatch) -> list[Tensor]:
    found = []
    each_tensor(record, lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("idmm_digits", ["mix.kind=alternate"]),
        ("finetune_digits", ["mix.kind=alternate"]),
        ("diet_digits", []),
        ("simclr_digits", []),
        ("mocov3_digits", []),
        ("lejepa_digits", []),
        ("supcon_digits", []),
        ("dino_digits", []),
        ("mae_digits", []),
    ],
)
def test_a_batch_drawn_ahead_is_the_one_drawn_on_demand(recipe: str, words: list[str]) -> None:
    settings, method, stochastic = built(recipe, words)
    crops = torch.randint(0, 256, micro_batch(settings, stochastic).crops.shape, dtype=torch.uint8)
    for epoch in (0, 1):
        batch = micro_batch(settings, stochastic, epoch=epoch, step=3 + epoch, first_chunk=2, crops=crops)
        ahead, on_demand = (
            tensors(method.prepare(each, settings, torch.device("cpu")))
            for each in (batch, replace(batch, draws=None, sheet=None))
        )
        assert len(ahead) == len(on_demand) >= 6
        assert all(torch.equal(*pair) for pair in zip(ahead, on_demand, strict=True))
