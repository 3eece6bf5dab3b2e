"""What the SLURM scripts make of options and variables; --dry_run needs no Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT


def dry(script: str, *words: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A script's dry run, as one that sbatch copied elsewhere: it has SLURM_SUBMIT_DIR alone to go by."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "VITDS"))}
    environment = ours | {"SLURM_SUBMIT_DIR": str(folder)} | environment
    command = ["bash", str(ROOT / "launch" / script), "--dry_run", *words]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)


def test_slurm_options_come_from_words_or_variables_and_the_word_wins() -> None:
    done = dry(
        "slurm_small.sh",
        "--epochs",
        "3",
        "--seed=5",
        "--set",
        "head.bias=true",
        VITDS_EPOCHS="9",
        VITDS_MODEL="vit_tiny_patch16_224",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "job none, restart 0, nodes 1 (), tasks a node 1, GPUs a node 0"
    assert {
        "  --epochs 3",
        "  --seed 5",
        "  --model vit_tiny_patch16_224",
        "  --set head.bias=true",
        "  --recipe ''",
    } < set(lines)
    pretrain, finetune = (line for line in lines if line.startswith("stage "))
    given = "--seed=5 --set backbone.name=vit_tiny_patch16_224 --set head.bias=true"
    assert (
        pretrain
        == f"stage runs/small/pretrain: srun --kill-on-bad-exit=0 --wait=60 vitds pretrain --epochs=3 {given}"
    )
    assert finetune.endswith(f"vitds finetune --init=runs/small/pretrain {given}")


def test_slurm_imagenet_builds_then_copies_then_trains() -> None:
    done = dry(
        "slurm_imagenet.sh",
        "--root",
        "/in",
        "--data",
        "gone/i.beton",
        "--local",
        "/disk",
        SLURM_JOB_NUM_NODES="4",
    )
    assert done.returncode == 0, done.stderr
    build, *copies = [line for line in done.stdout.splitlines() if line.startswith("+ srun")]
    assert build.endswith("vitds data build imagenet --root /in --out gone/i.beton")
    assert len(copies) == 2 and all(
        line.startswith("+ srun --ntasks=4 --ntasks-per-node=1 bash launch/slurm_copy.sh") for line in copies
    )
    assert "--data=/disk/" in done.stdout and "--ds_config=zero2" in done.stdout


def test_slurm_imagenet_from_a_run_on_a_subset_is_not_pretrained() -> None:
    done = dry(
        "slurm_imagenet.sh", "--folders", "/in", "--data", "gone/i.beton", "--init", "runs/subset/pretrain"
    )
    [stage] = [line for line in done.stdout.splitlines() if line.startswith("stage ")]
    assert (
        "vitds finetune" in stage
        and "--data=gone/i-train.beton" in stage
        and "--init=runs/subset/pretrain" in stage
    )


def test_slurm_transfer_calls_the_command_with_each_run_and_each_target() -> None:
    words = ("--runs", "runs/a runs/b", "--targets=pets dtd", "--epochs", "3", "--set", "head.bias=true")
    done = dry("slurm_transfer.sh", *words, VITDS_FOLDER="/in")
    assert done.returncode == 0, done.stderr
    [command] = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert command == (
        "+ srun --nodes=1 --ntasks=1 --cpus-per-task=1 vitds transfer runs/a runs/b "
        "--to=/in/pets-train.beton --to=/in/dtd-train.beton --out=runs/transfer "
        "--recipe=finetune_deit_tiny_224 --epochs=3 --set head.bias=true"
    )


@pytest.mark.parametrize(
    ("script", "words", "refusal"),
    [
        (
            "slurm_small.sh",
            ["--epochz", "3"],
            "unknown option --epochz; there are --data --ds_config --epochs",
        ),
        ("slurm_small.sh", ["--epochs"], "--epochs needs a value"),
        (
            "slurm_small.sh",
            ["--init", "runs/pre", "--epochs", "3"],
            "--epochs does nothing with --init: it is of the pretraining, which is left out; "
            "of the fine-tuning there",
        ),
        ("slurm_imagenet.sh", ["--init", "runs/pre", "--recipe=r.yaml"], "--recipe does nothing with --init"),
        (
            "slurm_imagenet.sh",
            ["--root", "a", "--folders", "b"],
            "--root does nothing with --folders: there is one source of images",
        ),
        ("slurm_small.sh", ["3"], "unexpected word 3"),
        (
            "slurm_imagenet.sh",
            ["--data", "gone.beton"],
            "gone-train.beton is not there: --root FOLDER names ImageNet to build it from",
        ),
        ("slurm_transfer.sh", [], '--runs "RUN ..." names the pretrained runs'),
        ("slurm_transfer.sh", ["--runs", "r"], "one run trains at a time, as one task; leave --ntasks out"),
    ],
)
def test_slurm_scripts_refuse_wrong_words(script: str, words: list[str], refusal: str) -> None:
    done = dry(script, *words, SLURM_NTASKS="2")
    assert done.returncode == 2 and refusal in done.stderr


def test_slurm_script_outside_the_project_or_outside_a_job_says_so(tmp_path: Path) -> None:
    assert "is not the project's folder; submit from there" in dry("slurm_small.sh", folder=tmp_path).stderr
    done = subprocess.run(
        ["bash", "launch/slurm_small.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "this is for sbatch; --dry_run shows what it would do" in done.stderr


def test_slurm_job_with_more_gpus_than_tasks_is_refused() -> None:
    done = dry("slurm_small.sh", SLURM_GPUS_ON_NODE="4", SLURM_TASKS_PER_NODE="1(x2)")
    assert "4 GPUs and 1 tasks a node: there is one task a GPU, so add --ntasks-per-node=4" in done.stderr
    assert dry("slurm_small.sh", SLURM_GPUS_ON_NODE="4", SLURM_TASKS_PER_NODE="4(x2)").returncode == 0


def test_slurm_copy_is_made_once_and_again_when_damaged_or_outdated(tmp_path: Path) -> None:
    (tmp_path / "x.beton").write_text("data")
    (tmp_path / "x.beton.json").write_text("{}")

    def copy() -> str:
        words = [
            "bash",
            str(ROOT / "launch/slurm_copy.sh"),
            str(tmp_path / "x.beton"),
            str(tmp_path / "disk"),
        ]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout

    assert copy().count("copied") == 2 and (tmp_path / "disk/x.beton").read_text() == "data"
    assert copy().count("is there and sound") == 2
    times = (tmp_path / "x.beton").stat().st_mtime_ns
    (tmp_path / "disk/x.beton").write_text("dafa")
    os.utime(tmp_path / "disk/x.beton", ns=(times, times))
    assert copy().count("copied") == 1 and (tmp_path / "disk/x.beton").read_text() == "data"
    (tmp_path / "x.beton").write_text("more")
    assert copy().count("copied") == 1 and (tmp_path / "disk/x.beton").read_text() == "more"
