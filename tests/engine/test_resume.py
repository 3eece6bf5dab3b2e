"""A run that was killed or stopped goes on: to the same bytes on the same ranks, to rounding on others."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.engine.grid import DIMENSIONS, Case, all_cases, options_of, pairwise_cases
from tests.engine.training import outcome, rewound, small_losses, small_run, small_run_path, stopped_run
from tests.ranks import ForkedProgram
from vitds.errors import DataError, RunError
from vitds.runs import checkpoint
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

# On a CPU for the test's sake; where DeepSpeed's stage 0 would keep masters that we could not save.
FP16 = pairwise_cases()[0] | {
    "precision": "fp16",
    "stage": "0",
    "ranks": 2,
    "step": 4,
}  # the first steps find the loss scale
EPOCHS = 4  # of three steps


def killed_at_third_call(function: Callable) -> Callable:
    calls = []

    def call(*arguments):
        calls.append(1)
        return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 3 else function(*arguments)

    return call


def small_program(run: Path, data: tuple[str, str], options: dict, killed_before: str) -> int:
    if killed_before:
        setattr(checkpoint, killed_before, killed_at_third_call(getattr(checkpoint, killed_before)))
    small_run(str(run), data, **options)
    return 0


def start_process(run: Path, data: tuple[str, str], options: dict, killed_before: str = "") -> ForkedProgram:
    """A run in a process of its own. `killed_before` names a function of a save before which it kills itself,
    at its third call.
    """
    return ForkedProgram(small_program, run, data, options, killed_before, environment={"LOCAL_SIZE": "1"})


def test_the_cases_below_pair_every_two_values() -> None:
    chosen = pairwise_cases()
    for one, other in combinations(DIMENSIONS, 2):
        possible = {(case[one], case[other]) for case in all_cases()}
        assert possible == {(case[one], case[other]) for case in chosen}


@pytest.mark.parametrize(
    "case", [*pairwise_cases(), FP16], ids=lambda case: "-".join(map(str, case.values()))
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    rank_pool, digit_files, tmp_path: Path, case: Case
) -> None:
    pool, whole = rank_pool(case["ranks"]), tmp_path / "whole"
    pool.run(small_run_path, str(whole), digit_files, **options_of(case))
    cut = rewound(whole, tmp_path / "cut", case["step"])
    pool.run(small_run_path, str(cut), digit_files, **options_of(case))
    assert outcome(cut) == outcome(whole)


@pytest.mark.parametrize(
    ("stage", "options", "killed_before"),
    [
        (0, {"head__kind": "dense"}, ""),
        (2, {"head__kind": "sharded", "batch__micro_images": 8}, "write_json"),
        (3, {"head__kind": "dense"}, "_remove_old"),
    ],
    ids=["anywhere", "tensors written, manifest not", "in place, old ones not removed"],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    rank_pool, digit_files, tmp_path: Path, stage: int, options: dict, killed_before: str
) -> None:
    options |= {"stage": stage, "epochs": EPOCHS, "checkpoint__every_steps": 1, "log__tensorboard": "true"}
    rank_pool(1).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    killed = tmp_path / "killed"
    process = start_process(killed, digit_files, options, killed_before)
    if not killed_before:
        while len(read_metrics(killed / "metrics.jsonl")) < random.Random(stage).randint(2, 9):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(random.Random(stage).random() * 0.05)
        process.kill()
    assert process.wait() == -signal.SIGKILL and not Run(killed).is_finished
    rank_pool(1).run(small_run_path, str(killed), digit_files, **options)
    assert outcome(killed) == outcome(tmp_path / "whole")
    assert not list((killed / "checkpoints").glob(".*"))
    board = EventAccumulator(str(killed / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [line["step"] for line in read_metrics(killed / "metrics.jsonl")] == list(range(12))
    assert [event.step for event in board.Scalars("loss")] == list(range(12))


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        ((2, "2"), (1, "3"), {"head__kind": "dense", "batch__micro_images": 4}),
        ((2, "3"), (3, "0"), {"head__kind": "dense"}),
        ((3, "0"), (2, "1"), {"head__kind": "sharded"}),
        ((1, "1"), (3, "3_offload"), {"head__kind": "sharded", "optimizer__average_decay": 0.9}),
        ((3, "3"), (2, "2_offload"), {"head__optimizer": "lean"}),
        ((2, "1"), (3, "3"), {"precision": "bf16_parameters"}),
        ((1, "3_offload"), (2, "2"), {"precision": "bf16_parameters", "head__kind": "sharded"}),
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_ranks_and_stage(
    rank_pool, digit_files, tmp_path: Path, before, after, options: dict
) -> None:
    (ranks, stage), (ranks_after, stage_after) = before, after
    options |= {"checkpoint__every_steps": 2, "checkpoint__keep": 9}
    expected = rank_pool(ranks).run(
        small_losses, str(tmp_path / "whole"), digit_files, stage=stage, **options
    )[0]
    cut = rewound(tmp_path / "whole", tmp_path / "cut", 2)
    del options["checkpoint__every_steps"]
    if "batch__micro_images" in options:
        options["batch__micro_images"] = 12
    losses = rank_pool(ranks_after).run(small_losses, str(cut), digit_files, stage=stage_after, **options)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-3 if "precision" in options else 1e-5)
    ours, theirs = (load_file(run / "backbone.safetensors") for run in (cut, tmp_path / "whole"))
    if (
        "precision" not in options
    ):  # softmax leaves a key's bias no gradient but rounding, which Adam makes as large as any
        assert all(
            torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
            for name in ours
            if not name.endswith("qkv.bias")
        )


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    options = {"epochs": EPOCHS, "checkpoint__every_steps": 2}
    rank_pool(1).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    rank_pool(1).run(stopped_run, str(tmp_path / "run"), digit_files, after_lines=5, **options)
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    file = newest / "model-0-of-1.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    rank_pool(1).run(small_run_path, str(tmp_path / "run"), digit_files, **options)
    said = rank_pool(1).output
    assert "passed over a damaged checkpoint" in said and "does not have the SHA-256 of its manifest" in said
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_without_a_checkpoint_that_can_be_read_nothing_is_trained_and_all_stay(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    """A disk that fails for a minute, or another version's format, must not cost what was trained."""
    run, options = str(tmp_path / "run"), {"epochs": EPOCHS, "checkpoint__every_steps": 2}
    rank_pool(1).run(stopped_run, run, digit_files, after_lines=5, **options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")}
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    for each in checkpoints:
        (each / "manifest.json").rename(each / "away")
    said = rank_pool(1).run(resume_error, run, digit_files, **options)[0]
    assert f"none of the {len(checkpoints)} checkpoints in {run}" in said and "manifest.json" in said
    assert sorted((tmp_path / "run" / "checkpoints").glob("step-*")) == checkpoints
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")}
    for each in checkpoints:
        (each / "away").rename(each / "manifest.json")
    rank_pool(1).run(small_run_path, run, digit_files, **options)
    assert "resumes after step" in rank_pool(1).output


def resume_error(run: str, data: tuple[str, str], **options) -> str:
    with pytest.raises(RunError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


def data_error(run: str, data: tuple[str, str], **options) -> str:
    with pytest.raises(DataError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


def test_other_settings_or_another_file_are_refused_on_resume(rank_pool, digit_files, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    rank_pool(1).run(stopped_run, run, digit_files, after_lines=2, epochs=EPOCHS)
    said = rank_pool(1).run(resume_error, run, digit_files, epochs=EPOCHS + 1, optimizer__weight_decay=0.5)[0]
    assert (
        f"epochs was {EPOCHS}, now {EPOCHS + 1}" in said
        and "optimizer.weight_decay was 0.001, now 0.5" in said
        and "argument init" in said
    )
    moved = Path(digit_files[0])
    moved.rename(moved.with_name("elsewhere"))
    try:
        said = rank_pool(1).run(data_error, run, digit_files, epochs=EPOCHS)[0]
    finally:
        moved.with_name("elsewhere").rename(moved)
    assert f"{moved}: cannot be opened (No such file or directory)" in said
    other = tmp_path / moved.name
    for name, source in (
        (other, digit_files[1]),
        (other.with_name(other.name + ".json"), digit_files[1] + ".json"),
    ):
        name.write_bytes(Path(source).read_bytes())
    kept = [Path(path).read_bytes() for path in (digit_files[0], digit_files[0] + ".json")]
    try:
        moved.write_bytes(other.read_bytes())
        Path(digit_files[0] + ".json").write_bytes(Path(f"{other}.json").read_bytes())
        said = rank_pool(1).run(resume_error, run, digit_files, epochs=EPOCHS)[0]
    finally:
        moved.write_bytes(kept[0])
        Path(digit_files[0] + ".json").write_bytes(kept[1])
    assert "was trained on 52 rows" in said and "has 20 with" in said


def test_a_second_writer_is_refused(rank_pool, digit_files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_process(run, digit_files, {"epochs": 200})
    while len(read_metrics(run / "metrics.jsonl")) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    said = rank_pool(1).run(resume_error, str(run), digit_files, epochs=200)[0]
    process.send_signal(signal.SIGTERM)
    assert f"is in use by process {process.pid}" in said
    assert "stopped by a signal after step" in process.communicate()[1]
