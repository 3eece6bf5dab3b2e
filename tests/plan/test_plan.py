"""`vitds plan`: its numbers by hand where they are simple, its output, wrong input; and out of memory."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.tree import Backbone, Settings
from vitds.engine.memory import explains_out_of_memory, module_sizes
from vitds.engine.update import JointUpdate
from vitds.errors import ResourceError, SettingsError, Stopped
from vitds.jobs.plan import plan
from vitds.models.build import build_backbone
from vitds.plan.case import Case, ModuleSizes, make_case, reduce_bucket
from vitds.plan.memory import MOMENTS, memory_parts, sums
from vitds.plan.totals import plan_memory
from vitds.plan.traffic import step_traffic

ROOT = Path(__file__).parents[2]
STATES = [f"backbone: {part}" for part in ("weights", "fp32 masters", "Adam's moments", "gradients")]
SIZES = ModuleSizes({"backbone": (1_000_000, 1000, 2_000_000)}, 100, None)  # 3,001,000 numbers


def case_of(
    stage: int = 0,
    *,
    ranks: int = 2,
    rows: int = 5000,
    ds: str | None = None,
    on_gpu: bool = True,
    **settings: Any,
) -> Case:
    own = {
        "batch__chunk_images": 8,
        "batch__global_images": 64,
        "batch__micro_images": 16,
        "engine__precision": "fp32",
    }
    own |= {"head__kind": "dense", "head__bias": "false"} | settings
    words = [f"{key.replace('__', '.')}={value}" for key, value in own.items()]
    given = load_settings(recipe="idmm_deit_tiny", command="pretrain", assignments=words, flags={})
    return make_case(
        given, load_ds_config(ds or f"zero{stage}"), SIZES, rows=rows, ranks=ranks, on_gpu=on_gpu
    )


def bytes_of(case: Case, *names: str) -> list[int]:
    found = {part.name: part.bytes for part in memory_parts(case)}
    return [found.get(name, 0) for name in names]


# memory


# Bytes of a number of weights, masters, moments and gradients on two ranks.
@pytest.mark.parametrize(
    ("stage", "numbers"),
    [(0, (4, 0, 8, 4)), (1, (4, 2, 4, 4)), (2, (4, 2, 4, 2)), (3, (2, 2, 4, 2))],
)
def test_states_are_shared_by_stage(stage: int, numbers: tuple[int, ...]) -> None:
    assert bytes_of(case_of(stage), *STATES) == [3_001_000 * number for number in numbers]


def test_fp16_without_zero_is_planned_as_the_stage_1_that_it_trains_in() -> None:
    fp16 = {"engine__precision": "fp16"}
    assert memory_parts(case_of(0, **fp16)) == memory_parts(case_of(1, **fp16))
    assert step_traffic(case_of(0, **fp16)) == step_traffic(case_of(1, **fp16))


@pytest.mark.parametrize("stage", [0, 2])
def test_fused_adamw_of_a_gpu_has_no_temporaries(stage: int) -> None:
    for kind, on_gpu, there in (("adamw", True, False), ("adamw", False, True), ("sgd", True, True)):
        case = case_of(stage, on_gpu=on_gpu, optimizer__kind=kind)
        assert bool(bytes_of(case, "optimizer's temporaries")[0]) == there


def test_probes_hold_a_backbone_of_their_own() -> None:
    assert bytes_of(case_of(), "backbone of the probes") == [0]
    assert bytes_of(case_of(2, eval__every_epochs=10), "backbone of the probes") == [4 * 3_001_000]


@pytest.mark.parametrize("parameters", [(1000, 2_000_000), ()], ids=["in part", "whole"])
def test_frozen_weights_have_neither_states_nor_gradients(parameters: tuple[int, ...]) -> None:
    trained = sum(parameters)
    frozen = 3_001_000 - trained
    sizes = dataclasses.replace(SIZES, trained={"backbone": parameters}, frozen={"backbone": frozen})
    case = dataclasses.replace(case_of(3), sizes=sizes)
    assert bytes_of(case, *STATES) == [trained * number for number in (2, 2, 4, 2)]
    assert bytes_of(case, "backbone: frozen weights") == [2 * frozen]
    assert case.weights == 3_501_000 and plan_memory(case).peak < plan_memory(case_of(3)).peak
    assert step_traffic(case)["gradients reduced"] == (trained + 500_000) * 4 * case.accumulation


def test_sizes_have_trained_and_frozen_numbers() -> None:
    settings = Settings(backbone=Backbone(frozen=("patch_embed",)))
    sizes = module_sizes(build_backbone(settings.backbone, crop_px=112, seed=0), settings)
    assert sizes.frozen == {"backbone": 192 * 3 * 16 * 16 + 192}
    assert sum(sizes.trained["backbone"]) + sizes.frozen["backbone"] == 5_496_192


def test_bf16_weights_have_fp32_masters_and_half_the_gradients(tmp_path: Path) -> None:
    (tmp_path / "bf16.json").write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    case = case_of(ds=str(tmp_path / "bf16.json"), engine__precision="bf16")
    assert bytes_of(case, *STATES) == [3_001_000 * number for number in (2, 2, 4, 1)]
    assert bytes_of(case, "bf16 copies of weights") == [0]


def test_autocast_keeps_bf16_copies_of_fp32_weights() -> None:
    found = bytes_of(case_of(0, engine__precision="bf16"), "backbone: weights", "bf16 copies of weights")
    assert found == [4 * 3_001_000, 2 * 3_501_000]


@pytest.mark.parametrize("optimizer, state", [("adamw", 8 * 100), ("lean", 2 * 100 + 4)])
def test_sharded_head_has_a_share_of_rows_and_their_states(optimizer: str, state: int) -> None:
    sharded = case_of(2, rows=5001, head__kind="sharded", head__optimizer=optimizer)
    moments = "sharded head: moments" + ", lean" * (optimizer == "lean")
    found = bytes_of(sharded, "sharded head: weight", "sharded head: gradient", moments)
    assert found == [2501 * 400, 2501 * 400, 2501 * state]
    assert bytes_of(sharded, "dense head: weights") == [0]


def with_bucket(case: Case, numbers: int) -> Case:
    """As a JSON with this `reduce_bucket_size` makes it."""
    return dataclasses.replace(case, buckets=case.buckets | {"reduce_bucket_size": numbers})


def test_gpu_holds_whole_buckets_and_a_cpu_what_is_put_into_them() -> None:
    name = "reduce_bucket_size buffers"
    assert bytes_of(with_bucket(case_of(2), 500_000_000), name) == [2_000_000_000]
    autocast = with_bucket(case_of(2, engine__precision="bf16"), 500_000_000)
    assert bytes_of(autocast, name) == [4_000_000_000]  # gradients that travel in bf16, and others
    assert bytes_of(with_bucket(case_of(2, on_gpu=False), 500_000_000), name) == [4 * 3_501_000]


def test_a_card_holds_two_copies_of_a_micro_batchs_crops() -> None:
    copies = 2 * 3 * 112**2 * 16 * 6
    assert bytes_of(case_of(), "crops copied, uint8") == [copies]
    assert bytes_of(case_of(on_gpu=False), "crops copied, uint8") == [0]


def test_buckets_hold_what_is_trained_where_the_json_does_not_say() -> None:
    assert bytes_of(case_of(2), "reduce_bucket_size buffers") == [4 * 3_501_000]
    assert reduce_bucket(10**9) == 500_000_000  # DeepSpeed's own value


def test_offloaded_states_lie_in_the_hosts_memory_of_a_gpu() -> None:
    gpu, cpu = (plan_memory(case_of(ds="zero2_offload", on_gpu=on_gpu)) for on_gpu in (True, False))
    assert (
        "backbone: Adam's moments" in {part.name for part in gpu.host_parts} and gpu.host > 12 * 3_501_000 / 2
    )
    assert "backbone: Adam's moments" in {part.name for part in cpu.parts} and cpu.host == 0


def test_stage_3_accumulates_gradients_where_the_optimizer_is() -> None:
    parts = {part.name: part for part in memory_parts(case_of(ds="zero3_offload"))}
    assert parts["backbone: gradients"].on_host and "backward" in parts["gradients in fp32, host"].moments
    assert not {part.name: part for part in memory_parts(case_of(3))}["backbone: gradients"].on_host


@pytest.mark.parametrize(
    "ds, ranks, number",
    [("zero3", 1, 0), ("zero3_offload", 1, 4), ("zero3_offload", 2, 2)],
    ids=["at home", "copied", "gathered in bf16"],
)
def test_weights_that_are_not_on_the_gpu_come_there_for_a_forward_pass(
    ds: str, ranks: int, number: int
) -> None:
    case = case_of(ds=ds, ranks=ranks, engine__precision="bf16")
    # All of them, and as many fetched ahead.
    assert bytes_of(case, "gathered weights") == [2 * 3_501_000 * number]


def test_peak_is_the_highest_sum_of_what_is_there_at_once() -> None:
    memory = plan_memory(case_of(1))
    assert memory.moments == sums(memory.parts) and set(memory.moments) == set(MOMENTS)
    assert memory.peak == max(memory.moments.values()) == memory.moments[memory.worst]


# the command


def test_plan_prints_one_json_object_with_real_parameter_counts(capsys: pytest.CaptureFixture) -> None:
    words = dict(model="deit_tiny_patch16_224", rows=1_281_167, batch=4096, gpus=8, ds_config="zero2")
    found = plan(**words, images_per_s=10_000.0, as_json=True)
    assert json.loads(capsys.readouterr().out) == found
    assert found["parameters"] == 5_496_192  # DeiT-Tiny at 112 px, without classifier
    assert found["peak_bytes"] == max(found["moments"].values())
    assert list(found["micro_batches"]) == ["64", "128", "256", "512"]
    assert found["steps"] == 800 * 313  # 1,281,167 / 4,096 is 312.8
    assert found["hours"] == pytest.approx(800 * 313 * 4096 / 10_000 / 3600)


def test_table_names_every_part_and_says_what_is_not_counted(capsys: pytest.CaptureFixture) -> None:
    found = plan(model="resnet18", rows=1000)
    text = " ".join(capsys.readouterr().out.split())  # lines are broken where the terminal ends
    assert "activations are not counted: resnet18 is no plain Vision Transformer, T2T-ViT or PVT v2" in text
    assert all(part["name"].split()[0] in text for part in found["parts"] if not part["on_host"])
    assert "--images_per_s or --hours gives hours" in text


def test_another_model_leaves_the_recipes_options_which_a_setting_may_give() -> None:
    own = plan(recipe="idmm_digits", rows=1000, as_json=True)
    other = plan(
        recipe="idmm_digits", model="vit_small_patch16_224", rows=1000, set=["views.crop_px=32"], as_json=True
    )
    given = plan(
        recipe="idmm_digits",
        model="vit_small_patch16_224",
        rows=1000,
        set=["backbone.options={depth: 2}", "views.crop_px=32"],
    )
    assert own["parameters"] < 1e6 < given["parameters"] < other["parameters"]


def test_hours_are_measured_by_a_few_real_steps_that_write_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = []
    monkeypatch.setattr("vitds.engine.loop.write_checkpoint", lambda *words, **more: saved.append(words))
    words = ["epochs=10", "batch.global_images=8", "engine.compile=off"]
    found = plan(recipe="idmm_digits", rows=1000, hours=True, set=words, as_json=True)
    assert found["is_measured"] and found["images_per_s"] > 0
    assert found["hours"] == pytest.approx(10 * 125 * 8 / found["images_per_s"] / 3600) and not saved


def test_a_signal_while_steps_are_timed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backward = JointUpdate.backward

    def signalled(update: JointUpdate, terms_T: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        backward(update, terms_T)

    monkeypatch.setattr(JointUpdate, "backward", signalled)
    words = ["epochs=10", "batch.global_images=8", "engine.compile=off"]
    with pytest.raises(Stopped, match="while a few steps were timed; the same command times them again"):
        plan(recipe="idmm_digits", rows=1000, hours=True, set=words, as_json=True)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            dict(model="vit_larg_patch16_224"),
            "backbone.name 'vit_larg_patch16_224' is no timm model; near names: vit_large_patch16_224",
        ),
        (dict(gpus=8), "8 ranks cannot share the 4 chunks of a step"),
        (dict(set=["batch.micro_images=192"]), "batch.micro_images 192 must be whole chunks"),
        (
            dict(rows=3, gpus=4, set=["head.kind=sharded"]),
            "3 instances cannot be spread over 4 ranks; use dense",
        ),
        (dict(ds_config="zero9"), "ds_config zero9 is unknown"),
        (
            dict(ds_config="zero2", set=["optimizer.kind=muon"]),
            "optimizer.kind muon turns whole matrices, of which DeepSpeed makes flat pieces at ZeRO stage 2",
        ),
        (
            dict(rows=0),
            "--rows 0 --gpus 1 --images_per_s None: rows and gpus from 1 on, images_per_s above 0",
        ),
        (dict(images_per_s=0.0), "--images_per_s 0.0: rows and gpus from 1 on"),
        (dict(images_per_s=5.0, hours=True), "--hours measures what --images_per_s states; leave one out"),
    ],
    ids=str,
)
def test_wrong_input_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan(**{"rows": 1000} | words)
    assert message in str(caught.value)


# out of memory


def test_an_allocation_that_fails_ends_with_the_plan() -> None:
    case = case_of(0, ranks=1, on_gpu=False)
    with (
        pytest.raises(ResourceError) as caught,
        explains_out_of_memory(SIZES, case.settings, load_ds_config(None), 5000, torch.device("cpu")),
    ):
        torch.empty(1 << 50)
    expected = f"By the plan this run takes {plan_memory(case).line()}, beside the libraries; "
    assert str(caught.value).startswith(f"out of memory on cpu. {expected}")


@pytest.mark.parametrize(
    "case, remedy",
    [
        (
            case_of(0, views__crop_px=1120, on_gpu=False),
            "lower batch.micro_images (batch.chunk_images is the least)",
        ),
        (case_of(0, rows=10**7, head__kind="sharded"), "start more ranks, or set head.optimizer=lean"),
        (
            with_bucket(case_of(2), 500_000_000),
            "lower zero_optimization.reduce_bucket_size in the DeepSpeed JSON",
        ),
        (case_of(0, rows=10**6), "start more ranks with a higher ZeRO stage, as --ds_config zero3"),
    ],
    ids=["crops", "sharded head", "buckets", "states"],
)
def test_remedy_is_for_the_largest_part(case: Case, remedy: str) -> None:
    assert plan_memory(case).remedy().startswith(remedy)


def test_an_error_that_came_from_a_failed_allocation_ends_so_too() -> None:
    explained = explains_out_of_memory(
        SIZES, case_of(0, ranks=1).settings, load_ds_config(None), 5000, torch.device("cpu")
    )
    with pytest.raises(ResourceError, match="out of memory on cpu"), explained:
        raise RuntimeError("compiler") from MemoryError()


def test_other_errors_pass() -> None:
    explained = explains_out_of_memory(
        SIZES, case_of(0, ranks=1).settings, load_ds_config(None), 5000, torch.device("cpu")
    )
    with pytest.raises(RuntimeError, match="shape"), explained:
        raise RuntimeError("shape")


LIMITED = """
import resource, sys
import vitds.jobs.train
from vitds.cli import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))
sys.exit(main(sys.argv[1:]))
"""


def test_training_that_runs_out_of_memory_ends_with_one_line(
    digit_files: tuple[str, str], tmp_path: Path
) -> None:
    settings = [
        "head.kind=sharded",
        "backbone.options={patch_size: 4, embed_dim: 96, depth: 4, num_heads: 3}",
        "views.crop_px=96",
        "batch.global_images=48",
        "batch.micro_images=48",
        "engine.compile=off",
    ]
    words = ["pretrain", "--recipe", "idmm_digits", "--data", digit_files[0], "--run", str(tmp_path / "run")]
    words += [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-c", LIMITED, *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 6, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vitds pretrain: out of memory on cpu. By the plan this run takes ")
    assert "GB a rank, highest at the backward (activations " in last and "lower batch.micro_images" in last
