"""What heads say that they take, against the tensors that they have."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from vitds.config.tree import Head, Settings
from vitds.engine.head_shard import HeadShard
from vitds.heads.bytes import dense_parameters, rows_in_play, shard_bytes
from vitds.heads.dense import DenseHead
from vitds.heads.sampling import drawn_rows
from vitds.heads.sharded import ShardedHead
from vitds.methods.idmm import ROW_DTYPES
from vitds.schedule import LearningRate

ROWS, WIDTH, CROPS = 500, 24, 30


def total(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_head_has_the_numbers_that_it_says(bias: bool) -> None:
    settings = Head(bias=bias)
    head = DenseHead(ROWS, WIDTH, seed=0, **settings.form)
    numbers = tuple(parameter.numel() for parameter in head.parameters())
    assert dense_parameters(settings, ROWS, WIDTH) == numbers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"optimizer": "lean"},
        {"optimizer": "lean", "row_dtype": "bf16"},
        {"sample_rate": 0.1},
        {"sample_rate": 0.1, "lazy": True},
        {"sample_rate": 0.1, "lazy": True, "optimizer": "lean", "row_dtype": "bf16"},
    ],
    ids=str,
)
def test_a_sharded_head_has_the_bytes_that_it_says(form: dict[str, object], bias: bool) -> None:
    settings = Settings(head=Head(kind="sharded", bias=bias, **form), engine={"precision": "fp32"})
    own = settings.head
    dtype = ROW_DTYPES[own.row_dtype]
    head = ShardedHead(ROWS, WIDTH, seed=0, sample_rate=own.sample_rate, dtype=dtype, **own.form)
    shard = HeadShard(head, settings, torch.device("cpu"), LearningRate(peak=1e-3, warmup=0, total=1))
    said = shard_bytes(own, ROWS, WIDTH, CROPS)
    weight = total(head.parameters())
    assert said.weight == weight
    assert said.gradient == (0 if own.lazy else weight)
    # A snapshot has the rows, their moments, and the steps that lazy rows have seen.
    assert said.moments == total(shard.snapshot().values()) - weight


def test_rows_in_play_are_those_drawn_and_two_targets_a_crop() -> None:
    settings = Head(sample_rate=0.1)
    drawn = int((drawn_rows(ROWS, 0, ROWS, rate=0.1, seed=0, step=0) > 0).sum())
    assert rows_in_play(settings, ROWS, CROPS) == drawn + 2 * CROPS
    assert rows_in_play(settings, ROWS, crops=400) == ROWS
    copies = 2 * 4 * (WIDTH + 1) * (drawn + 2 * CROPS)  # float32, and their gradients
    assert shard_bytes(settings, ROWS, WIDTH, CROPS).in_play == copies
    assert shard_bytes(Head(), ROWS, WIDTH, CROPS).in_play == 0
