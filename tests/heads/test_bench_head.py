"""`vitds bench head` on a small head: its table, its memory figures, what it says of what cannot run."""

from __future__ import annotations

import json

import psutil
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitds.batch import Targets
from vitds.bench import head, head_ways
from vitds.bench.head import bench_head
from vitds.bench.head_ranks import measure_ranks
from vitds.bench.head_ways import Case, contenders, liger_chunk
from vitds.bench.steps import extra_bytes
from vitds.errors import ResourceError, SettingsError
from vitds.heads import DenseHead


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed would be compiled for half a minute here."""
    monkeypatch.setattr(head_ways, "import_module", raise_import_error)


def raise_import_error(name: str) -> None:
    raise ImportError(name)


def test_rows_are_one_json_object(no_compiler: None, capsys: pytest.CaptureFixture) -> None:
    rows = bench_head(rows=3000, dim=16, batch=64, ranks=2, rounds=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rows": rows}
    assert [row["name"] for row in rows] == [
        "four bare products",
        "three bare products",
        "torch's linear and cross_entropy",
        "tiles of 256 rows under checkpoint",
        "Liger: not run, its rule makes chunks of fewer than 16 features of these shapes",
        "Cut Cross-Entropy's torch_compile: not run, not installed: pip install cut-cross-entropy",
        "ours, dense",
        "ours, sharded",
        "ours, sharded, 2 ranks",
    ]
    for row in rows:
        did_run = "not run" not in row["name"]
        assert all(
            (row[key] is not None) == did_run
            for key in ("ms", "ratio", "to_three", "to_torch", "to_tiles", "sent_mb")
        )
    assert rows[0]["ratio"] == rows[1]["to_three"] == rows[2]["to_torch"] == rows[3]["to_tiles"] == 1.0
    assert [row["sent_mb"] for row in rows[-2:]] == [0.0, 0.0]  # 0.0 MB: 10,624 bytes


def test_gradients_are_compared_with_ours(no_compiler: None) -> None:
    rows = bench_head(rows=300, dim=16, batch=64, rounds=1, as_json=True)
    off = {row["name"]: row["off"] for row in rows if row["ms"] is not None}
    assert off.pop("four bare products") is off.pop("three bare products") is None
    assert len(off) == 4 and all(distance < 1e-4 for distance in off.values())


def test_what_computes_other_gradients_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def peer(features: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **_: object) -> torch.Tensor:
        # As with a filter: the rows that are not an image's own get no gradient.
        own = nn.functional.embedding(target, weight)
        rest = (features @ weight.detach().T).logsumexp(1)
        return (rest - (features * own).sum(1)).mean()

    monkeypatch.setattr(head_ways, "_peer", lambda *_: peer)
    rows = bench_head(rows=300, dim=16, batch=64, rounds=1, as_json=True)
    (other,) = (row for row in rows if row["name"].startswith("Cut Cross-Entropy"))
    assert "not counted, its gradients are off by" in other["name"] and other["ms"] is other["off"] is None


def test_extra_memory_is_that_of_a_step() -> None:
    held: list[torch.Tensor] = []

    def step() -> None:
        held.append(torch.ones(1 << 23))  # 32 MB, and as much again for a moment
        held[-1] + 1

    step()  # the first touches code and buffers
    assert 60e6 < extra_bytes(step, [], torch.device("cpu")) < 75e6


def test_what_does_not_fit_into_memory_is_left_out(
    no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = psutil.virtual_memory()._replace(available=2_000_000)
    monkeypatch.setattr(head.psutil, "virtual_memory", lambda: free)
    rows = bench_head(rows=3000, dim=16, batch=64, rounds=1, as_json=True)
    assert rows[2] == {
        "name": "torch's linear and cross_entropy: not run, its logits take 0.0 GB"
    } | dict.fromkeys(list(rows[2])[1:])
    assert rows[-1]["ms"] > 0 and rows[-1]["to_torch"] is None


def test_rows_in_bfloat16_are_measured_too(no_compiler: None) -> None:
    rows = bench_head(
        rows=3000, dim=16, batch=64, ranks=2, rounds=1, precision="bf16", bf16_rows=True, as_json=True
    )
    assert all(row["ms"] > 0 for row in rows if "not run" not in row["name"])
    assert sum(row["ms"] is not None for row in rows) >= 6


def test_rows_in_bfloat16_are_refused_with_float32_products() -> None:
    with pytest.raises(SettingsError, match="--bf16_rows goes with --precision bf16, not fp32"):
        bench_head(rows=100, dim=8, batch=64, bf16_rows=True)


WRONG = [{"rows": 0}, {"ranks": 0}, {"ranks": 3}, {"rows": 1, "ranks": 2}, {"rounds": 0}, {"keep_mb": -1}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_impossible_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(
        SettingsError,
        match=r"each from 1 on \(keep_mb from 0\), a row a rank at least, and ranks that divide the batch",
    ):
        bench_head(**({"rows": 100, "dim": 8, "batch": 64} | wrong))


def test_ranks_that_end_without_an_answer_are_said() -> None:
    with pytest.raises(
        ResourceError,
        match="one of 2 ranks ended without an answer: not enough memory for 1,000,000,000,000 rows",
    ):
        measure_ranks(2, Case(10**12, 10**6, 2, "fp32", False, 1, 0))


@pytest.mark.parametrize(
    ("features", "rows", "width", "chunk"),
    [(1536, 1_281_167, 192, 1), (4096, 32_000, 4096, 512), (4096, 128_256, 4096, 128)],
)
def test_ligers_rule_gives_an_instance_head_one_feature_at_a_time(
    features: int, rows: int, width: int, chunk: int
) -> None:
    assert liger_chunk(features, rows, width) == chunk


def test_on_a_card_cut_cross_entropy_is_asked_for_its_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def peer(*_: object, **words: object) -> None:
        asked.append(words)
        raise NotImplementedError

    monkeypatch.setattr(head_ways, "_peer", lambda *_: peer)
    dense = DenseHead(40, 8, bias=False, label_smoothing=0.0, seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        dense.weight = nn.Parameter(torch.empty(40, 8, device="cuda"))
        features, target = torch.empty(6, 8, device="cuda"), torch.empty(6, device="cuda", dtype=torch.int64)
        one = torch.empty(6, device="cuda")
        others = contenders(dense, features, Targets(target, target, one, one, target), "fp32")
        with pytest.raises(NotImplementedError):
            next(each.step for each in others if each.name == "Cut Cross-Entropy")()
    assert asked == [{"filter_eps": None}]
