"""A step on a card that is not there (fake_card.py): mixed devices are found before a GPU finds them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from tests.methods.fake_card import CARD, Brought, backward, fake_card, move
from vitds.batch import CropBatch
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.data.sheet import HostMemory, from_copy, on_sheet
from vitds.engine.agreement import Agreed, agree
from vitds.engine.draws import drawing_of
from vitds.engine.head_shard import HeadShard
from vitds.engine.late import may_be_late
from vitds.engine.optimizer import build_optimizer
from vitds.engine.update import JointUpdate
from vitds.heads import DenseHead
from vitds.heads.first_rows import set_rows_from_features
from vitds.methods import method_class
from vitds.methods.base import Method
from vitds.models.build import build_backbone, patch_count
from vitds.models.patches import multiply_patches
from vitds.models.stochastic import StochasticDraws
from vitds.runs.checkpoint import CheckpointReader
from vitds.schedule import LearningRate

ROWS = 50
# What comes to the card in a step beside crops and sheet: the classes' weights in a run's first step, and
# directions.
COPIED = {"finetune_digits": ["methods/supervised.py"], "lejepa_digits": ["methods/lejepa.py"]}


def built(recipe: str, words: list[str]) -> tuple[Settings, Method, StochasticDraws]:
    settings = load_settings(recipe=recipe, command=None, assignments=words, flags={})
    backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
    method_type = method_class(settings.method)
    settings = method_type.resolve(settings, ROWS, backbone.facts.width)
    rows_per_chunk = settings.views.count * settings.batch.chunk_images
    draws = StochasticDraws(backbone, seed=0, rows_per_chunk=rows_per_chunk, patches=patch_count(backbone))
    return settings, method_type(settings, backbone, ROWS), draws


def micro_batch(settings: Settings, stochastic: StochasticDraws, **others: Any) -> CropBatch:
    """As the loader gives it, on the host: two chunks, the last image only padding.

    Args:
        others: fields that are to be different.
    """
    images, side = 2 * settings.batch.chunk_images, settings.views.crop_px
    batch = CropBatch(
        crops=torch.zeros(images, settings.views.count, 3, side, side, dtype=torch.uint8),
        index=torch.arange(images) % ROWS,
        label=torch.arange(images) % 10,
        is_real=torch.arange(images) < images - 1,
        epoch=0,
        step=0,
        first_chunk=0,
        real_images=images - 1,
    )
    batch = replace(batch, **others)
    draws = drawing_of(settings, method_class(settings.method), stochastic)(batch)
    packed, sheet = on_sheet(draws, HostMemory(is_pinned=False))
    return replace(batch, draws=packed, sheet=sheet)


def on_card(batch: CropBatch) -> CropBatch:
    """As copied_ahead brings it."""
    return replace(batch, crops=batch.crops.to(CARD), draws=from_copy(batch.draws, batch.sheet.to(CARD)))


class BareEngine(DeepSpeedEngine):
    """What JointUpdate asks of an engine at ZeRO stage 0, around the same optimizer; DeepSpeed's own needs a
    card that is there.
    """

    def __init__(self, module: nn.Module, settings: Settings, lr_scales: dict[str, float]) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.optimizer = build_optimizer(module, settings.optimizer, lr_scales=lr_scales)
        self.skipped_steps = 0
        self.forward = module.forward
        self.backward = backward

    def zero_optimization_stage(self) -> int:
        return 0

    def gradient_accumulation_steps(self) -> int:
        return 1

    def fp16_enabled(self) -> bool:
        return False

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __del__(self) -> None:
        pass  # DeepSpeed's takes apart what its own __init__ made


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("idmm_digits", ["head.kind=dense", "backbone.drop_path=0.1"]),
        ("idmm_digits", ["head.kind=sharded", "optimizer.clip_norm=1.0"]),
        ("idmm_digits", ["head.kind=sharded", "mix.kind=mixup", "optimizer.average_decay=0.9"]),
        ("idmm_digits", ["head.kind=sharded", "head.optimizer=lean", "head.cosine=true", "mix.kind=none"]),
        ("idmm_digits", ["head.kind=sharded", "head.optimizer=lean", "head.row_dtype=bf16"]),
        ("finetune_digits", ["head.class_weight=balanced"]),
        ("simclr_digits", ["backbone.patch_drop=0.5"]),
        ("mocov3_digits", ["backbone.drop_path=0.1"]),
        ("lejepa_digits", []),
        ("supcon_digits", []),
        ("dino_digits", ["backbone.drop_path=0.1"]),
        ("mae_digits", ["backbone.drop_path=0.1"]),
    ],
    ids=str,
)
def test_a_whole_step_stays_on_the_card(recipe: str, words: list[str]) -> None:
    settings, method, draws = built(recipe, words)
    method.learn_labels(np.arange(ROWS) % 10)
    rate = LearningRate.of(settings, 3)
    batch = micro_batch(settings, draws)
    for backbone in method.backbones:
        multiply_patches(backbone)  # as build_engine does for a card
    with fake_card() as card:
        for module in (method.module, *method.outside):
            move(module)
        engine = BareEngine(method.module.train(), settings, method.lr_scales)
        heads = [HeadShard(head, settings, CARD, rate) for head in method.outside]
        is_late = may_be_late(settings, method, zero_stage=0, device=CARD)
        update = JointUpdate(engine, heads, settings.optimizer, is_late=is_late)
        update.set_schedule(1e-3, 0.05, 0)
        there = on_card(batch)
        with Brought() as copies:
            prepared = method.prepare(there, settings, CARD)
            draws.write(there.draws.masks)
            terms = method.losses(engine, prepared, 0)
            assert (terms.device, terms.dtype) == (CARD, torch.float64) and terms.shape == (
                len(method.terms),
            )
            update.backward(terms)
            norms = update.gradient_norms()
            numbers = agree(torch.zeros_like(terms), norms, is_due=False, wants_stop=False)
            # So far the host has only given work.
            assert card.asked == []
            if is_late:
                update.apply_late(numbers[0], norms)
            else:
                agreed = Agreed.of(numbers.tolist(), len(method.terms))
                update.apply(True, agreed.norms, step=0, updates=0)
            method.after_update(1, 10)
    states = [update.state.inner.state, *(head.optimizer.state for head in heads)]
    for parameter, state in ((key, value) for each in states for key, value in each.items()):
        assert (
            {value.device for name, value in state.items() if name != "step"} == {parameter.device} == {CARD}
        )
    # The one question of a step, losses, flags and norms at once; a late step asks none before its update.
    assert card.asked == ([] if is_late else ["tolist"])
    # A teacher, an average and the lean optimizer need an answer.
    needs_answer = (
        recipe in ("mocov3_digits", "dino_digits") or "average" in str(words) or "lean" in str(words)
    )
    assert is_late is not needs_answer
    assert [line.partition(":")[0] for line in copies.brought] == COPIED.get(recipe, [])


class Kept(CheckpointReader):
    """A checkpoint in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.get = tensors.__getitem__


