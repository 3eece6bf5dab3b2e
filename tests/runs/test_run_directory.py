"""The run directory: names, lock, metrics, checkpoints; everything that can be wrong with them is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitds.config.tree import Checkpoint, Settings
from vitds.engine.saving import SaveClock
from vitds.errors import ResourceError, RunError, RunLockedError
from vitds.runs import lock as lock_module
from vitds.runs.checkpoint import (
    CheckpointReader,
    list_checkpoints,
    newest_sound,
    verify_checkpoint,
    write_checkpoint,
)
from vitds.runs.directory import Run, disk_note, given_settings, read_json, save_inputs, save_settings
from vitds.runs.lock import STALE_AFTER_S, RunLock, is_running, next_run, own_process
from vitds.runs.metrics import MetricsFile, cut_back, read_metrics, seconds_of

STATE = {"updates": 3, "head_rows": [[0, 4]]}


def write_one(root: Path, step: int = 3, keep: int = 2, keep_every_steps: int = 0) -> Path:
    generator = torch.Generator().manual_seed(step)
    parts = {
        "model": {"a.weight": torch.randn(3, 2, generator=generator)},
        "head": {"weight": torch.arange(8.0).view(4, 2)},
    }
    return write_checkpoint(root, step, parts, STATE, keep=keep, keep_every_steps=keep_every_steps)


def replace_in(file: Path, before: str, after: str) -> None:
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))


def test_runs_are_numbered_by_recipe(tmp_path: Path) -> None:
    assert next_run("idmm_digits", tmp_path).path == tmp_path / "idmm_digits-1" / "lock"
    for name in ("idmm_digits-9", "idmm_digits-old", "other-20"):
        (tmp_path / name).mkdir()
    assert next_run("recipes/idmm_digits.yaml", tmp_path).path.parent == tmp_path / "idmm_digits-10"


def test_starts_at_one_moment_each_get_a_run_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        locks = list(pool.map(lambda _: next_run("digits", tmp_path), range(8)))
    assert sorted(lock.path.parent.name for lock in locks) == [f"digits-{number}" for number in range(1, 9)]


def test_a_refused_start_leaves_nothing_and_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for run in (tmp_path / "new" / "deep" / "run", tmp_path / "kept"):
        lock = RunLock(run)
        (run / "log.txt").touch()
        lock.discard()
        lock.release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "lock", "log.txt"]


def test_a_live_holder_is_named_and_a_dead_one_taken_over(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(RunLockedError, match=f"in use by process {os.getpid()} on .*delete .*lock"):
        RunLock(tmp_path)
    lock.release()
    words = "import pathlib, sys; from vitds.runs.lock import RunLock; RunLock(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", words, str(tmp_path)], check=True, cwd=Path(__file__).parents[2]
    )  # ends without release
    assert RunLock(tmp_path).holder["counter"] == 3


def test_whoever_lost_the_run_finds_out_before_it_writes(tmp_path: Path) -> None:
    ghost = RunLock(tmp_path)
    ghost.check()
    ghost.path.write_text(json.dumps(ghost.holder | {"host": "elsewhere"}))
    os.utime(ghost.path, (0, 0))  # long silent: taken for dead
    assert STALE_AFTER_S < 1e9
    RunLock(tmp_path)
    with pytest.raises(RunLockedError, match="taken over by another process"):
        ghost.check()
    ghost.release()  # harmless: the run is another's
    assert json.loads(ghost.path.read_text())["counter"] == 2


def test_a_silent_but_recent_holder_elsewhere_keeps_the_run(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.path.write_text(json.dumps(lock.holder | {"host": "elsewhere"}))
    with pytest.raises(RunLockedError, match="on elsewhere"):
        RunLock(tmp_path)


def test_a_holder_in_another_process_space_keeps_the_run_until_it_was_silent_for_long(tmp_path: Path) -> None:
    """Two containers of one name: the number of the holder's process means something else here."""
    lock = RunLock(tmp_path)
    for change in (
        {"space": "other boot pid:[1]"},
        {"space": None},
        {"space": "other boot pid:[1]", "pid": 1},
    ):
        lock.path.write_text(json.dumps(lock.holder | {"pid": 2**22 - 1} | change))
        with pytest.raises(
            RunLockedError, match="which cannot be looked at from here and counts as gone 10 minutes"
        ):
            RunLock(tmp_path)
    os.utime(lock.path, (0, 0))
    assert RunLock(tmp_path).holder["counter"] == 2


def test_a_lock_without_a_process_space_is_judged_by_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock_module, "process_space", lambda: None)
    lock = RunLock(tmp_path)
    lock.path.write_text(json.dumps(lock.holder | {"pid": 2**22 - 1}))
    with pytest.raises(RunLockedError):
        RunLock(tmp_path)


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone() -> None:
    with subprocess.Popen(["sleep", "99"]) as process:
        ticks = lock_module._start_ticks(process.pid)
        assert is_running(process.pid, ticks) and not is_running(process.pid, ticks - 1)
        assert is_running(process.pid, None)  # hidden from us: taken for alive
        process.kill()
        while lock_module._start_ticks(process.pid):
            pass
        assert not is_running(process.pid, ticks)  # ended, and waits for its parent
    assert not is_running(process.pid, ticks)


