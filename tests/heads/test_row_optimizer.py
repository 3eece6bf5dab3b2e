"""The optimizers of a sharded head's rows, and its rows in checkpoints of any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.heads.reference import Allocations, lean_adamw
from vitds.config.load import load_settings
from vitds.config.tree import Head, Settings
from vitds.engine.head_shard import HeadShard, total_norm
from vitds.engine.update import set_groups
from vitds.errors import RunError, SettingsError
from vitds.heads.kind import head_reason, resolve_head
from vitds.heads.optimizer import LeanAdamW, build_row_optimizer, rounded_by_chance
from vitds.heads.sharded import ShardedHead
from vitds.methods import method_class
from vitds.runs.checkpoint import CheckpointReader, newest_sound, verify_checkpoint, write_checkpoint
from vitds.schedule import LearningRate

ROWS, WIDTH = 50, 8
OPTIONS = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def gradients(steps: int, rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(rows, WIDTH, generator=generator) * torch.logspace(-3, 0, rows)[:, None]
        for _ in range(steps)
    ]


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: list[Tensor]) -> Tensor:
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().clone()


def weight_and(kind: str, rows: int = ROWS) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    module = nn.Linear(WIDTH, rows, bias=False)
    nn.init.constant_(module.weight, 0.5)
    settings = Settings().optimizer.model_copy(
        update=dict(lr_peak=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    )
    return module.weight, build_row_optimizer(module, kind, settings)


def test_lean_steps_equal_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seven rows a tile: they do not divide the 50.
    monkeypatch.setattr("vitds.heads.tiles.CPU_TILE_NUMBERS", {4: 7 * WIDTH})
    weight, optimizer = weight_and("lean")
    expected = lean_adamw(weight.detach(), gradients(6), **OPTIONS)
    torch.testing.assert_close(stepped(optimizer, weight, gradients(6)), expected, rtol=1e-4, atol=1e-4)


def test_adamw_steps_are_torchs() -> None:
    weight, optimizer = weight_and("adamw")
    plain = nn.Parameter(weight.detach().clone())
    expected = stepped(torch.optim.AdamW([plain], **OPTIONS), plain, gradients(6))
    torch.testing.assert_close(stepped(optimizer, weight, gradients(6)), expected)


@pytest.mark.parametrize(("kind", "bytes_a_row"), [("adamw", 8 * WIDTH), ("lean", 2 * WIDTH + 4)])
def test_states_have_the_stated_bytes_and_steps_no_temporaries(
    kind: str, bytes_a_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitds.heads.tiles.CPU_TILE_NUMBERS", {4: 64 * WIDTH})
    weight, optimizer = weight_and(kind, rows=1000)
    state = [tensor for name, tensor in optimizer.state[weight].items() if name != "step"]
    assert sum(tensor.numel() * tensor.element_size() for tensor in state) == 1000 * bytes_a_row
    weight.grad = gradients(1, rows=1000)[0]
    with Allocations() as made:
        optimizer.step()
    assert max(made.numbers, default=0) <= 64 * WIDTH


def bf16_weight(value: float, rows: int = 1000) -> tuple[nn.Parameter, LeanAdamW]:
    weight = nn.Parameter(torch.full((rows, WIDTH), value, dtype=torch.bfloat16))
    holder = nn.Module()
    holder.weight = weight
    settings = Settings().optimizer.model_copy(update=dict(lr_peak=1e-4, weight_decay=0.0))
    return weight, build_row_optimizer(holder, "lean", settings)


def test_bfloat16_rows_have_six_bytes_a_number_and_four_a_row() -> None:
    weight, optimizer = bf16_weight(1.0)
    weight.grad = torch.ones_like(weight)
    held = [
        weight,
        weight.grad,
        *(tensor for name, tensor in optimizer.state[weight].items() if name != "step"),
    ]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 1000 * (6 * WIDTH + 4)


def test_updates_below_bfloat16s_rounding_are_kept_on_average() -> None:
    """Forty steps of 1e-4 from 1.0, whose neighbour is 0.004 below: to the nearest none would move it."""
    weight, optimizer = bf16_weight(1.0)
    moved = stepped(optimizer, weight, [torch.ones(1000, WIDTH, dtype=torch.bfloat16)] * 40).double()
    assert {1.0, 0.99609375} <= set(moved.unique().tolist())
    assert abs(float(moved.mean()) - (1 - 40e-4)) < 5 * float(moved.std()) / moved.numel() ** 0.5


def test_chance_is_a_function_of_its_key() -> None:
    value = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded_by_chance(value, 0, 3, 5), rounded_by_chance(value, 0, 3, 5))
    assert not torch.equal(rounded_by_chance(value, 0, 3, 5), rounded_by_chance(value, 0, 4, 5))
    kept = value.bfloat16()
    assert torch.equal(rounded_by_chance(kept.float(), 0, 1), kept)  # what bfloat16 holds exactly stays
    assert ((rounded_by_chance(value, 0, 1) - value).abs() <= value.abs() / 128).all()


def test_rows_without_a_gradient_stay() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    LeanAdamW([weight], **OPTIONS).step()
    assert torch.equal(weight, torch.ones(3, 2))


def shard(kind: str, rows: int = ROWS) -> HeadShard:
    settings = Settings(head=Head(kind="sharded", optimizer=kind), engine={"precision": "fp32"})
    head = ShardedHead(rows, WIDTH, seed=settings.seed, **settings.head.form)
    return HeadShard(head, settings, torch.device("cpu"), LearningRate(peak=1e-3, warmup=0, total=1))


def save_shard(root: str, kind: str) -> None:
    """One step on every rank, then a checkpoint."""
    head = shard(kind)
    head.head.weight.grad = gradients(1)[0][head.head.first : head.head.last].clone()
    head.head.bias.grad = gradients(1)[0][head.head.first : head.head.last, 0].clone()
    head.update(True, norm=float(head.gradient_norm()), step=0, loss_scale=1.0)
    write_checkpoint(Path(root), 1, {"head": head.snapshot()}, {"head_rows": head.ranges}, keep=1)


def loaded_shard(root: str, kind: str) -> dict[str, Tensor]:
    head = shard(kind)
    head.restore(CheckpointReader(newest_sound(Path(root))[0]), updates=1)
    assert all(int(state["step"]) == 1 for state in head.optimizer.state.values())
    return {name: tensor.detach().float().numpy() for name, tensor in head.snapshot().items()}


@pytest.mark.parametrize("kind", ["adamw", "lean"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_rows_and_states_come_back_on_another_number_of_ranks(
    rank_pool, tmp_path: Path, kind: str, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_pool(before).run(save_shard, str(tmp_path / "ranks"), kind)
    save_shard(str(tmp_path / "alone"), kind)
    expected = loaded_shard(str(tmp_path / "alone"), kind)
    assert expected.keys() == {
        f"{name}{state}" for name in ("weight", "bias") for state in ("", ".exp_avg", ".exp_avg_sq")
    }
    parts = rank_pool(after).run(loaded_shard, str(tmp_path / "ranks"), kind)
    for name, values in expected.items():
        assert abs(values).max() > 0
        together = torch.cat([torch.from_numpy(part[name]) for part in parts])
        assert torch.equal(together, torch.from_numpy(values)), name


def test_rows_are_read_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shard(str(tmp_path), "adamw")
    monkeypatch.setattr("vitds.heads.tiles.CPU_TILE_NUMBERS", {4: 7 * WIDTH})
    asked = []
    read_rows = CheckpointReader.rows

    def rows(reader: CheckpointReader, name: str, first: int, last: int) -> Tensor:
        asked.append(last - first)
        return read_rows(reader, name, first, last)

    monkeypatch.setattr(CheckpointReader, "rows", rows)
    loaded_shard(str(tmp_path), "adamw")
    assert max(asked) == 7 and sum(asked) == 6 * ROWS


def test_a_missing_shard_and_one_of_another_head_are_named(rank_pool, tmp_path: Path) -> None:
    rank_pool(2).run(save_shard, str(tmp_path), "adamw")
    saved = newest_sound(tmp_path)[0]
    with pytest.raises(
        RunError,
        match=r"does not hold rows 0\.\.54 of the instance head; it covers \[\[0, 25\], \[25, 50\]\]",
    ):
        shard("adamw", rows=55).restore(CheckpointReader(saved), updates=1)
    (saved.path / "head-1-of-2.safetensors").unlink()
    with pytest.raises(RunError, match="head-1-of-2.safetensors is missing"):
        verify_checkpoint(saved.path)


def head_with(*assignments: str) -> Head:
    return load_settings(recipe=None, command="pretrain", assignments=assignments, flags={}).head


def test_auto_is_dense_while_small_and_sharded_for_the_lean_optimizer() -> None:
    assert resolve_head(head_with(), 2040, 192) == "dense"
    assert resolve_head(head_with(), 100_000, 192) == "sharded"
    assert resolve_head(head_with("head.optimizer=lean"), 2040, 192) == "sharded"
    assert resolve_head(head_with("head.sample_rate=0.5"), 2040, 192) == "sharded"
    assert resolve_head(head_with("head.kind=sharded"), 2040, 192) == "sharded"
    assert head_reason(head_with(), 100_000, 192) == "76.8 MB of rows; auto is dense up to 67 MB"
    reason = head_reason(head_with("head.optimizer=lean"), 2040, 192)
    assert reason == "sharded for its optimizer or its sample_rate"


@pytest.mark.parametrize("key", ["cosine=true", "optimizer=lean", "init=features", "sample_rate=0.5"])
def test_a_class_head_reads_no_option_of_the_instance_head(key: str) -> None:
    name = key.partition("=")[0]
    with pytest.raises(
        SettingsError, match=f"head.{name}: method supervised does not read it; it is for idmm"
    ):
        load_settings(recipe=None, command="finetune", assignments=[f"head.{key}"], flags={})


def test_a_class_head_is_never_sharded() -> None:
    settings = load_settings(recipe=None, command="finetune", assignments=["head.kind=sharded"], flags={})
    with pytest.raises(SettingsError, match="head.kind sharded is for the instance head of pretraining"):
        method_class(settings.method).resolve(settings, 102, 192)


@pytest.mark.parametrize("words", ["optimizer lean", "sample_rate 0.5"])
def test_what_needs_shards_and_dense_contradict_each_other(words: str) -> None:
    with pytest.raises(
        SettingsError, match=f"{words} is for a sharded head, got kind dense; set kind to sharded or auto"
    ):
        head_with("head.{}={}".format(*words.split()), "head.kind=dense")


def test_the_norm_that_bfloat16_gradients_are_clipped_by_is_summed_in_float32() -> None:
    gradients = [torch.full((4096, 8), 0.01, dtype=torch.bfloat16), torch.full((7,), 0.3)]
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert total_norm(gradients).dtype == torch.float32
    torch.testing.assert_close(total_norm(gradients).double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", ["adamw", "lean"])
@pytest.mark.parametrize(("decay", "left"), [("all", 0.95), ("matrices", 1.0)])
def test_a_bias_decays_as_that_of_a_dense_head(kind: str, decay: str, left: float) -> None:
    module = nn.Linear(WIDTH, ROWS)
    nn.init.ones_(module.weight), nn.init.ones_(module.bias)
    settings = Settings().optimizer.model_copy(update={"decay": decay})
    optimizer = build_row_optimizer(module, kind, settings)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_groups(optimizer, rate=0.1, weight_decay=0.5, epoch=0)
    optimizer.step()
    torch.testing.assert_close(module.weight, torch.full_like(module.weight, 0.95))
    torch.testing.assert_close(module.bias, torch.full_like(module.bias, left))
