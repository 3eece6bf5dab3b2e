"""The digits' pretraining recipes, tuned alike: python -m tests.soak_tuning [--epochs 16] [--out FOLDER]

Every method gets the same three rates, on the training half of the digits, of which a fifth of each class is
held out. The test half is not touched. One seed. `vitds compare` trains and measures; started again it goes
on. At the end: each method's mean of kNN, linear classifier and fine-tuning for each rate, and the best.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from vitds.config.experiment_flags import CompareFlags
from vitds.config.yaml_text import dump_yaml
from vitds.data.build import BuildOptions, build_set
from vitds.data.digits import digit_images
from vitds.jobs.compare_methods import run_comparison
from vitds.jobs.experiment import Json
from vitds.report.table import show

METHODS = ("idmm", "diet", "simclr", "mocov3", "dino", "lejepa", "supcon", "mae")
RATES = ("3e-4", "1e-3", "3e-3")


def main() -> None:
    """See the file."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--epochs", type=int, default=16)
    words.add_argument("--out", default="runs/soak-tuning")
    given = words.parse_args()
    out = Path(given.out)
    options = BuildOptions(storage="raw", test_fraction=0.2, workers=1)
    (train, _), (test, _) = build_set(digit_images("train"), out / "digits.beton", options)
    flags = CompareFlags(
        methods=",".join(f"{name}={recipe}" for name, recipe in tried_recipes(out / "tried").items()),
        amount=float(given.epochs),
        data=str(train),
        test=str(test),
        out=str(out / "runs"),
        seeds=1,
        set=("log.page=false", "log.tensorboard=false"),
        finetune_set=("log.page=false", "log.tensorboard=false"),
    )
    show_choices(run_comparison(flags)["arms"])


def tried_recipes(folder: Path) -> dict[str, Path]:
    """Name of an arm -> its recipe, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    recipes = {f"{method}-{rate}": folder / f"{method}-{rate}.yaml" for method in METHODS for rate in RATES}
    for name, path in recipes.items():
        method, rate = name.split("-", 1)
        path.write_text(dump_yaml({"base": f"{method}_digits", "optimizer": {"lr_peak": float(rate)}}))
    return recipes


def show_choices(arms: list[Json]) -> None:
    """A row a method: the mean of its three figures for each rate, and the best rate."""
    score = {arm["arm"]: sum(arm[key]["mean"] for key in ("knn", "linear", "finetuned")) / 3 for arm in arms}
    table = Table("method", *RATES, "best")
    for method in METHODS:
        tries = {rate: score[f"{method}-{rate}"] for rate in RATES}
        table.add_row(method, *(f"{mean:.1f}" for mean in tries.values()), max(tries, key=tries.get))
    show(table)


if __name__ == "__main__":
    main()
