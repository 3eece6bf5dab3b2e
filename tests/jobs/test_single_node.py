"""launch/single_node.sh: one machine, and several by a hostfile; here two names of one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.training import SMALL
from vitds.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WORDS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]


def start(*words: str) -> subprocess.Popen:
    """The script in a session of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    }
    environment |= {"PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "launch/single_node.sh"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def free_port() -> int:
    code = "import socket; print(socket.create_server(('', 0)).getsockname()[1])"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_machines_of_a_hostfile_train_as_one(
    tmp_path: Path, digit_files: tuple[str, str], launcher: str
) -> None:
    hosts, run, port = tmp_path / "hosts", tmp_path / "run", str(free_port())
    hosts.write_text("# two machines\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    flags = [
        "--recipe",
        "idmm_digits",
        "--run",
        str(run),
        "--data",
        digit_files[0],
        "--test",
        digit_files[1],
        "--epochs",
        "1",
        "--ds_config",
        "zero2",
        *WORDS,
    ]
    meet = ["--launcher", launcher, "--hostfile", str(hosts), "--port", port]
    machines = [start(*meet, "--node_rank", str(number), "pretrain", *flags) for number in range(2)]
    try:
        said = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--ranks", "3"], "deepspeed --master_port 9 --num_gpus 3 {root}/launch/pretrain.py --seed 1"),
        (
            ["--ranks", "3", "--launcher", "torchrun"],
            "torchrun --master_port 9 --nproc_per_node 3 -- {root}/launch/pretrain.py --seed 1",
        ),
        (
            ["--hostfile", "hosts"],
            "deepspeed --master_port 9 --hostfile hosts {root}/launch/pretrain.py --seed 1",
        ),
    ],
)
def test_dry_run_shows_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], shown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=8\n")
    done = start("--port", "9", *words, "--dry_run", "pretrain", "--seed", "1")
    assert done.communicate(timeout=60)[0] == f"+ OMP_NUM_THREADS=1 {shown.format(root=ROOT)}\n"


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["train"], "say pretrain or finetune, then its flags"),
        (
            ["--rank", "1", "pretrain"],
            "unknown option --rank; there are --launcher --ranks --hostfile --node_rank --port --dry_run",
        ),
        (["--ranks"], "--ranks needs a value"),
        (["--launcher", "mpirun", "pretrain"], "--launcher mpirun: there are deepspeed and torchrun"),
        (["--node_rank", "0", "pretrain"], "--node_rank needs --hostfile FILE"),
        (["--hostfile", "gone", "pretrain"], "--hostfile gone cannot be read"),
        (
            ["--hostfile", "hosts", "--launcher", "torchrun", "pretrain"],
            "torchrun is started on each machine: add --node_rank K",
        ),
        (
            ["--hostfile", "hosts", "--node_rank", "2", "pretrain"],
            "--node_rank 2: hosts has the machines 0 to 1",
        ),
        (
            ["--hostfile", "hosts", "--node_rank", "hosts[$(touch gone)]", "pretrain"],
            "hosts has the machines 0 to 1",
        ),
        (
            ["--ranks", "2", "--hostfile", "hosts", "pretrain"],
            "--ranks does nothing with --hostfile, whose lines",
        ),
        (["--ranks", "none", "pretrain"], "--ranks none must be a whole number from 1 on"),
        (["--port", "99999", "pretrain"], "--port 99999 must be from 1 to 65535"),
        (["--hostfile", "/dev/null", "pretrain"], "/dev/null names no machine"),
        (["--hostfile", "odd", "pretrain"], "odd: 'a 8' must be HOST slots=RANKS"),
    ],
)
def test_wrong_words_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], refusal: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=8\nb slots=8\n")
    Path("odd").write_text("a 8\n")
    done = start(*words)
    assert refusal in done.communicate(timeout=60)[0] and done.returncode == 2 and not Path("gone").exists()
