"""The ablation on the digits, at full length: python -m tests.soak_ablation [--seeds 5] [--out FOLDER]

Fifty runs in some hours of two CPU cores; started again it goes on. Ends with status 1 if the whole recipe is
not better than none of its parts by more than the paired interval leaves open.
"""

from __future__ import annotations

import argparse
import sys

from vitds.config.experiment_flags import AblateFlags
from vitds.jobs.ablate import run_ablation


def main() -> None:
    """See the file."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seeds", type=int, default=5)
    words.add_argument("--out", default="runs/soak-ablation")
    words.add_argument("--budget", choices=("epochs", "compute"), default="epochs")
    given = words.parse_args()
    flags = AblateFlags(
        data="digits",
        test="digits",
        out=given.out,
        recipe="idmm_digits",
        finetune_recipe="finetune_digits",
        seeds=given.seeds,
        budget=given.budget,
        set=("log.page=false",),
        finetune_set=("log.page=false",),
    )
    whole = run_ablation(flags)["arms"][-1]["finetuned"]["difference"]
    if whole["interval"][0] <= 0:
        sys.exit(f"the whole recipe is not better than none of its parts: {whole}")


if __name__ == "__main__":
    main()
