"""Slurm's variables become a rank's, in a step of several tasks alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitds.engine.process import adopt_slurm_step
from vitds.errors import ResourceError

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "1",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_JOB_ID": "40007",
}
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    # Set first: what delenv does not find it does not put back, and the rank would stay.
    for name in OURS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_task_of_a_step_is_a_rank_and_meets_on_a_port_of_its_job(step: pytest.MonkeyPatch) -> None:
    step.setenv("MASTER_ADDR", "n0")
    adopt_slurm_step()
    assert {name: os.environ[name] for name in OURS} == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "n0",
        "MASTER_PORT": "20007",
    }


def test_a_step_of_one_task_stays_one_rank(step: pytest.MonkeyPatch) -> None:
    step.setenv("SLURM_STEP_NUM_TASKS", "1")
    adopt_slurm_step()
    assert "RANK" not in os.environ


def test_a_first_node_that_cannot_be_looked_up_is_named(step: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ResourceError,
        match=r"the first node of n\[0-1\] cannot be looked up \(.*scontrol.*\); set MASTER_ADDR",
    ):
        adopt_slurm_step()