def test_adams_counter_stays_on_the_card_through_save_and_restore() -> None:
    settings, method, _ = built("idmm_digits", ["head.kind=dense"])
    with fake_card():
        move(method.module)
        update = JointUpdate(BareEngine(method.module, settings, {}), (), settings.optimizer)
        for parameter in method.module.parameters():
            parameter.grad = torch.empty_like(parameter)
        saved = {name: torch.empty_like(value) for name, value in update.snapshot()[0]["model"].items()}
        assert {value.device.type for value in saved.values()} == {"cpu"}
        update.state.restore(Kept(saved), updates=3)
        update.engine.step()
        state = update.state.inner.state.values()
    # A fused step reads the counter in its kernel.
    assert update.engine.optimizer.defaults["fused"] is True
    assert {each["step"].device for each in state} == {CARD}


def test_first_rows_from_features_meet_a_head_on_the_host_and_numbers_on_the_card() -> None:
    head = DenseHead(ROWS, 8, bias=True, label_smoothing=0.1, seed=0)
    with fake_card():
        head.weight = nn.Parameter(torch.empty(ROWS, 8))
        set_rows_from_features(
            head, torch.empty(40, 8), torch.empty(40, dtype=torch.int64, device=CARD), CARD
        )
    assert head.weight.device.type == "cpu"
