"""What goes wrong while a run trains, on real ranks: a status, one clear line, no process left, and the run goes on to the same end.

A killed process, a full disk, damaged checkpoints and a second writer are in test_resume.py and tests/runs/test_run_directory.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.data.small_files import write_file
from tests.engine.training import SMALL, small_run, untimed
from vitds.data.order import epoch_order
from vitds.errors import NumericsError
from vitds.runs.checkpoint import list_checkpoints
from vitds.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
LONG = {"epochs": 4000}
# A run as a person starts it; SIGUSR2 makes its main thread hang, with a watchdog that soon loses patience.
RANK = """
import signal, sys, time
from vitds.cli import main
from vitds.engine import watchdog

def hang(*_):
    watchdog.HUNG_AFTER_S = 1.0
    time.sleep(600)

signal.signal(signal.SIGUSR2, hang)
sys.exit(main(sys.argv[1:]))
"""


def words_of(run: Path, data: tuple[str, str], *, epochs: int, **changes: object) -> list[str]:
    """The words of a small pretraining, as small_run gives it settings."""
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    words = ["--run", str(run), "--data", data[0], "--test", data[1], "--epochs", str(epochs), "--ds_config", "zero0"]
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def start_rank() -> Iterator[Callable[..., subprocess.Popen]]:
    """start_rank(rank, port, words) is one of two ranks of `vitds pretrain`; none outlives the test."""
    started: list[subprocess.Popen] = []

    def start(rank: int, port: int, words: list[str]) -> subprocess.Popen:
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
        environment = os.environ | group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", RANK, "pretrain", *words]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for_lines(run: Path, lines: int, *processes: subprocess.Popen) -> None:
    while len(read_metrics(run / "metrics.jsonl")) < lines:
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def small_run_path(run: str, data: tuple[str, str], **options) -> str:
    return str(small_run(run, data, **options).path)


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_to_the_same_bytes(rank_pool, digit_files, start_rank, tmp_path: Path) -> None:
    options = {"epochs": 4, "checkpoint__every_steps": 1}
    rank_pool(2).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    run, port = tmp_path / "run", free_port()
    ranks = [start_rank(rank, port, words_of(run, digit_files, **options)) for rank in range(2)]
    wait_for_lines(run, 3, *ranks)
    ranks[1].kill()
    _, said = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 6 and said.splitlines()[-1].startswith("vitds pretrain (rank 0): another rank of"), said
    assert "its own message says why" in said and "Traceback" not in said and "fault of vitds" not in said
    rank_pool(2).run(small_run_path, str(run), digit_files, **options)
    assert untimed(run) == untimed(tmp_path / "whole")
    assert (run / "backbone.safetensors").read_bytes() == (tmp_path / "whole" / "backbone.safetensors").read_bytes()


def test_a_rank_that_cannot_read_its_data_says_so_and_ends_the_others(start_rank, tmp_path: Path) -> None:
    file = write_file(tmp_path / "train.beton", images=52)
    image = int(epoch_order(52, seed=0, epoch=0)[12])  # the first that rank 1 reads
    with open(file.path, "r+b") as beton:
        beton.seek(int(file.offsets[image]))
        beton.write(bytes(int(file.sizes[image])))
    run, port = tmp_path / "run", free_port()
    words = words_of(run, (str(file.path), str(file.path)), epochs=1)
    ranks = [start_rank(rank, port, words) for rank in range(2)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [6, 3], said
    assert f"image {image}" in said[1].splitlines()[-1] and "another rank of" in said[0].splitlines()[-1]
    assert not any("Traceback" in text for text in said)


def test_a_rank_that_hangs_says_where_and_ends_the_others(digit_files, start_rank, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    ranks = [start_rank(rank, port, words_of(run, digit_files, **LONG)) for rank in range(2)]
    wait_for_lines(run, 2, *ranks)
    ranks[1].send_signal(signal.SIGUSR2)
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [6, 6], said
    step = int(said[1].partition("rank 1 hangs: step ")[2].split()[0])
    assert step in (len(read_metrics(run / "metrics.jsonl")) + ahead for ahead in (-1, 0)) and " in hang\n" in said[1]


def test_a_second_run_on_the_same_port_is_refused_and_the_first_goes_on(digit_files, start_rank, tmp_path: Path) -> None:
    first, port = tmp_path / "first", free_port()
    ranks = [start_rank(rank, port, words_of(first, digit_files, **LONG)) for rank in range(2)]
    wait_for_lines(first, 1, *ranks)
    late, early = (start_rank(rank, port, words_of(tmp_path / "second", digit_files, **LONG)) for rank in (1, 0))
    _, said = early.communicate(timeout=120)
    assert early.returncode == 6 and f"could not meet on 127.0.0.1 port {port}" in said and f"--master_port {port + 1}" in said
    late.kill()  # as its launcher does
    wait_for_lines(first, len(read_metrics(first / "metrics.jsonl")) + 5, *ranks)
    ranks[0].send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [75, 75], said


def numerics_error(run: str, data: tuple[str, str], **options) -> str:
    with pytest.raises(NumericsError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


def test_a_loss_that_stays_not_finite_ends_the_run_and_spares_the_good_checkpoints(rank_pool, digit_files, tmp_path: Path) -> None:
    options = {"epochs": 100, "optimizer__lr_peak": 1e38, "checkpoint__every_steps": 1, "checkpoint__keep": 2}
    said = rank_pool(2).run(numerics_error, str(tmp_path / "run"), digit_files, **options)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = lines[-1]
    assert f"not finite in 10 steps in a row, the last step {last['step'] + 1} at learning rate" in said[0]
    first_images = epoch_order(52, seed=0, epoch=(last["step"] + 1) // 3)
    assert f"with images [{first_images[(last['step'] + 1) % 3 * 24]}, " in said[0]
    skips = [line["step"] for line in lines if line["skipped"] > 0]
    saved = [json.loads((path / "manifest.json").read_text()) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert len(saved) == 2 and all(facts["step"] <= skips[0] and facts["skipped_in_a_row"] == 0 for facts in saved)
    weights = load_file(list_checkpoints(tmp_path / "run" / "checkpoints")[0] / "model-0-of-2.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("launcher", [("deepspeed", "--num_gpus", "2"), ("torchrun", "--nproc_per_node", "2")], ids=lambda words: words[0])
def test_a_killed_launcher_leaves_nothing_behind_and_the_run_is_saved(digit_files, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    dashes = ["--"] * (launcher[0] == "torchrun")  # else it takes --run for one of its own flags
    command = [*launcher, "--master_port", str(free_port()), *dashes, str(ROOT / "launch/pretrain.py"), *words_of(run, digit_files, **LONG)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}, stdout=said, stderr=said)
    try:
        wait_for_lines(run, 2, process)
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        assert len(family) >= 3
    finally:
        process.kill()
        process.wait()
    gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=45)
    for survivor in alive:
        survivor.kill()
    assert not alive
    assert list_checkpoints(run / "checkpoints"), (tmp_path / "said").read_text()