def test_a_holder_shows_itself_as_long_as_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.01)
    lock = RunLock(tmp_path)
    os.utime(lock.path, (0, 0))
    while lock.path.stat().st_mtime == 0:
        time.sleep(0.01)
    lock.release()
    os.utime(lock.path, (0, 0))
    time.sleep(0.05)
    assert lock.path.stat().st_mtime == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_by_the_fenced_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock_module.fcntl, "flock", flock)
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.0)
    lock = RunLock(tmp_path)
    assert not lock.has_flock
    with pytest.raises(RunLockedError, match="in use by process"):
        RunLock(tmp_path)
    lock.check()
    lock.release()
    assert RunLock(tmp_path).holder["counter"] == 2


def test_of_two_that_write_a_lock_file_without_locks_at_one_moment_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def other_writes(_: float) -> None:
        (tmp_path / "lock").write_text(json.dumps(own_process() | {"pid": 7, "counter": 1}))

    monkeypatch.setattr(lock_module.fcntl, "flock", flock)
    monkeypatch.setattr(lock_module.time, "sleep", other_writes)
    with pytest.raises(RunLockedError, match="in use by process 7"):
        RunLock(tmp_path)


def test_a_requeued_job_takes_its_ghosts_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    ghost = RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path)
    with pytest.raises(RunLockedError, match="taken over"):
        ghost.check()
    with pytest.raises(RunLockedError, match="in use"):  # the requeued job itself is no ghost
        RunLock(tmp_path)


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run is not writable: .*Use another --run"):
        RunLock(tmp_path / "file" / "run")


def test_metrics_are_cut_back_to_a_step_and_a_half_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(5):
        file.append({"step": step, "loss": 1.5})
    file.sync()
    file.close()
    with open(path, "a") as torn:
        torn.write('{"step": 5, "lo')
    assert (
        [line["step"] for line in cut_back(path, 3)]
        == [0, 1, 2]
        == [line["step"] for line in read_metrics(path)]
    )
    assert cut_back(tmp_path / "none.jsonl", 3) == []


def test_the_seconds_of_steps_have_those_of_the_starts_that_led_to_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    starts = {0: 4.0, 2: 8.0}
    for step in range(4):
        line = {"step": step, "time/step_s": 0.5} | ({"time/start_s": starts[step]} if step in starts else {})
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert [seconds_of(path, steps) for steps in (0, 2, 4)] == [0, 5, 14]


