"""What `vitds fit` trains in the minutes that it has: which recipes, and how many epochs of each."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, replace

import torch

from vitds.config.deepspeed import load_ds_config
from vitds.config.flags import TrainFlags
from vitds.config.load import settings_of
from vitds.config.methods import Command
from vitds.data.beton import BetonFile
from vitds.data.order import steps_per_epoch
from vitds.engine.process import joined_ranks
from vitds.errors import UsageError
from vitds.jobs.data_files import training_files
from vitds.jobs.timed_steps import train_steps
from vitds.methods import method_class
from vitds.methods.base import SetSize

TIMED_STEPS = 8
# Crops of this side where so many epochs of the recipe's own, smaller side would fit (docs/results.md).
LARGE_PX, MANY_EPOCHS = 96, 100
SMALL_PX = 48  # sets whose median short side is at most this are seen whole, at their own size
# Start of a process and the page at its end; measured on two cores, where it is 12 to 20 s.
AROUND_A_STAGE_S = 20.0
FORWARD_SHARE = 1 / 3  # of the time of a training step, as evaluation needs
RESERVE = 0.97  # steps beside other work take a little longer than the few that were timed


@dataclass(frozen=True)
class Choice:
    """What is trained.

    Attributes:
        pretrain: a recipe's name; None for no pretraining.
        finetune: likewise; None where there are fewer than two classes.
        share: of the time, for the pretraining.
        settings: of both, as words for --set.
        reason: one line for the person.
    """

    pretrain: str | None
    finetune: str | None
    share: float
    settings: tuple[str, ...]
    reason: str

    @property
    def stages(self) -> dict[Command, tuple[str, float]]:
        """Command -> its recipe and its share of the time, in order."""
        both: dict[Command, tuple[str | None, float]] = {
            "pretrain": (self.pretrain, self.share),
            "finetune": (self.finetune, 1 - self.share),
        }
        return {command: (recipe, share) for command, (recipe, share) in both.items() if recipe is not None}


def choose(file: BetonFile, *, on_gpu: bool) -> Choice:
    """The recipes for a training set and this machine. docs/results.md has the measurements behind it."""
    side = file.typical_side_px
    patch = 16 if on_gpu else 8  # the GPU's recipes cut crops into patches of 16 pixels
    settings = (f"views.crop_px={max(32, side // patch * patch)}",) if side <= SMALL_PX else ()
    if len(file.manifest.classes) < 2:
        # Of a processor's minutes DIET makes more than IDMM: twice the epochs.
        recipe = "idmm_deit_tiny" if on_gpu else "diet_photos_cpu"
        why = "one class alone" if file.manifest.classes else "no labels"
        return Choice(recipe, None, 1.0, settings, f"{why}: pretraining alone")
    if on_gpu:
        why = "a GPU: the paper's recipe, a half of the time for each stage (not measured on a GPU yet)"
        return Choice("idmm_deit_tiny", "finetune_deit_tiny_224", 0.5, settings, why)
    why = (
        "no GPU: all of the time trains a narrow ResNet-18 on the labels, which in minutes of a processor "
        "gives more than pretraining (docs/results.md)"
    )
    if file.manifest.unlabelled:
        why += f"; the {file.manifest.unlabelled:,} images without a label are left out"
    return Choice(None, "finetune_photos_cpu", 0.0, settings, why)


def with_larger_crops(choice: Choice, file: BetonFile, epochs: int) -> Choice:
    """The same at a larger side, where there is the time for it and the images have the pixels.

    Args:
        choice: of a training on the labels alone, else it stays as it is.
        file: the training images.
        epochs: at the recipe's own side, that fit the time.
    """
    is_small = file.typical_side_px < LARGE_PX or choice.settings
    if choice.pretrain or not choice.finetune or is_small or epochs < MANY_EPOCHS:
        return choice
    why = f"there is time for {epochs} epochs of its small crops: crops of {LARGE_PX} px are worth more then"
    return replace(choice, settings=(f"views.crop_px={LARGE_PX}",), reason=why)


@dataclass(frozen=True)
class Speed:
    """Seconds of one epoch, and of what comes with a stage however long it is."""

    epoch_s: float
    around_s: float

    def epochs_in(self, seconds: float) -> int:
        """How many fill the time; 0 if not even one does."""
        return max(0, int((seconds - self.around_s) * RESERVE / self.epoch_s))

    def seconds_of(self, epochs: int) -> float:
        """Of a whole stage."""
        return self.around_s + epochs * self.epoch_s


def measure(
    command: Command, recipe: str, settings: tuple[str, ...], train: BetonFile, test: BetonFile | None
) -> Speed:
    """Time a few steps of a stage on its own images, in a folder that is removed again."""
    # Nothing is evaluated along these steps.
    quiet = ("eval.every_epochs=0", "eval.hold_out=0", "eval.choose=last")
    flags = TrainFlags(recipe=recipe, data=str(train.path), set=(*settings, *quiet))
    given = settings_of(command, flags)
    if given.engine.compile == "auto":
        # It weighs the length of the run, which is not known yet. One that is compiled later ends sooner.
        given = given.model_copy(update={"engine": given.engine.model_copy(update={"compile": "off"})})
    file, _ = training_files(given)  # of labelled images alone, where it needs labels
    head = given.head.model_copy(update={"init": "noise"})  # else all features would be computed first
    given = given.model_copy(update={"head": head})
    rows = method_class(given.method).rows(SetSize(file.images, len(file.manifest.classes)))
    with joined_ranks() as device:
        timed = train_steps(given, load_ds_config(None), file, rows, device, steps=TIMED_STEPS)
    if torch.cuda.is_available():  # the stages are processes of their own, and want the memory
        gc.collect()
        torch.cuda.empty_cache()
    step_s = statistics.median(timed.whole_s[2:])  # the first ones fill caches
    batch = given.batch.global_images
    evaluated = 0 if test is None else test.images + (train.images if command == "pretrain" else 0)
    evaluation_s = evaluated / (batch * given.views.count) * step_s * FORWARD_SHARE
    return Speed(steps_per_epoch(file.images, batch) * step_s, AROUND_A_STAGE_S + evaluation_s)


def fill(shares: dict[Command, float], speeds: dict[Command, Speed], seconds: float) -> dict[Command, int]:
    """Epochs of each stage that fill the time.

    Args:
        shares: of the time; only their ratios count.
        speeds: of each stage.
        seconds: for all stages.
    Raises: UsageError if it is too short for an epoch of each (says how long would do).
    """
    whole = sum(shares.values())
    epochs = {
        command: speeds[command].epochs_in(seconds * share / whole) for command, share in shares.items()
    }
    if not all(epochs.values()):
        needed = max(
            (speeds[command].around_s + speeds[command].epoch_s / RESERVE) * whole / share
            for command, share in shares.items()
        )
        raise UsageError(
            f"`minutes`: {max(0, seconds) / 60:.1f} of them are left, and one epoch of each stage, with its "
            f"start and evaluation, takes {needed / 60:.1f} here. Give at least "
            f"{max(0.1, (needed - seconds) / 60 + 0.05):.1f} more, or fewer images."
        )
    return epochs
