"""The main job on embedded data: pretrain, fine-tune from it, and train from scratch to compare."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vitds.errors import UsageError
from vitds.jobs.chain import Stage, run_stages
from vitds.report.overview import KNN_K
from vitds.runs.directory import Run, write_json

# From scratch for 75 epochs, about the compute of both stages: the mean of three seeds, measured once
# (docs/method.md, "What pretraining is worth").
SCRATCH_AT_EQUAL_COMPUTE = 94.4


def quickstart(*, run: str = "runs/quickstart", seed: int = 0) -> None:
    """Pretrain, fine-tune and train from scratch on the embedded digits.

    Three stages through the launch scripts, a closing table, and the same numbers in RUN/quickstart.json:
    knn_top1, finetuned_top1, scratch_top1, difference (percent), seconds of each stage.

    Args:
        run: the folder of the three runs
        seed: of all three
    Raises: UsageError if a stage is finished with another seed.
    """
    root = Path(run)
    # What torch takes, whatever is left in the environment. Where DeepSpeed's launcher looks for itself and
    # finds no GPU, it warns in every process.
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    launcher = ("deepspeed", "--log_level", "error")
    config = ("--ds_config", "ds_configs/zero2.json", "--seed", str(seed))
    finetune = (*launcher, "launch/finetune.py", *config)
    names = ("pretrain", "finetune", "scratch")
    for made in (Run(root / name) for name in names):
        if made.is_finished and made.settings.seed != seed:
            raise UsageError(
                f"`seed={seed}`: {made.path} was made with seed {made.settings.seed}; give that, or another "
                "`run`"
            )
    pretrained, finetuned, scratch = run_stages(
        [
            Stage(root / "pretrain", (*launcher, "launch/pretrain.py", *config)),
            Stage(root / "finetune", (*finetune, "--init", str(root / "pretrain"))),
            Stage(root / "scratch", finetune),
        ]
    )
    stages = dict(zip(names, (pretrained, finetuned, scratch), strict=True))
    seconds = {name: stage.seconds or stage.run.summary["seconds"] for name, stage in stages.items()}
    tuned, random = finetuned.run.summary["top1"], scratch.run.summary["top1"]
    numbers = {
        "knn_top1": round(pretrained.run.summary["knn"][KNN_K]["top1"], 2),
        "finetuned_top1": round(tuned, 2),
        "scratch_top1": round(random, 2),
        "difference": round(tuned - random, 2),
        "seconds": seconds,
    }
    write_json(root / "quickstart.json", numbers)
    _print_table(root, numbers)


def _print_table(root: Path, numbers: dict[str, object]) -> None:
    seconds = numbers["seconds"]
    table = Table(
        title="Digits, 896 training images, 901 test images", caption=f"all numbers: {root}/quickstart.json"
    )
    for column, justify in (("", "left"), ("test top-1", "right"), ("seconds", "right")):
        table.add_column(column, justify=justify)
    table.add_row(
        f"kNN (k = {KNN_K}) after pretraining", f"{numbers['knn_top1']:.1f} %", f"{seconds['pretrain']:.0f}"
    )
    table.add_row(
        "fine-tuned from pretraining", f"{numbers['finetuned_top1']:.1f} %", f"{seconds['finetune']:.0f}"
    )
    table.add_row("the same from scratch", f"{numbers['scratch_top1']:.1f} %", f"{seconds['scratch']:.0f}")
    table.add_row("difference", f"{numbers['difference']:+.1f} points", "", style="bold")
    table.add_section()
    table.add_row("from scratch, 5x as long (stored)", f"{SCRATCH_AT_EQUAL_COMPUTE:.1f} %", "")
    console = Console(markup=False, emoji=False)
    console.print(table)
    board = f"tensorboard --logdir {shlex.quote(str(root))}"
    console.print(
        "stored: the compute of both stages, all on the labels; mean of three seeds, see docs/method.md",
        highlight=False,
        soft_wrap=True,
    )
    places = {
        "run": root / "pretrain",
        "page": root / "finetune" / "report.html",
        "TensorBoard": board,
        "picture": root / "pretrain" / "curve.png",
    }
    for what, path in places.items():
        console.print(f"{what}: {path}", highlight=False, soft_wrap=True)
