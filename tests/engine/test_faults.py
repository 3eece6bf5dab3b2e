"""What goes wrong while a run trains, on real ranks: a status, one clear line, no process left, and the run
goes on to the same end.

A killed process, a full disk, damaged checkpoints and a second writer are in test_resume.py and
tests/runs/test_run_directory.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.data.small_files import write_file
from tests.engine.training import (
    ROOT,
    free_port,
    outcome,
    small_run,
    small_run_path,
    start_rank_process,
    stopped_run,
    words_of,
)
from tests.ranks import ForkedProgram
from vitds.config.tree import Settings
from vitds.data.order import epoch_order
from vitds.engine.live import Live
from vitds.engine.signals import StopSignals
from vitds.errors import NumericsError, ResourceError, SettingsError
from vitds.runs.checkpoint import list_checkpoints
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

LONG = {"epochs": 4000}
# A step takes long enough to be met by two signals, and its activations are too large for memory that was
# given back before.
HEAVY = LONG | {
    "views__crop_px": 112,
    "backbone__options": "{patch_size: 8, embed_dim: 192, depth: 2, num_heads: 3}",
}


@pytest.fixture
def start_rank() -> Iterator[Callable[..., ForkedProgram]]:
    """start_rank(rank, port, words) is one of two ranks of `vitds pretrain`; none outlives the test."""
    started: list[ForkedProgram] = []

    def start(rank: int, port: int, words: list[str], **options: Any) -> ForkedProgram:
        started.append(start_rank_process(rank, port, words, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 KiB, which takes two checkpoints of a small run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]).returncode
    ):
        pytest.skip("no small disk can be mounted here; it needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def wait_for_lines(run: Path, lines: int, *processes: ForkedProgram | subprocess.Popen) -> None:
    while len(read_metrics(run / "metrics.jsonl")) < lines:
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_to_the_same_bytes(
    rank_pool, digit_files, start_rank, tmp_path: Path
) -> None:
    options = {"epochs": 4, "checkpoint__every_steps": 1, "head__kind": "sharded"}
    rank_pool(2).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    run, port = tmp_path / "run", free_port()
    ranks = [start_rank(rank, port, words_of(run, digit_files, **options)) for rank in range(2)]
    wait_for_lines(run, 3, *ranks)
    ranks[1].kill()
    pids = [str(rank.pid) for rank in ranks]
    _, said = ranks[0].communicate(timeout=60)
    last = said.splitlines()[-1]
    assert (
        ranks[0].returncode == 6
        and f" steps rank 1 (process {pids[1]} on {socket.gethostname()}) is gone without a message" in last
    ), said
    assert (
        last.startswith("vitds pretrain (rank 0): after ")
        and "Traceback" not in said
        and "fault of vitds" not in said
    )
    rank_pool(2).run(small_run_path, str(run), digit_files, **options)
    assert outcome(run) == outcome(tmp_path / "whole")
    assert not [name for name in os.listdir("/dev/shm") if set(name.split("_")) & set(pids)]


def test_a_rank_that_cannot_read_its_data_says_so_and_ends_the_others(start_rank, tmp_path: Path) -> None:
    file = write_file(tmp_path / "train.beton", images=52)
    image = int(epoch_order(52, seed=0, epoch=0)[12])  # the first that rank 1 reads
    with open(file.path, "r+b") as beton:
        beton.seek(int(file.offsets[image]))
        beton.write(bytes(int(file.sizes[image])))
    run, port = tmp_path / "run", free_port()
    words = words_of(run, (str(file.path), str(file.path)), epochs=1)
    ranks = [start_rank(rank, port, words, ranks=3) for rank in range(3)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [6, 3, 6], said
    cause = said[1].splitlines()[-1].removeprefix("vitds pretrain (rank 1): ")
    assert f"image {image}" in cause
    for other in (said[0], said[2]):
        assert (
            f" rank 1 (process {ranks[1].pid} on {socket.gethostname()}) ended: {cause.rstrip('.')}. This "
            "rank ends with it" in other
        )
        assert "rank 0 (process" not in other and "rank 2 (process" not in other
    assert not any("Traceback" in text for text in said)


def test_a_rank_that_hangs_says_where_and_ends_the_others(digit_files, start_rank, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    ranks = [start_rank(rank, port, words_of(run, digit_files, **LONG)) for rank in range(2)]
    wait_for_lines(run, 2, *ranks)
    ranks[1].send_signal(signal.SIGUSR2)
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [6, 6], said
    step = int(said[1].partition("rank 1 hangs: step ")[2].split()[0])
    assert (
        f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) ended: rank 1 hangs: step {step} has "
        "taken" in said[0]
    )
    assert (
        step in (len(read_metrics(run / "metrics.jsonl")) + ahead for ahead in (-1, 0))
        and " in hang\n" in said[1]
    )


def test_time_in_which_a_run_was_stopped_is_no_hang(digit_files, start_rank, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_rank(0, free_port(), words_of(run, digit_files, **HEAVY), ranks=1, hung_after_s=10.0)
    wait_for_lines(run, 1, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(12)
    lines = len(read_metrics(run / "metrics.jsonl"))
    process.send_signal(signal.SIGCONT)
    wait_for_lines(run, lines + 3, process)
    assert process.poll() is None and len(read_metrics(run / "metrics.jsonl")) >= lines + 3


def test_a_second_run_on_the_same_port_is_refused_and_the_first_goes_on(
    digit_files, start_rank, tmp_path: Path
) -> None:
    first, port = tmp_path / "first", free_port()
    ranks = [start_rank(rank, port, words_of(first, digit_files, **LONG)) for rank in range(2)]
    wait_for_lines(first, 1, *ranks)
    late, early = (
        start_rank(rank, port, words_of(tmp_path / "second", digit_files, **LONG)) for rank in (1, 0)
    )
    _, said = early.communicate(timeout=120)
    assert (
        early.returncode == 6
        and f"could not meet on 127.0.0.1 port {port}" in said
        and f"--master_port {port + 1}" in said
    )
    late.kill()  # as its launcher does
    wait_for_lines(first, len(read_metrics(first / "metrics.jsonl")) + 5, *ranks)
    ranks[0].send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [75, 75], said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peer_was_killed_before_they_met_does_not_wait_for_it_for_long(
    digit_files, start_rank, tmp_path: Path, rank: int
) -> None:
    port = free_port()
    alone = start_rank(rank, port, words_of(tmp_path / "run", digit_files, **LONG), meeting_s=3.0)
    _, said = alone.communicate(timeout=120)
    assert (
        alone.returncode == 6
        and f"the ranks could not meet on 127.0.0.1 port {port}" in said
        and "Either one ended before" in said
    )


def numerics_error(run: str, data: tuple[str, str], **options) -> str:
    with pytest.raises(NumericsError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


def test_a_loss_that_stays_not_finite_ends_the_run_and_spares_the_good_checkpoints(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    options = {"epochs": 100, "optimizer__lr_peak": 1e30, "checkpoint__every_steps": 1, "checkpoint__keep": 2}
    said = rank_pool(2).run(numerics_error, str(tmp_path / "run"), digit_files, **options)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = lines[-1]
    assert f"not finite in 10 steps in a row, the last step {last['step']} at learning rate" in said[0]
    first_images = epoch_order(52, seed=0, epoch=last["step"] // 3)
    assert f"with images [{first_images[last['step'] % 3 * 24]}, " in said[0]
    skips = [line["step"] for line in lines if line["skipped"] > 0]
    saved = [
        json.loads((path / "manifest.json").read_text())
        for path in list_checkpoints(tmp_path / "run" / "checkpoints")
    ]
    assert len(saved) == 2 and all(
        facts["step"] <= skips[0] and facts["skipped_in_a_row"] == 0 for facts in saved
    )
    weights = load_file(list_checkpoints(tmp_path / "run" / "checkpoints")[0] / "model-0-of-2.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize(
    "launcher",
    [("deepspeed", "--num_gpus", "2"), ("torchrun", "--nproc_per_node", "2")],
    ids=lambda words: words[0],
)
def test_a_killed_launcher_leaves_nothing_behind_and_the_run_is_saved(
    digit_files, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    dashes = ["--"] * (launcher[0] == "torchrun")  # else it takes --run for one of its own flags
    command = [
        *launcher,
        "--master_port",
        str(free_port()),
        *dashes,
        str(ROOT / "launch/pretrain.py"),
        *words_of(run, digit_files, **LONG),
    ]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
        )
    try:
        wait_for_lines(run, 2, process)
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        assert len(family) >= 3
    finally:
        process.kill()
        process.wait()
    gone, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=45
    )
    for survivor in alive:
        survivor.kill()
    assert not alive
    assert list_checkpoints(run / "checkpoints"), (tmp_path / "said").read_text()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP],
    ids=lambda number: number.name,
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step_saved(
    rank_pool, digit_files, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    said = rank_pool(2).run(
        stopped_run, str(run), digit_files, after_lines=2, number=number, on_rank=1, **LONG
    )
    step = len(read_metrics(run / "metrics.jsonl"))
    assert (
        said
        == [f"stopped by a signal after step {step} of 12000, saved; the same command goes on from there"] * 2
    )
    assert list_checkpoints(run / "checkpoints")[-1].name == f"step-{step:08d}"


def test_under_nohup_a_terminal_may_close() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.noted is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_leaves_ends_no_training(digit_files, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vitds", "pretrain", *words_of(tmp_path / "run", digit_files, epochs=2)]
    read, write = os.pipe()
    process = subprocess.Popen(words, cwd=ROOT, stdout=write, stderr=write)
    os.close(write)
    os.close(read)
    assert process.wait(timeout=120) == 0 and Run(tmp_path / "run").is_finished


def test_a_second_ctrl_c_ends_at_once(digit_files, start_rank, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_rank(0, free_port(), words_of(run, digit_files, **HEAVY), ranks=1)
    wait_for_lines(run, 1, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines()[-1] == "vitds pretrain: interrupted", said
    assert not list_checkpoints(run / "checkpoints")


def test_memory_that_runs_out_is_reported_with_what_to_lower(digit_files, start_rank, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_rank(0, free_port(), words_of(run, digit_files, **HEAVY), ranks=1)
    wait_for_lines(run, 1, process)
    resource.prlimit(
        process.pid, resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY)
    )  # less than it has: it gets no more
    _, said = process.communicate(timeout=60)
    assert process.returncode == 6 and "out of memory on cpu. By the plan this run takes" in said, said
    assert "batch.micro_images (now 24)" in said and "Traceback" not in said


def test_the_bar_begins_at_the_epoch_that_a_run_goes_on_in(tmp_path: Path) -> None:
    for done, epoch in ((0, "1/100"), (3, "2/100"), (300, "100/100")):
        live = Live(Run(tmp_path), Settings(), steps_done=done, total_steps=300, steps_per_epoch=3)
        assert live.progress.tasks[0].fields["epoch"] == epoch
        live.close()


def disk_error(run: str, data: tuple[str, str], **options) -> str:
    with pytest.raises(ResourceError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


def test_a_disk_that_fills_up_in_a_save_ends_all_and_the_run_goes_on(
    rank_pool, digit_files, small_disk: Path, tmp_path: Path
) -> None:
    options = {"epochs": 3, "checkpoint__every_steps": 1, "checkpoint__keep": 9}
    rank_pool(2).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    run = small_disk / "run"
    said = rank_pool(2).run(disk_error, str(run), digit_files, **options)
    assert said[0] == said[1] and "was not saved: no space left on the disk of" in said[0]
    assert list_checkpoints(run / "checkpoints") and not list((run / "checkpoints").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    rank_pool(2).run(small_run_path, str(run), digit_files, **options)
    assert outcome(run) == outcome(tmp_path / "whole")


def test_a_disk_too_full_for_a_line_of_metrics_is_reported(small_disk: Path) -> None:
    live = Live(Run(small_disk), Settings(), steps_done=0, total_steps=9, steps_per_epoch=3)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(
        ResourceError, match="no space left on the disk of .*; free some and start the same command again"
    ):
        for step in range(100):
            live.step({"step": step, "epoch": 0, "loss": 1.0, "time/images_per_s": 1.0, "filled": "x" * 4096})
    live.close()


def settings_error(run: str, data: tuple[str, str], **options) -> str:
    with pytest.raises(SettingsError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


def test_bf16_parameters_are_refused_where_a_batchnorm_is(rank_pool, digit_files, tmp_path: Path) -> None:
    options = {"stage": 1, "precision": "bf16_parameters", "backbone": "resnet"}
    said = rank_pool(1).run(settings_error, str(tmp_path / "run"), digit_files, **options)[0]
    assert (
        "bf16.enabled makes the parameters bf16" in said and "resnet18" in said and "torch_autocast" in said
    )
