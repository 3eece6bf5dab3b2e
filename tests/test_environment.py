"""Variables that a launcher, Slurm or torch would set, left over, half set or absurd: one rank, or one clear
error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import deepspeed.ops
import pytest
import torch
import torch.distributed as td

from vitds import dist
from vitds.cli import main
from vitds.engine import process
from vitds.engine.process import start_ranks
from vitds.errors import ResourceError
from vitds.launcher import GROUP, REMEDY, Place, read_place

ROOT = Path(__file__).parents[1]
OTHERS = (
    *(
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "CROSS_RANK",
        "CROSS_SIZE",
        "TORCHELASTIC_RUN_ID",
        "OMPI_COMM_WORLD_SIZE",
    ),
    *(
        "SLURM_STEP_ID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_GTIDS",
        "SLURM_JOB_ID",
    ),
    *("SLURM_STEP_NODELIST", "SLURM_CPUS_PER_TASK", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}

ONE_RANK = (
    {},
    {"WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "1"},
    {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "7",
        "MASTER_ADDR": "nowhere.invalid",
        "MASTER_PORT": "99999",
    },
    {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""},
    {"LOCAL_RANK": "abc"},
    {"LOCAL_RANK": "3", "LOCAL_SIZE": "-1", "LOCAL_WORLD_SIZE": "abc"},
    {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "99999"},
    {"CROSS_RANK": "0", "CROSS_SIZE": "abc"},
    {"TORCHELASTIC_RUN_ID": "none"},
    {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "abc", "SLURM_JOB_ID": "abc"},
    {"SLURM_STEP_ID": "0"},
    {"SLURM_STEP_ID": "", "SLURM_STEP_NUM_TASKS": "8"},
    {"SLURM_CPUS_PER_TASK": "abc"},
    {"SLURM_CPUS_PER_TASK": "0"},
    {"OMPI_COMM_WORLD_LOCAL_RANK": "3"},
)
REFUSED = (
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but no RANK"),
    ({"RANK": "0"}, "RANK=0 is set, but no WORLD_SIZE"),
    ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK=abc is no whole number from 0 on"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is no whole number from 0 on"),
    ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE=abc is no whole number from 1 on"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no whole number from 1 on"),
    ({"RANK": "0", "WORLD_SIZE": "1.5"}, "WORLD_SIZE=1.5 is no whole number from 1 on"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set, but no LOCAL_RANK"),
    (TWO | {"LOCAL_RANK": "abc"}, "LOCAL_RANK=abc is no whole number from 0 on"),
    (TWO | {"LOCAL_SIZE": "0"} | HERE, "LOCAL_SIZE=0 is no whole number from 1 on"),
    (TWO, "RANK and WORLD_SIZE are set, but no MASTER_ADDR and no MASTER_PORT"),
    (TWO | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}, "are set, but no MASTER_PORT"),
    (TWO | HERE | {"MASTER_PORT": "abc"}, "MASTER_PORT=abc is no whole number from 1 on"),
    (TWO | HERE | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port: 1 to 65535"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes, but sets no RANK"),
    (STEP, "SLURM_STEP_NUM_TASKS=2, but SLURM_PROCID, SLURM_LOCALID, SLURM_GTIDS, SLURM_STEP_NOD"),
    (STEP | {"SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS=abc is no whole number from 1 on"),
    (
        STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "x", "SLURM_GTIDS": "0", "SLURM_STEP_NODELIST": "n0",
                "SLURM_JOB_ID": "1"},
        "SLURM_LOCALID=x is no whole number from 0 on",
    ),
)  # fmt: skip


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """None of the variables set, and no group; neither is left behind."""
    for name in (*GROUP, *OTHERS):
        monkeypatch.setenv(name, "")  # so that it is put back, also where it was not there
        monkeypatch.delenv(name)
    monkeypatch.setattr(process, "end_with_launcher", lambda: None)  # it would watch the tests' own parents
    threads = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(threads)
    if td.is_initialized():
        td.destroy_process_group()


def set_all(bare: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        bare.setenv(name, value)


@pytest.mark.parametrize("variables", ONE_RANK, ids=str)
def test_variables_that_make_no_group_make_one_rank(
    bare: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    set_all(bare, variables)
    hook = sys.excepthook
    start_ranks()
    assert sys.excepthook is hook  # torch's own writes [rank0] before a caller's tracebacks
    assert (dist.rank(), dist.world_size(), os.environ["LOCAL_RANK"]) == (0, 1, "0")
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(("variables", "said"), REFUSED, ids=lambda each: str(each)[:80])
def test_half_a_group_is_refused_with_the_variable_and_the_way_out(
    bare: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    set_all(bare, variables)
    with pytest.raises(ResourceError) as caught:
        start_ranks()
    assert said in str(caught.value) and "unset" in str(caught.value)
    assert not td.is_initialized()


def test_a_launchers_variables_are_read_whole() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_place(variables) == Place(3, 4, 1, 2, is_launched=True)
    assert all(name in REMEDY for name in GROUP)


@pytest.mark.parametrize(
    "variables", [*ONE_RANK, *(case for case, _ in REFUSED)], ids=lambda each: str(each)[:80]
)
def test_a_command_that_joins_no_group_takes_no_notice(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str]
) -> None:
    set_all(bare, variables)
    assert main(["data", "info", "absent.beton"]) == 3
    assert "absent.beton: cannot be opened" in capsys.readouterr().err
    assert main(["pretrain", "--epochz", "3"]) == 2
    assert "unknown flag --epochz" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "abc"])
def test_deepspeed_takes_the_device_that_torch_takes(value: str) -> None:
    code = (
        "import torch, vitds.engine.process\nfrom deepspeed.accelerator import get_accelerator\nassert "
        "get_accelerator()._name == ('cuda' if torch.cuda.is_available() else 'cpu')"
    )
    variables = {"DS_ACCELERATOR": value, "OMP_NUM_THREADS": value, "TORCH_EXTENSIONS_DIR": value}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables)
    assert done.returncode == 0


def test_a_rank_without_a_gpu_of_its_own_is_refused(bare: pytest.MonkeyPatch) -> None:
    set_all(bare, TWO | HERE | {"RANK": "1", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "5"})
    bare.setattr(torch.cuda, "is_available", lambda: True)
    bare.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match=r"LOCAL_RANK=1, but torch sees 1 GPU\(s\) here .*DEVICES=5\)"):
        start_ranks()


def test_groups_that_deepspeed_makes_wait_as_long_as_ours(bare: pytest.MonkeyPatch) -> None:
    start_ranks()
    deepspeeds = td.new_group([0])
    bare.setattr(process, "COLLECTIVE_TIMEOUT", timedelta(minutes=47))
    process.wait_for_slow_ranks()
    for group in (td.group.WORLD, deepspeeds):
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=47)


def test_no_builder_of_deepspeeds_operations_is_tried_at_a_start() -> None:
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
