"""The SLURM scripts on a real Slurm: several nodes, stopped and requeued jobs, arrays, a node that dies.

The first tests run always; those marked `at_length` take minutes and run with VITDS_SLURM_TESTS=1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.data.small_files import picture
from tests.engine.training import untimed
from tests.slurm.cluster import ROOT, Cluster
from vitds.runs.metrics import read_metrics

SMALL = {  # over the digits recipes: five steps an epoch of 52 images, each a tenth of a second
    "views.crop_px": 8,
    "batch.global_images": 12,
    "batch.chunk_images": 2,
    "backbone.options": "{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 3}",
    "eval.knn_k": "[5]",
    "log.tensorboard": "false",
    "log.page": "false",
}
at_length = pytest.mark.skipif(
    os.environ.get("VITDS_SLURM_TESTS") != "1", reason="takes minutes; runs with VITDS_SLURM_TESTS=1"
)
WORDS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]


def small_words(run: Path, data: tuple[str, str], *more: str) -> list[str]:
    flags = (
        "--run",
        str(run),
        "--data",
        data[0],
        "--test",
        data[1],
        "--epochs",
        "6",
        "--finetune_epochs",
        "2",
        "--ds_config",
        "zero2",
        "--recipe",
        "idmm_digits",
        "--finetune_recipe",
        "finetune_digits",
    )
    return ["launch/slurm_small.sh", *flags, *WORDS, *more]


@pytest.fixture(scope="module")
def whole(
    slurm: Cluster, digit_files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The run of a job of two nodes that nothing disturbed, and its log. Its name is one that a shell would
    take apart.
    """
    folder = tmp_path_factory.mktemp("whole")
    run, log = folder / 'it\'s a "run"; touch gone $(touch gone) `touch gone` *', folder / "log"
    job = slurm.submit(log, "--nodes=2", *small_words(run, digit_files))
    slurm.wait_for(job, "COMPLETED", log=log)
    return run, log.read_text()


def test_slurm_job_of_two_nodes_goes_through_to_its_evaluation(whole: tuple[Path, str]) -> None:
    run, said = whole
    assert "restart 0, nodes 2 (n[0-1]), tasks a node 1" in said and "--finetune_epochs 2" in said
    for stage in ("pretrain", "finetune"):
        assert json.loads((run / stage / "environment.json").read_text())["ranks"] == 2
    pretrained, finetuned = (
        json.loads((run / stage / "summary.json").read_text()) for stage in ("pretrain", "finetune")
    )
    assert pretrained["steps"] == 30 and 0 <= pretrained["knn"]["5"]["top1"] <= 100
    assert finetuned["steps"] == 10 and f'"top1": {finetuned["top1"]}' in said
    assert not [path for path in (run.parent, Path.cwd()) for path in path.glob("gone*")]