def test_a_checkpoint_is_read_back_and_the_oldest_is_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_one(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    saved, problems = newest_sound(tmp_path)
    reader = CheckpointReader(saved)
    assert not problems and saved.manifest["updates"] == 3 and reader.names() == ["a.weight"]
    assert torch.equal(reader.get("a.weight"), torch.randn(3, 2, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(reader.rows("weight", 1, 3), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))


def test_the_newest_and_every_so_manieth_checkpoint_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        write_one(tmp_path, step, keep=2, keep_every_steps=3)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "6", "8", "9"]


def test_a_checkpoint_is_due_at_the_steps_whose_checkpoints_stay() -> None:
    clock = SaveClock(Checkpoint(keep_every_steps=500), steps_per_epoch=100)
    assert [step for step in range(1, 1501) if clock.is_due_by_steps(step)] == [500, 1000, 1500]
    clock = SaveClock(Checkpoint(every_steps=400, every_epochs=3, keep_every_steps=500), steps_per_epoch=100)
    assert [step for step in range(1, 1001) if clock.is_due_by_steps(step)] == [
        300,
        400,
        500,
        600,
        800,
        900,
        1000,
    ]
    assert not any(map(SaveClock(Checkpoint(), steps_per_epoch=100).is_due_by_steps, range(1, 1001)))


def test_damaged_checkpoints_push_no_sound_one_out(tmp_path: Path) -> None:
    for step in (1, 3, 4):
        (write_one(tmp_path, step, keep=9) / ("manifest.json" if step > 1 else "none")).unlink(
            missing_ok=True
        )
    assert newest_sound(tmp_path)[0].path.name == "step-00000001"
    write_one(tmp_path, 2, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_what_a_kill_in_a_save_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".writing-00000007").mkdir()
    (tmp_path / ".writing-00000007" / "model-0-of-1.safetensors").write_bytes(bytes(100))
    write_one(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes, its manifest says .*: truncated"),
        (
            lambda file: file.write_bytes(bytes(file.stat().st_size)),
            "does not have the SHA-256 of its manifest: damaged",
        ),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: (file.parent / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda file: (file.parent / "manifest.json").unlink(), "manifest.json does not exist"),
        (
            lambda file: replace_in(file.parent / "manifest.json", '"updates": 3', '"updates": 2'),
            "not have the SHA-256 that it states",
        ),
        (
            lambda file: replace_in(file.parent / "manifest.json", '"files"', '"filez"'),
            "does not have the SHA-256 that it states",
        ),
        (
            lambda file: (file.parent / "manifest.json").write_text('{"format": 9}'),
            "has checkpoint format 9, this version",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, damage, said: str) -> None:
    write_one(tmp_path, 1)
    newest = write_one(tmp_path, 2)
    damage(newest / "model-0-of-1.safetensors")
    with pytest.raises(RunError, match=said):
        verify_checkpoint(newest)
    saved, problems = newest_sound(tmp_path)
    assert saved.path.name == "step-00000001" and len(problems) == 1


def test_names_and_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write_one(tmp_path)
    reader = CheckpointReader(newest_sound(tmp_path)[0])
    with pytest.raises(RunError, match="holds no 'b.weight'; was it written by another backbone"):
        reader.get("b.weight")
    with pytest.raises(RunError, match=r"does not hold rows 2\.\.8 of the instance head"):
        reader.rows("weight", 2, 9)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    small = tmp_path / "disk"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        write_one(small, 1)
        with pytest.raises(
            ResourceError,
            match="checkpoint of step 2 was not saved: no space left .* The ones before are kept",
        ):
            write_checkpoint(small, 2, {"model": {"a": torch.zeros(200_000)}}, STATE, keep=2)
        assert [path.name for path in small.iterdir()] == ["step-00000001"]
        assert newest_sound(small)[0].path.name == "step-00000001"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def begun_run(folder: Path, contents: dict[str, str] | None = None, **settings: Any) -> Run:
    """A run that made a step with these settings."""
    run = Run(folder)
    folder.mkdir(exist_ok=True)
    save_inputs(run, Settings.model_validate(settings), contents or {})
    save_settings(run, Settings.model_validate(settings))
    run.metrics.write_text('{"step": 0}\n')
    return run


def test_settings_that_may_differ_are_taken_anew_on_resume(tmp_path: Path) -> None:
    run = begun_run(tmp_path, engine={"precision": "fp32"}, batch={"micro_images": 64})
    given = Settings.model_validate({"checkpoint": {"keep": 7}, "data": {"workers": 3}})
    resumed = given_settings(run, given, {})
    assert (
        resumed.checkpoint.keep,
        resumed.data.workers,
        resumed.engine.precision,
        resumed.batch.micro_images,
    ) == (7, 3, "fp32", 64)


def test_loader_threads_that_auto_once_became_are_kept_on_resume(tmp_path: Path) -> None:
    run = begun_run(tmp_path, data={"workers": 6})
    assert given_settings(run, Settings(), {}).data.workers == 6


def test_a_start_that_failed_before_its_first_step_may_be_corrected(tmp_path: Path) -> None:
    run = Run(tmp_path)
    save_settings(run, Settings.model_validate({"epochs": 3}))
    assert given_settings(run, Settings.model_validate({"epochs": 5}), {}).epochs == 5


def test_data_under_another_path_are_the_same_if_their_content_is(tmp_path: Path) -> None:
    before = {"data.train": "sha256:aaa", "data.test": "sha256:bbb"}
    run = begun_run(tmp_path, before, data={"train": "a.beton", "test": "b.beton"})
    moved = Settings.model_validate({"data": {"train": "/disk/a.beton", "test": "/disk/b.beton"}})
    resumed = given_settings(run, moved, before)
    assert (resumed.data.train, resumed.data.test) == ("/disk/a.beton", "/disk/b.beton")
    with pytest.raises(RunError) as caught:
        given_settings(run, moved, before | {"data.test": "sha256:ccc"})
    said = str(caught.value)
    assert "data.test was 'b.beton', now '/disk/b.beton' (sha256:ccc in place of sha256:bbb)" in said
    assert "data.train" not in said


def test_weights_under_another_path_are_the_same_if_their_content_is(tmp_path: Path) -> None:
    for name, content in (("first", b"a"), ("moved", b"a"), ("other", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "backbone.safetensors").write_bytes(content)
    run = begun_run(tmp_path / "run", init=str(tmp_path / "first"))
    shutil.rmtree(tmp_path / "first")
    for name in ("moved", "moved/backbone.safetensors"):
        given = Settings.model_validate({"init": str(tmp_path / name)})
        assert given_settings(run, given, {}).init == given.init
    for name in ("other", "absent"):
        with pytest.raises(RunError, match="init was .*/first', now .*/(other|absent)'"):
            given_settings(run, Settings.model_validate({"init": str(tmp_path / name)}), {})


def test_a_disk_too_small_for_the_checkpoints_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=35_000_000))
    assert disk_note(tmp_path, weights=1_000_000, keep=1) is None
    said = disk_note(tmp_path, weights=1_000_000, keep=2)
    assert (
        f"the disk of {tmp_path} has 35 MB free, and 2 checkpoints with one being written take about 36 MB"
        in said
    )


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(RunError, match="list.json does not hold a JSON object"):
        read_json(tmp_path / "list.json")
    with pytest.raises(RunError, match="summary.json does not exist; is .* a finished run"):
        _ = Run(tmp_path).summary
    shutil.rmtree(tmp_path)
