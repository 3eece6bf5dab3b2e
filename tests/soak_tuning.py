"""Pretraining recipes, tuned alike.

    python -m tests.soak_tuning --out runs/tuning
    python -m tests.soak_tuning --out runs/tuning --train my-train.beton --test my-test.beton --epochs 4

The first trains METHOD_digits on four fifths of the digits' training half and measures on the last fifth
of each class; the test half is not touched. The second trains METHOD_photos_cpu on photographs; its test
file has to be a held-out part of training. Every method gets the same rates, and one seed. `vitds compare`
trains and measures; started again it goes on. At the end: each method's mean of kNN, linear classifier and
fine-tuning for each rate, and the best.
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


def main() -> None:
    """See the file."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--epochs", type=int, default=16)
    words.add_argument("--finetune_epochs", type=int, help="default: its recipe's")
    words.add_argument("--rates", default="3e-4,1e-3,3e-3")
    words.add_argument(
        "--methods", default=",".join(METHODS), help="of a recipe with another network by themselves"
    )
    words.add_argument("--train", help="a .beton file of photographs, in place of the digits")
    words.add_argument("--test", help="its held-out part")
    words.add_argument("--set", action="append", default=[], help="a setting of every pretraining")
    words.add_argument("--out", default="runs/soak-tuning")
    given = words.parse_args()
    out, rates = Path(given.out), tuple(given.rates.split(","))
    train, test, kind = given.train, given.test, "photos_cpu"
    if train is None:
        options = BuildOptions(storage="raw", test_fraction=0.2, workers=1)
        (train, _), (test, _) = build_set(digit_images("train"), out / "digits.beton", options)
        kind = "digits"
    recipes = tried_recipes(out / "tried", given.methods.split(","), kind, rates)
    flags = CompareFlags(
        methods=",".join(f"{name}={recipe}" for name, recipe in recipes.items()),
        amount=float(given.epochs),
        finetune_epochs=given.finetune_epochs,
        data=str(train),
        test=str(test),
        out=str(out / "runs"),
        seeds=1,
        set=("log.page=false", "log.tensorboard=false", *given.set),
        finetune_set=("log.page=false", "log.tensorboard=false"),
    )
    show_choices(run_comparison(flags)["arms"], rates)


def tried_recipes(folder: Path, methods: list[str], kind: str, rates: tuple[str, ...]) -> dict[str, Path]:
    """Name of an arm -> its recipe, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    recipes = {f"{method}-{rate}": folder / f"{method}-{rate}.yaml" for method in methods for rate in rates}
    for name, path in recipes.items():
        method, rate = name.split("-", 1)
        base = kind if (method, kind) == ("idmm", "photos_cpu") else f"{method}_{kind}"
        path.write_text(dump_yaml({"base": base, "optimizer": {"lr_peak": float(rate)}}))
    return recipes


def show_choices(arms: list[Json], rates: tuple[str, ...]) -> None:
    """A row a method: the mean of its three figures for each rate, and the best rate."""
    score = {arm["arm"]: sum(arm[key]["mean"] for key in ("knn", "linear", "finetuned")) / 3 for arm in arms}
    table = Table("method", *rates, "best")
    for method in dict.fromkeys(name.split("-", 1)[0] for name in score):
        tries = {rate: score[f"{method}-{rate}"] for rate in rates}
        table.add_row(method, *(f"{mean:.1f}" for mean in tries.values()), max(tries, key=tries.get))
    show(table)


if __name__ == "__main__":
    main()
