"""Kills and the whole grid, for as long as it is given: python -m tests.soak [--kills 50] [--minutes 60]
[--seed 0]

Kills: runs of two real ranks get kill -9 at random instants (one rank, all ranks, the launcher) and go on
until they have finished; each must end with the bytes of a run that nobody killed. Then, while there is time,
the recipes and DeepSpeed files for large backbones, each with each, and cases of the whole grid in random
order: a run cut at a step must go on to the same bytes. Prints what happened; ends with status 1 if anything
differs, and keeps that run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from tests.conftest import make_digit_files
from tests.engine.grid import all_cases, options_of
from tests.engine.large_backbones import CONFIGS, RECIPES, shrunk, trained_and_resumed
from tests.engine.training import (
    ROOT,
    free_port,
    outcome,
    rewound,
    small_run_path,
    start_rank_process,
    words_of,
)
from tests.ranks import RankPool
from vitds.runs.checkpoint import list_checkpoints
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

RANKS = 2
VICTIMS = ("one rank", "all ranks", "the launcher")
STEPS = 120
# What the killed runs are made of, in turn.
KILLED: tuple[dict[str, Any], ...] = (
    {"stage": "0", "head__kind": "dense"},
    {"stage": "2", "head__optimizer": "lean", "optimizer__average_decay": 0.9},
    {"stage": "3_offload", "head__kind": "sharded", "batch__micro_images": 4},
    {"stage": "1", "head__kind": "dense", "batch__micro_images": 4, "checkpoint__every_steps": 7},
    {
        "stage": "2",
        "head__optimizer": "lean",
        "head__row_dtype": "bf16",
        "head__sample_rate": 0.5,
        "head__lazy": True,
    },
)


@dataclass
class Kill:
    """One kill -9. start_s: from the next start of the processes to the end of its first step, once known."""

    victim: str
    steps_lost: int
    seconds_to_end: float
    is_nonzero: bool
    start_s: float | None = None


def start(
    run: Path, data: tuple[str, str], options: dict[str, Any], by_launcher: bool
) -> list[subprocess.Popen]:
    """Two ranks, or the launcher that starts them."""
    words, port = words_of(run, data, epochs=STEPS // 3, **options), free_port()
    if not by_launcher:
        return [start_rank_process(rank, port, words) for rank in range(RANKS)]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": tools, "OMP_NUM_THREADS": "1"}
    command = [
        "deepspeed",
        "--num_gpus",
        str(RANKS),
        "--master_port",
        str(port),
        str(ROOT / "launch/pretrain.py"),
        *words,
    ]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    ]


def steps_logged(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl"))


def family_of(processes: list[subprocess.Popen]) -> list[psutil.Process]:
    found = []
    for process in processes:
        if process.poll() is None:
            found += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return found


def start_and_kill(
    run: Path, data: tuple[str, str], options: dict[str, Any], victim: str, draw: random.Random
) -> Kill | None:
    """Start the run, kill it, wait until nothing of it is left; None if it came to its end before."""
    resumed_at = max((int(path.name[5:]) for path in list_checkpoints(Run(run).checkpoints)), default=0)
    processes = start(run, data, options, victim == "the launcher")
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 10))  # in the start, most often
    else:
        until = resumed_at + draw.randint(1, 25)
        while steps_logged(run) < until and all(process.poll() is None for process in processes):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
    family = family_of(processes)
    for process in processes if victim == "all ranks" else [draw.choice(processes)]:
        process.kill()
    killed_at, logged = time.monotonic(), steps_logged(run)
    for process in processes:  # before psutil reaps them and takes their exit status
        process.communicate(timeout=150)
    _, alive = psutil.wait_procs(family, timeout=150)
    assert not alive, f"{len(alive)} processes outlive the kill of {victim}"
    if Run(run).is_finished:
        return None
    leaked = [
        name
        for name in os.listdir("/dev/shm")
        if {str(process.pid) for process in family} & set(name.split("_"))
    ]
    assert not leaked, f"shared memory is left: {leaked}"
    saved = max((int(path.name[5:]) for path in list_checkpoints(Run(run).checkpoints)), default=0)
    return Kill(
        victim,
        max(0, logged - saved),
        time.monotonic() - killed_at,
        all(process.returncode for process in processes),
    )


def killed_run(
    folder: Path, data: tuple[str, str], options: dict[str, Any], draw: random.Random, most: int, until: float
) -> list[Kill]:
    """One run, killed again and again; then left to its end by the pool and compared by the caller."""
    kills: list[Kill] = []
    while len(kills) < most and time.monotonic() < until:
        kill = start_and_kill(folder, data, options, draw.choice(VICTIMS), draw)
        starts = [
            line["time/start_s"] for line in read_metrics(folder / "metrics.jsonl") if "time/start_s" in line
        ]
        if kills and starts:
            kills[-1].start_s = starts[-1]
        if kill is None:
            break
        kills.append(kill)
    return kills


def soak_kills(
    folder: Path, data: tuple[str, str], pool: RankPool, most: int, until: float, draw: random.Random
) -> tuple[list[Kill], int]:
    """Runs of KILLED in turn until there were enough kills or no time is left; the kills and how many runs
    were compared equal.
    """
    kills: list[Kill] = []
    runs = 0
    while len(kills) < most and time.monotonic() < until:
        options = {"checkpoint__every_steps": 1} | KILLED[runs % len(KILLED)]
        whole, killed = folder / f"whole-{runs}", folder / f"killed-{runs}"
        pool.run(small_run_path, str(whole), data, epochs=STEPS // 3, **options)
        kills += killed_run(killed, data, options, draw, most - len(kills), until)
        pool.run(small_run_path, str(killed), data, epochs=STEPS // 3, **options)
        assert outcome(killed) == outcome(whole), f"{killed} ended with other bytes than {whole}: {options}"
        runs += 1
    return kills, runs


def soak_large(folder: Path, data: tuple[str, str], pool: RankPool, until: float) -> str:
    """Every recipe for large backbones with every file for them, as it is and shrunk; how many pairs were
    run, all equal.
    """
    done = 0
    for recipe in RECIPES:
        first: list[float] = []
        for ds_config in CONFIGS:
            for name, config in (("real", ds_config), ("shrunk", shrunk(ds_config, recipe, folder))):
                if time.monotonic() > until:
                    return f"{done} of {2 * len(RECIPES) * len(CONFIGS)} runs of large backbones, all equal"
                losses = trained_and_resumed(
                    pool, folder / f"{recipe}-{ds_config}-{name}", data, recipe, config
                )
                first = first or losses
                assert np.allclose(losses, first, rtol=1e-3), (
                    f"{recipe}, {config} has losses {losses}, {CONFIGS[0]} has {first}"
                )
                done += 1
    return f"{done} runs of large backbones, all equal"


def soak_grid(
    folder: Path, data: tuple[str, str], pools: dict[int, RankPool], until: float, draw: random.Random
) -> tuple[int, int]:
    """Cases of the whole grid in random order: how many were equal to the bit, of how many."""
    cases = list(all_cases())
    draw.shuffle(cases)
    for number, case in enumerate(cases):
        if time.monotonic() > until:
            return number, len(cases)
        whole = folder / f"grid-{number}"
        pools[case["ranks"]].run(small_run_path, str(whole), data, **options_of(case))
        cut = rewound(whole, folder / f"grid-{number}-cut", case["step"])
        pools[case["ranks"]].run(small_run_path, str(cut), data, **options_of(case))
        assert outcome(cut) == outcome(whole), f"{cut} ended with other bytes than {whole}: {case}"
    return len(cases), len(cases)


def show(kills: list[Kill], runs: int, grid: tuple[int, int]) -> None:
    """The tables of docs/reliability.md."""
    table = Table(
        "killed",
        "kills",
        "non-zero exits",
        "steps lost, most",
        "all ended after, most",
        "next start to its first step, median",
    )
    for victim in VICTIMS:
        chosen = [kill for kill in kills if kill.victim == victim]
        starts = [kill.start_s for kill in chosen if kill.start_s is not None]
        table.add_row(
            victim,
            str(len(chosen)),
            str(sum(kill.is_nonzero for kill in chosen)),
            str(max((kill.steps_lost for kill in chosen), default=0)),
            f"{max((kill.seconds_to_end for kill in chosen), default=0):.1f} s",
            f"{statistics.median(starts):.1f} s" if starts else "-",
        )
    Console(width=140).print(table)
    print(
        f"{runs} killed runs ended with the bytes of runs that nobody killed; "
        f"{grid[0]} of {grid[1]} cases of the grid, all equal"
    )


def main() -> None:
    """See the file."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--kills", type=int, default=50)
    words.add_argument("--minutes", type=float, default=60.0, help="nothing is begun after them")
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    until, draw = time.monotonic() + 60 * given.minutes, random.Random(given.seed)
    folder = Path(tempfile.mkdtemp(prefix="vitds-soak-"))
    data = make_digit_files(folder)
    pools = {ranks: RankPool(ranks) for ranks in (1, RANKS)}
    try:
        kills, runs = soak_kills(folder, data, pools[RANKS], given.kills, until, draw)
        print(soak_large(folder, data, pools[RANKS], until), flush=True)
        show(kills, runs, soak_grid(folder, data, pools, until, draw))
    except AssertionError as error:
        sys.exit(f"{error}\nkept in {folder}")
    finally:
        for pool in pools.values():
            pool.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
