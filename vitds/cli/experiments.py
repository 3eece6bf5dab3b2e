"""`vitds ablate`: many runs, one table."""

from __future__ import annotations

from vitds.config.experiment_flags import AblateFlags, CompareFlags, ReproduceFlags, TransferFlags
from vitds.words import takes


@takes(AblateFlags)
def ablate(flags: AblateFlags) -> None:
    """Take a pretraining apart: five arms, each with one part more, over seeds.

    The arms are: one view of the image at the fine-tuning's resolution; with label smoothing; at the recipe's
    lower resolution; with all its views; with its mixing, which is the whole recipe. Each pretrains,
    fine-tunes and is evaluated. The same command goes on where it was stopped; more seeds add runs.
    """
    from vitds.jobs.ablate import run_ablation
    from vitds.jobs.as_flags import as_flags

    with as_flags(ablate):
        run_ablation(flags)


@takes(CompareFlags)
def compare(flags: CompareFlags) -> None:
    """Compare pretraining methods at equal epochs, compute or minutes, over seeds.

    Each method pretrains by its own recipe for the given amount; all fine-tune by one recipe. One table: kNN,
    linear classifier, fine-tuned top-1. Recipes are those that suit the images and this machine. The same
    command goes on where it was stopped; more seeds add runs.
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.compare_methods import run_comparison

    with as_flags(compare):
        run_comparison(flags)


@takes(ReproduceFlags)
def reproduce(name: str, flags: ReproduceFlags) -> None:
    """Make a row of docs/results.md again, from the published files to the table.

    Builds the data, runs the row's stages with each seed, evaluates the last step on the official test
    images, and prints the result beside the stored row. Says what it needs and, after a few steps, when it
    will be done. The same command goes on where it was stopped; with --plan it stops when the data are built.

    Args:
        name: of the result: flowers
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.reproduce import run_reproduction

    with as_flags(reproduce):
        run_reproduction(name, flags)


@takes(TransferFlags)
def transfer(*runs: str, flags: TransferFlags) -> None:
    """Measure pretrained runs on other sets of images: a matrix of sources and targets.

    On each target: kNN and a linear classifier on the source's features, and fine-tuning from its weights.
    The first row is the same network with random weights. Runs whose names differ in their seed alone, as
    runs/a-seed0 and runs/a-seed1, are one source. The same command goes on where it was stopped.

    Args:
        runs: a finished run to begin from
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.transfer import run_transfer

    with as_flags(transfer):
        run_transfer(runs, flags)
