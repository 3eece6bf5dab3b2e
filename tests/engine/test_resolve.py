"""What `auto` becomes, and what is refused on a machine that cannot do it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.training import SMALL, small_losses
from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.engine import resolve
from vitds.engine.resolve import (
    padding_note,
    resolve_compile,
    resolve_micro_images,
    resolve_precision,
    resolve_settings,
)
from vitds.errors import ResourceError, SettingsError
from vitds.jobs.train import pretrain
from vitds.models.build import build_backbone

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


def test_a_micro_batch_on_a_cpu_is_the_most_whole_chunks_within_the_pixel_limit() -> None:
    settings = settings_with(views__crop_px="96", batch__chunk_images="2", batch__global_images="96")
    micro = resolve_micro_images(settings, torch.nn.Identity(), CPU, "fp32")
    pixels = settings.views.count * 96**2
    assert micro == 48 and micro * pixels <= resolve.CPU_PIXELS < 96 * pixels


def test_a_given_micro_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SettingsError, match="batch.micro_images 10"):
        resolve_micro_images(settings_with(batch__micro_images="10"), torch.nn.Identity(), CPU, "fp32")


def test_resolved_settings_hold_no_auto() -> None:
    settings = settings_with(engine__precision="auto")
    resolved = resolve_settings(
        settings, backbone_of(settings), ds=load_ds_config("zero2"), device=CPU, rows=896, images=896
    )
    assert "auto" not in (
        resolved.engine.precision,
        resolved.engine.compile,
        resolved.batch.micro_images,
        resolved.head.kind,
    )


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