@pytest.mark.parametrize(
    "command",
    [("scancel", "--signal=USR1"), pytest.param(("scontrol", "requeue"), marks=at_length)],
    ids=lambda words: words[0],
)
def test_slurm_job_that_is_requeued_in_mid_run_ends_with_the_same_bytes(
    slurm: Cluster,
    whole: tuple[Path, str],
    digit_files: tuple[str, str],
    tmp_path: Path,
    command: tuple[str, str],
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = slurm.submit(log, "--nodes=2", *small_words(run, digit_files))
    slurm.wait_for_lines(job, run / "pretrain", 5, log)
    slurm.call(*command, job)
    facts = slurm.wait_for(job, "COMPLETED", log=log)
    said = log.read_text()
    assert (
        facts["Restarts"] == "1"
        and "stopped by a signal after step" in said
        and "resumes after step" in said
        and "restart 1" in said
    )
    for stage in ("pretrain", "finetune"):
        assert untimed(run / stage) == [
            line.replace(str(run), str(whole[0])) for line in untimed(whole[0] / stage)
        ]
        ours, theirs = ((folder / stage / "backbone.safetensors").read_bytes() for folder in (run, whole[0]))
        assert ours == theirs


def test_slurm_cluster_goes_down_with_a_killed_test(slurm: Cluster, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from tests.slurm.cluster import started\n"
        "with started(pathlib.Path(sys.argv[1])): time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "cluster"], cwd=ROOT) as test:
        wait_until(lambda: len(daemons(tmp_path)) == 4)
        test.kill()
    wait_until(lambda: not (tmp_path / "cluster").exists())
    assert not daemons(tmp_path)


def daemons(folder: Path) -> list[psutil.Process]:
    """The processes that were started for a cluster in a folder."""
    names = ("munged", "slurmctld", "slurmd")
    found = psutil.process_iter(["name", "cmdline"])
    return [
        each
        for each in found
        if each.info["name"] in names and str(folder) in " ".join(each.info["cmdline"] or ())
    ]


def wait_until_said(log: Path, *words: str) -> None:
    wait_until(lambda: all(each in log.read_text() for each in words))


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)


@at_length
@pytest.mark.parametrize("requeued_by", ["scontrol", "the time limit"])
def test_slurm_job_that_is_requeued_goes_on_where_it_saved(
    slurm: Cluster, digit_files: tuple[str, str], tmp_path: Path, requeued_by: str
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = slurm.submit(log, "--time=3", *small_words(run, digit_files, "--epochs", "4000"))
    slurm.wait_for_lines(job, run / "pretrain", 5, log)
    if requeued_by == "scontrol":
        slurm.call("scontrol", "requeue", job)
    wait_until_said(log, "stopped by a signal after step", "resumes after step")
    steps = int(re.search(r"resumes after step (\d+)", log.read_text()).group(1))
    slurm.wait_for_lines(job, run / "pretrain", steps + 5, log)
    assert slurm.facts(job)["Restarts"] == "1"
    slurm.call("scancel", job)
    assert (
        f"stopped by a signal after step {steps} of" in log.read_text()
        and "time limit 3:00" in log.read_text()
    )


def test_slurm_job_whose_time_ends_before_it_could_train_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = slurm.submit(log, "--time=1", "launch/slurm_small.sh")
    slurm.wait_for(job, "FAILED", log=log)
    assert (
        "a time limit of 1:00 leaves no time to train: the job saves and requeues itself two to three minutes"
        in log.read_text()
    )


@at_length
def test_slurm_job_that_is_cancelled_stays_so(
    slurm: Cluster, digit_files: tuple[str, str], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = slurm.submit(log, *small_words(run, digit_files, "--epochs", "4000"))
    slurm.wait_for_lines(job, run / "pretrain", 1, log)
    slurm.call("scancel", job)
    facts = slurm.wait_for(job, "CANCELLED", log=log)
    time.sleep(2)
    assert (slurm.facts(job)["JobState"], facts["Restarts"]) == (
        "CANCELLED",
        "0",
    ) and "requeue" not in log.read_text()


@at_length
def test_slurm_transfer_that_is_signalled_saves_and_goes_on_to_its_matrix(
    slurm: Cluster, whole: tuple[Path, str], digit_files: tuple[str, str], tmp_path: Path
) -> None:
    for target in ("first", "second"):
        for half, source in zip(("train", "test"), digit_files, strict=True):
            for suffix in ("", ".json"):
                shutil.copy(source + suffix, tmp_path / f"{target}-{half}.beton{suffix}")
    # A link, for a list of runs has blanks between.
    (tmp_path / "pre").symlink_to(whole[0] / "pretrain")
    flags = {
        "runs": tmp_path / "pre",
        "folder": tmp_path,
        "out": tmp_path / "out",
        "recipe": "finetune_digits",
    }
    flags |= {"targets": "first second", "epochs": 12, "seeds": 1}
    words = [f"--{name}={value}" for name, value in flags.items()]
    log = tmp_path / "log"
    job = slurm.submit(log, "launch/slurm_transfer.sh", *words, *WORDS)
    slurm.wait_for_lines(job, tmp_path / "out/1-pre--first/finetune-seed0", 3, log)
    slurm.call("scancel", "--signal=USR1", job)
    facts = slurm.wait_for(job, "COMPLETED", log=log)
    assert facts["Restarts"] == "1" and "stopped by a signal after step" in log.read_text()
    matrix = json.loads((tmp_path / "out/transfer.json").read_text())
    assert matrix["targets"] == ["first", "second"] and len(matrix["cells"]) == 4


RECIPE = """
views: {crop_px: 16, groups: [{name: all, views: 1, scale: [0.3, 1.0]}]}
backbone: {name: vit_tiny_patch16_224, options: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}}
batch: {global_images: 12, chunk_images: 2}
engine: {precision: fp32, compile: off}
eval: {knn_k: [5]}
"""


def write_imagenet(folder: Path, images: int) -> None:
    """Train and val with three synsets; every fourth image is for val."""
    for number in range(images):
        synset = folder / ("train" if number % 4 else "val") / f"n0144000{number % 3}"
        synset.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, 40, 48)).save(synset / f"{number}.JPEG", "jpeg")


@at_length
def test_slurm_imagenet_from_its_folders_to_an_evaluated_model_and_from_it_on_a_larger_set(
    slurm: Cluster, tmp_path: Path
) -> None:
    write_imagenet(tmp_path / "imagenet", 24)
    (tmp_path / "pre.yaml").write_text(f"method: idmm\nhead: {{kind: sharded}}{RECIPE}")
    (tmp_path / "fine.yaml").write_text(f"method: supervised{RECIPE}")
    flags = {
        "folders": "imagenet",
        "data": "in.beton",
        "local": "disk",
        "recipe": "pre.yaml",
        "finetune_recipe": "fine.yaml",
        "run": "run",
    }
    words = ["launch/slurm_imagenet.sh", *(f"--{name}={tmp_path / value}" for name, value in flags.items())]
    words += ["--epochs=2", "--finetune_epochs=2"]
    log = tmp_path / "log"
    slurm.wait_for(slurm.submit(log, "--nodes=2", *words), "COMPLETED", log=log)
    said = log.read_text()
    assert (
        said.count("copied") == 4 and said.count("is there and sound") == 4
    )  # both nodes of this cluster share one disk
    checkpoint = max((tmp_path / "run/pretrain/checkpoints").iterdir())
    assert {"head-0-of-2.safetensors", "head-1-of-2.safetensors"} <= {
        file.name for file in checkpoint.iterdir()
    }
    assert json.loads((tmp_path / "run/finetune/summary.json").read_text())["top1"] >= 0
    again = slurm.call("bash", *words, "--dry_run")
    assert f"vitds data info {tmp_path}/in-train.beton" in again and "data build" not in again
    write_imagenet(tmp_path / "larger", 36)
    more = {"folders": "larger", "data": "larger.beton", "run": "from"}
    new = [*words, *(f"--{name}={tmp_path / value}" for name, value in more.items())]
    log = tmp_path / "log of init"
    slurm.wait_for(
        slurm.submit(log, "--nodes=2", *new, f"--init={tmp_path / 'run/pretrain'}"), "COMPLETED", log=log
    )
    assert (
        f"weights from {tmp_path / 'run/pretrain'}: " in log.read_text()
        and not (tmp_path / "from/pretrain").exists()
    )
    summary = json.loads((tmp_path / "from/finetune/summary.json").read_text())
    assert summary["steps"] == 2 * 3 and summary["top1"] >= 0  # 27 images in steps of 12


@at_length
def test_slurm_ghost_of_a_dead_node_and_the_requeued_job_are_kept_apart(
    own_slurm: Cluster, digit_files: tuple[str, str], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    own_slurm.call("scontrol", "update", "nodename=n0", "state=drain", "reason=test")
    job = own_slurm.submit(
        log, *small_words(run, digit_files, "--epochs", "60", "--set", "checkpoint.every_steps=1")
    )
    own_slurm.wait_for_lines(job, run / "pretrain", 5, log)
    ghost = json.loads((run / "pretrain/lock").read_text())["pid"]
    os.kill(int((own_slurm.folder / "slurmd.n1.pid").read_text()), signal.SIGKILL)  # its ranks live on
    own_slurm.call("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    own_slurm.call("scontrol", "update", "nodename=n0", "state=resume")
    own_slurm.wait_for(job, "PENDING", log=log)
    assert psutil.pid_exists(ghost)
    facts = own_slurm.wait_for(job, "COMPLETED", log=log)
    assert facts["Restarts"] == "1" and facts["NodeList"] == "n0" and not psutil.pid_exists(ghost)
    assert "exit code 5" in (own_slurm.folder / "slurmd.n1.log").read_text(), (
        own_slurm.folder / "slurmd.n1.log"
    ).read_text()
    steps = [line["step"] for line in read_metrics(run / "pretrain/metrics.jsonl")]
    assert (
        steps == list(range(300)) and json.loads((run / "finetune/summary.json").read_text())["steps"] == 10
    )
