"""The command line: a function a command, called by Fire after words.py has checked every word.

A command exists by standing in COMMANDS. Its function is the flags (keyword-only), the words (positional) and
the help (docstring); the job behind it is imported when it runs, so that help answers at once and without
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitds.cli.about import doctor, models, recipes, recipes_show
from vitds.cli.chain import chain
from vitds.cli.checkpoints import checkpoint_list, checkpoint_prune, checkpoint_verify
from vitds.cli.data import data_build, data_info, data_list, data_preview, data_verify
from vitds.cli.evaluate import (
    eval_fewshot,
    eval_knn,
    eval_linear,
    eval_retrieval,
    eval_theory,
    eval_top1,
)
from vitds.cli.experiments import ablate, compare, reproduce, transfer
from vitds.cli.fit import fit
from vitds.cli.plan import (
    bench_augment,
    bench_backbone,
    bench_gpu,
    bench_head,
    bench_loader,
    bench_step,
    plan,
)
from vitds.cli.report import report_runs
from vitds.cli.runs import runs
from vitds.cli.train import finetune, pretrain
from vitds.cli.use import embed, export_hf, export_onnx, export_timm, predict, similar
from vitds.console import run_command
from vitds.words import Command

COMMANDS: dict[str, Command] = {
    "doctor": doctor,
    "data build": data_build,
    "data info": data_info,
    "data list": data_list,
    "data preview": data_preview,
    "data verify": data_verify,
    "recipes": recipes,
    "recipes show": recipes_show,
    "models": models,
    "fit": fit,
    "pretrain": pretrain,
    "finetune": finetune,
    "eval top1": eval_top1,
    "eval knn": eval_knn,
    "eval linear": eval_linear,
    "eval fewshot": eval_fewshot,
    "eval retrieval": eval_retrieval,
    "eval theory": eval_theory,
    "predict": predict,
    "embed": embed,
    "similar": similar,
    "export timm": export_timm,
    "export hf": export_hf,
    "export onnx": export_onnx,
    "runs": runs,
    "report": report_runs,
    "chain": chain,
    "ablate": ablate,
    "compare": compare,
    "reproduce": reproduce,
    "transfer": transfer,
    "plan": plan,
    "checkpoint list": checkpoint_list,
    "checkpoint verify": checkpoint_verify,
    "checkpoint prune": checkpoint_prune,
    "bench loader": bench_loader,
    "bench augment": bench_augment,
    "bench step": bench_step,
    "bench backbone": bench_backbone,
    "bench head": bench_head,
    "bench gpu": bench_gpu,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default this process's words; returns the exit status (console.py)."""
    return run_command(COMMANDS, sys.argv[1:] if argv is None else argv)
