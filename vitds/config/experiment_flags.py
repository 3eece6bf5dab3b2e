"""The flags of the experiment commands; command line and jobs take these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AblateFlags:
    """What `vitds ablate` takes.

    Args:
        data: the .beton file to train on, with labels
        test: the .beton file to evaluate on
        out: the folder of the runs and of the result
        recipe: of the pretraining whose parts are taken away: a name from `vitds recipes`, or a YAML file
        finetune_recipe: of the fine-tuning, the same for all arms
        seeds: runs of each arm, with the seeds 0, 1, ...
        budget: equal epochs in all arms, or equal compute: as many epochs as cost what the whole recipe does
        epochs: of the pretraining (default the recipe's)
        finetune_epochs: of the fine-tuning (default its recipe's)
        set: a setting of every pretraining, as in --set batch.global_images=128; may be repeated
        finetune_set: likewise of every fine-tuning
        plan: print what would run, with steps and forward units, and stop
    """

    data: str
    test: str
    out: str
    recipe: str
    finetune_recipe: str
    seeds: int = 3
    budget: Literal["epochs", "compute"] = "epochs"
    epochs: int | None = None
    finetune_epochs: int | None = None
    set: tuple[str, ...] = ()
    finetune_set: tuple[str, ...] = ()
    plan: bool = False


@dataclass(frozen=True)
class CompareFlags:
    """What `vitds compare` takes.

    Args:
        data: the .beton file to train on, with labels
        test: the .beton file to evaluate on
        out: the folder of the runs and of the result
        methods: of pretraining, with commas between; METHOD=RECIPE for a recipe other than the usual one;
            scratch is fine-tuning alone, with the budget of pretraining and fine-tuning together
        amount: of the budget, for each pretraining: epochs, forward units or minutes
        backbone: a timm model for all methods (default that of the recipes)
        budget: equal epochs, equal compute in forward units, or equal minutes by the speed of this machine
        finetune_recipe: of the fine-tuning (default the usual one for these images and this machine)
        finetune_epochs: of the fine-tuning (default its recipe's)
        seeds: runs of each arm, with the seeds 0, 1, ...
        set: a setting of every pretraining, as in --set batch.global_images=128; may be repeated
        finetune_set: likewise of every fine-tuning
        plan: print what would run, with steps and forward units, and stop
    """

    data: str
    test: str
    out: str
    methods: str
    amount: float
    backbone: str | None = None
    budget: Literal["epochs", "compute", "minutes"] = "epochs"
    finetune_recipe: str | None = None
    finetune_epochs: int | None = None
    seeds: int = 3
    set: tuple[str, ...] = ()
    finetune_set: tuple[str, ...] = ()
    plan: bool = False


@dataclass(frozen=True)
class ReproduceFlags:
    """What `vitds reproduce` takes beside the name of a result.

    Args:
        cpu: the row that a CPU can make, in place of that of one GPU
        out: the folder of data, runs and result (default runs/ and the name of the row)
        source: a folder with the published files, as shipped or unpacked, or with train*.tar and test*.tar
            (default: they are fetched)
        seeds: runs, with the seeds 0, 1, ...
        toy: one epoch on two images a class, to try it anywhere; no result
        plan: build the data, print what would run and what it needs, and stop
    """

    cpu: bool = False
    out: str | None = None
    source: str | None = None
    seeds: int = 3
    toy: bool = False
    plan: bool = False


@dataclass(frozen=True)
class TransferFlags:
    """What `vitds transfer` takes beside the runs.

    Args:
        to: a target, NAME-train.beton with NAME-test.beton beside it, or digits; may be repeated
        out: the folder of the runs and of the result
        recipe: of the fine-tuning on every target
        epochs: of the fine-tuning (default its recipe's)
        seeds: fine-tunings of each source on each target, with the seeds 0, 1, ...
        set: a setting of every fine-tuning, as in --set optimizer.lr_peak=1e-4; may be repeated
        plan: print what would run, with steps and forward units, and stop
    """

    to: tuple[str, ...]
    out: str
    recipe: str
    epochs: int | None = None
    seeds: int = 3
    set: tuple[str, ...] = ()
    plan: bool = False
