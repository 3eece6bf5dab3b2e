"""The flags of the experiment commands; command line and jobs take these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ExperimentFlags:
    """What all experiments take.

    Args:
        seeds: runs of each training, with the seeds 0, 1, ...
        plan: print what would run, with steps and forward units, and stop
    """

    seeds: int = 3
    plan: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingsFlags(ExperimentFlags):
    """What experiments take that pretrain and fine-tune on one set of images.

    Args:
        data: the .beton file to train on, with labels
        test: the .beton file to evaluate on
        out: the folder of the runs and of the result
        finetune_epochs: of the fine-tuning (default its recipe's)
        set: a setting of every pretraining, as in --set batch.global_images=128; may be repeated
        finetune_set: likewise of every fine-tuning
    """

    data: str
    test: str
    out: str
    finetune_epochs: int | None = None
    set: tuple[str, ...] = ()
    finetune_set: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AblateFlags(TrainingsFlags):
    """What `vitds ablate` takes beside TrainingsFlags.

    Args:
        recipe: of the pretraining whose parts are taken away: a name from `vitds recipes`, or a YAML file
        finetune_recipe: of the fine-tuning, the same for all arms
        budget: equal epochs in all arms, or equal compute: as many epochs as cost what the whole recipe does
        epochs: of the pretraining (default the recipe's)
    """

    recipe: str
    finetune_recipe: str
    budget: Literal["epochs", "compute"] = "epochs"
    epochs: int | None = None


@dataclass(frozen=True, kw_only=True)
class CompareFlags(TrainingsFlags):
    """What `vitds compare` takes beside TrainingsFlags.

    Args:
        methods: of pretraining, with commas between; NAME=RECIPE for any recipe, under a name of your own;
            scratch is fine-tuning alone, with the budget of pretraining and fine-tuning together
        amount: of the budget, for each pretraining: epochs, forward units or minutes
        backbone: a timm model for all methods (default that of the recipes)
        budget: equal epochs, equal compute in forward units, or equal minutes by the speed of this machine
        finetune_recipe: of the fine-tuning (default the usual one for these images and this machine)
    """

    methods: str
    amount: float
    backbone: str | None = None
    budget: Literal["epochs", "compute", "minutes"] = "epochs"
    finetune_recipe: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReproduceFlags(ExperimentFlags):
    """What `vitds reproduce` takes beside the name of a result and ExperimentFlags.

    Args:
        cpu: the row that a CPU can make, in place of that of one GPU
        out: the folder of data, runs and result (default runs/ and the name of the row)
        source: a folder with the published files, as shipped or unpacked, or with train*.tar and test*.tar
            (default: they are fetched)
        toy: one epoch on two images a class, to try it anywhere; no result
    """

    cpu: bool = False
    out: str | None = None
    source: str | None = None
    toy: bool = False


@dataclass(frozen=True, kw_only=True)
class TransferFlags(ExperimentFlags):
    """What `vitds transfer` takes beside the runs and ExperimentFlags.

    Args:
        to: a target, NAME-train.beton with NAME-test.beton beside it, or digits; may be repeated
        out: the folder of the runs and of the result
        recipe: of the fine-tuning on every target
        epochs: of the fine-tuning (default its recipe's)
        set: a setting of every fine-tuning, as in --set optimizer.lr_peak=1e-4; may be repeated
    """

    to: tuple[str, ...]
    out: str
    recipe: str
    epochs: int | None = None
    set: tuple[str, ...] = ()
