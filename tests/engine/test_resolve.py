"""What `auto` becomes, and what is refused on a machine that cannot do it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.training import SMALL, small_losses
from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.engine import attention, memory, resolve
from vitds.engine.attention import resolve_attention
from vitds.engine.process import own_cores
from vitds.engine.resolve import (
    padding_note,
    resolve_compile,
    resolve_micro_images,
    resolve_precision,
    resolve_settings,
    resolve_workers,
    training_seconds,
)
from vitds.errors import ResourceError, SettingsError
from vitds.jobs.train import pretrain
from vitds.launcher import Place
from vitds.models.build import build_backbone
from vitds.plan.case import make_case
from vitds.plan.totals import plan_memory

CPU = torch.device("cpu")


def settings_with(**changes: str) -> Settings:
    words = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return load_settings(recipe="idmm_digits", command="pretrain", assignments=words, flags={})


def backbone_of(settings: Settings) -> torch.nn.Module:
    return build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)


@pytest.mark.parametrize(("is_fast", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_takes_bf16_only_where_a_timed_product_is_fast(
    monkeypatch, is_fast: bool, precision: str
) -> None:
    monkeypatch.setattr(resolve, "_cpu_bf16_is_fast", lambda: is_fast)
    assert resolve_precision("auto", CPU) == precision


@pytest.mark.parametrize(("has_teacher", "precision"), [(False, "fp16"), (True, "fp32")])
def test_a_card_without_bf16_takes_fp16_but_never_for_a_teacher(
    monkeypatch, has_teacher: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_precision("auto", torch.device("cuda"), has_teacher=has_teacher) == precision


def test_a_run_in_bf16_is_refused_where_bf16_is_emulated(monkeypatch) -> None:
    monkeypatch.setattr(resolve, "_cpu_bf16_is_fast", lambda: False)
    with pytest.raises(
        ResourceError, match="engine.precision is bf16, which this device lacks in hardware; use .* fp32"
    ):
        resolve_precision("bf16", CPU)


def test_half_precision_is_refused_on_a_cpu() -> None:
    with pytest.raises(ResourceError, match="engine.precision is fp16, which is for GPUs"):
        resolve_precision("fp16", CPU)


def test_compile_auto_weighs_the_length_of_the_run() -> None:
    short, long = settings_with(engine__compile="auto"), settings_with(engine__compile="auto", epochs="2000")
    backbone = backbone_of(short)
    assert resolve_compile(short, backbone, CPU, images=896, zero_stage=2) == "off"
    assert resolve_compile(long, backbone, CPU, images=896, zero_stage=2) == "on"
    assert (
        resolve_compile(long, backbone, CPU, images=896, zero_stage=3) == "off"
    )  # its hooks break the graph
    assert (
        resolve_compile(settings_with(engine__compile="on"), backbone, CPU, images=896, zero_stage=2) == "on"
    )


def test_compile_auto_pays_on_a_card_for_the_papers_run_of_2040_flowers() -> None:
    deit_tiny = {"numbers": 5_500_000, "width": 192, "tokens": 49.0}
    flowers = {"crops": 2040.0 * 6 * 800, "on_gpu": True}
    assert 1 < training_seconds(**deit_tiny, **flowers) / resolve.COMPILE_PAYS_S < 10
    # Ten epochs are over before a compilation is.
    assert training_seconds(**deit_tiny, crops=2040.0 * 6 * 10, on_gpu=True) < 60


def test_a_card_is_guessed_to_be_faster_the_wider_the_backbone_and_never_faster_than_full() -> None:
    def speed(width: int, *, on_gpu: bool) -> float:
        return 6e12 / training_seconds(numbers=10**6, width=width, tokens=1.0, crops=1e6, on_gpu=on_gpu)

    assert speed(384, on_gpu=True) == 2 * speed(192, on_gpu=True) > 10 * speed(192, on_gpu=False)
    assert speed(10**5, on_gpu=True) == speed(10**6, on_gpu=True) == resolve.MOST_CARD_FLOPS
    assert speed(192, on_gpu=False) == speed(384, on_gpu=False) == resolve.CPU_FLOPS


def test_a_micro_batch_on_a_cpu_is_the_most_whole_chunks_within_the_pixel_limit() -> None:
    settings = settings_with(views__crop_px="96", batch__chunk_images="2", batch__global_images="96")
    micro = resolve_micro_images(settings, torch.nn.Identity(), load_ds_config(None), CPU, rows=0)
    pixels = settings.views.count * 96**2
    assert micro == 48 and micro * pixels <= resolve.CPU_PIXELS < 96 * pixels


def test_a_given_micro_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SettingsError, match="batch.micro_images 10"):
        resolve_micro_images(
            settings_with(batch__micro_images="10"), torch.nn.Identity(), load_ds_config(None), CPU, rows=0
        )


def test_resolved_settings_hold_no_auto() -> None:
    settings = settings_with(engine__precision="auto")
    resolved = resolve_settings(
        settings, backbone_of(settings), ds=load_ds_config("zero2"), device=CPU, rows=896, images=896
    )
    assert "auto" not in (
        resolved.engine.precision,
        resolved.engine.compile,
        resolved.batch.micro_images,
        resolved.data.workers,
        resolved.engine.attention,
        resolved.head.kind,
    )


@pytest.mark.parametrize(
    ("device", "cores", "workers"),
    [("cpu", 64, 1), ("cuda", 1, 1), ("cuda", 2, 1), ("cuda", 6, 4), ("cuda", 16, 8)],
)
def test_the_loader_gets_the_cores_that_a_rank_on_a_card_leaves(
    device: str, cores: int, workers: int
) -> None:
    assert resolve_workers("auto", torch.device(device), cores) == workers
    assert resolve_workers(3, torch.device(device), cores) == 3


def test_ranks_of_one_machine_share_its_cores_and_a_task_of_slurm_has_its_own(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert [own_cores(Place(local_ranks=ranks)) for ranks in (1, 4, 32)] == [12, 3, 1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert own_cores(Place(local_ranks=4)) == 5


def test_a_compiled_backbone_gives_the_same_losses(rank_pool, digit_files, tmp_path: Path) -> None:
    shallow = "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}"
    plain, compiled = (
        rank_pool(1).run(
            small_losses,
            str(tmp_path / choice),
            digit_files,
            stage=2,
            epochs=1,
            engine__compile=choice,
            backbone__options=shallow,
        )[0]
        for choice in ("off", "on")
    )
    np.testing.assert_allclose(compiled, plain, rtol=1e-4)


def refused_by_deepspeed(run: str, data: tuple[str, str], ds_config: str) -> str:
    words = [f"{key}={value}" for key, value in SMALL.items()]
    with pytest.raises(SettingsError) as caught:
        pretrain(recipe="idmm_digits", run=run, data=data[0], ds_config=ds_config, set=words)
    return str(caught.value)


def test_a_value_that_deepspeed_refuses_is_named_with_its_file(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    config = tmp_path / "mine.json"
    config.write_text('{"zero_optimization": {"stage": 1, "allgather_bucket_size": "many"}}')
    said = rank_pool(1).run(refused_by_deepspeed, str(tmp_path / "run"), digit_files, str(config))[0]
    assert said.startswith(f"{config}: DeepSpeed refuses it: ") and "allgather_bucket_size" in said


@pytest.mark.parametrize(
    ("images", "step", "chunk", "said"),
    [
        (896, 256, 64, None),  # 12 % of the digits' epochs
        (256, 256, 64, None),
        (30, 256, 64, "88% of each epoch is padding: 30 images in steps of 256. What fits is "
         "--set batch.global_images=30 --set batch.chunk_images=30"),
        (300, 256, 64, "41% .* --set batch.global_images=150 --set batch.chunk_images=75"),
        (10, 24, 4, "58% .* --set batch.global_images=10 --set batch.chunk_images=5"),
    ],
)  # fmt: skip
def test_much_padding_is_said_with_the_batch_that_fits(
    images: int, step: int, chunk: int, said: str | None
) -> None:
    note = padding_note(images, step, chunk)
    assert note is None if said is None else re.search(said, note), note


def test_the_batch_that_fits_has_a_chunk_for_every_rank(rank_pool) -> None:
    for note in rank_pool(2).run(padding_note, 30, 256, 64):
        assert note.endswith("--set batch.global_images=30 --set batch.chunk_images=15")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("zero0", {"head__kind": "dense"}),
        ("zero2", {"head__kind": "sharded"}),
        ("zero1", {"head__kind": "sharded", "engine__activation_checkpointing": "true"}),
    ],
)
def test_a_micro_batch_on_a_card_leaves_room_for_head_optimizer_and_buckets(
    stage: str, words: dict[str, str]
) -> None:
    settings = settings_with(engine__precision="bf16", batch__micro_images="48", **words)
    sizes = memory.module_sizes(backbone_of(settings), settings)
    plan = plan_memory(
        make_case(settings, load_ds_config(stage), sizes, rows=1_281_167, ranks=1, on_gpu=True)
    )
    tried = float(sum(part.bytes for part in plan.parts if part.name in memory.IN_TRIAL))
    assert {"backbone: weights", "bf16 copies of weights"} < {
        part.name for part in plan.parts if part.name in memory.IN_TRIAL
    }
    # As much as the plan where the trial takes what the plan says of it. Before its first backward pass a
    # backbone has no gradients, after it, it has.
    gradients = sum(part.bytes for part in plan.parts if part.name == "backbone: gradients")
    assert plan.peak <= memory.run_bytes(tried, plan) <= plan.peak + gradients
    # A trial that takes more than the plan is believed.
    assert memory.run_bytes(tried + 10**10, plan) >= plan.moments["backward"] + 10**10
    head = sum(part.bytes for part in plan.parts if "head" in part.name and "backward" in part.moments)
    assert memory.run_bytes(0.0, plan) > head > 10**8


def test_attention_is_torchs_own_choice_on_a_cpu_where_a_cards_kernel_is_refused() -> None:
    words = {"crops": 8, "precision": "fp32", "is_deterministic": False, "device": CPU}
    assert resolve_attention("auto", None, **words) == "torch"
    with pytest.raises(ResourceError, match="engine.attention is flash, which is for GPUs"):
        resolve_attention("flash", None, **words)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"torch": 1.0, "flash": 0.9, "cudnn": 0.8}, "cudnn"),
        ({"torch": 1.0, "flash": 0.97, "cudnn": float("inf")}, "torch"),
        ({"torch": 1.0, "flash": 2.0}, "torch"),
    ],
    ids=str,
)
def test_another_kernel_than_torchs_own_choice_has_to_be_worth_it(
    seconds: dict[str, float], chosen: str
) -> None:
    assert attention.fastest(seconds) == chosen


def test_a_kernel_is_chosen_for_as_long_as_a_run_lasts() -> None:
    def switched_on() -> set[str]:
        return {name for name, (is_on, _) in attention.SWITCHES.items() if is_on()}

    before = switched_on()
    with attention.attention_as_before():
        attention.use_attention("torch")
        assert switched_on() == before
        attention.use_attention("cudnn")
        assert switched_on() == {"cudnn", "math"}
    assert switched_on() == before
