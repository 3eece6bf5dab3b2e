"""What the settings know of each method: its command, its own section, and which of the keys that not all
methods read it reads.

A method's code is vitds/methods/NAME.py. Its name stands there, here, in its recipes, tests and docs, and
nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from vitds.config.section import Count, Positive, Probability, Section

MethodName = Literal["idmm", "supervised", "simclr", "mocov3", "lejepa", "supcon", "dino", "mae"]
Command = Literal["pretrain", "finetune"]


class SimCLR(Section):
    """Two views of an image find each other among all views of their chunk (arXiv:2002.05709, 2006.10029)."""

    temperature: Annotated[float, Field(gt=0)] = 0.2
    layers: Annotated[int, Field(ge=2, le=3)] = 3
    hidden: Positive = 2048
    width: Positive = 128


class MoCoV3(Section):
    """As SimCLR, with the other views' features made by a slowly moving teacher (arXiv:2104.02057)."""

    temperature: Annotated[float, Field(gt=0)] = 0.2
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.99
    hidden: Positive = 4096
    width: Positive = 256


class LeJEPA(Section):
    """The views of an image have one feature, and features are normally distributed (arXiv:2511.08544).

    sigreg: share of the second in the loss.
    directions: along which it is tested.
    """

    sigreg: Probability = 0.05
    directions: Positive = 1024
    hidden: Positive = 2048
    width: Positive = 64


class SupCon(Section):
    """As SimCLR, but what a crop has to find are all crops of its class (arXiv:2004.11362)."""

    temperature: Annotated[float, Field(gt=0)] = 0.1
    width: Positive = 128


class DINO(Section):
    """A student tells which prototypes a slowly moving teacher chooses for other views (arXiv:2104.14294).

    hidden, width: of the projector's layers and of its output.
    teacher_temperature: from the first value to the second in `temperature_epochs`.
    frozen_epochs: in which the prototypes stay as they are; at most a tenth of the run, or one.
    """

    prototypes: Positive = 4096
    hidden: Positive = 2048
    width: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 0.1
    teacher_temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.04, 0.04)
    temperature_epochs: Count = 0
    momentum: Probability = 0.996
    centre_momentum: Probability = 0.9
    frozen_epochs: Count = 1


class MAE(Section):
    """A decoder paints the patches that backbone.patch_drop left out (arXiv:2111.06377).

    width, depth: of the decoder.
    """

    width: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    depth: Positive = 1


class MethodSections(Section):
    """The part of the settings tree that belongs to methods: which one, and each one's own section."""

    method: MethodName = "idmm"
    simclr: SimCLR = SimCLR()
    mocov3: MoCoV3 = MoCoV3()
    lejepa: LeJEPA = LeJEPA()
    supcon: SupCon = SupCon()
    dino: DINO = DINO()
    mae: MAE = MAE()


@dataclass(frozen=True)
class MethodFacts:
    """What is known of a method before any of its code is loaded.

    Attributes:
        command: which command trains it.
        reads: keys and sections that it reads, of those that not every method reads.
        groups: how many view groups it takes; None: any number.
        views: how many views of an image it takes over all groups; None: any number.
        least_views: as many views of an image it needs.
        couples: whether the images of a chunk see each other, so that a chunk of one image teaches nothing.
        teacher_sees: the views that a teacher looks at too.
        hides_patches: whether it needs patches that the backbone does not see.
        temperature: key of the temperature in its softmax over images, by cosine; None: it has none, or has
            rows instead.
        leaves_teacher: whether the result is the teacher, itself an average of weights.
    """

    command: Command
    reads: tuple[str, ...]
    groups: int | None = None
    views: int | None = None
    least_views: int = 1
    couples: bool = False
    teacher_sees: Literal["nothing", "first group", "all"] = "nothing"
    hides_patches: bool = False
    temperature: str | None = None
    leaves_teacher: bool = False


METHODS: dict[str, MethodFacts] = {
    "idmm": MethodFacts("pretrain", ("mix", "head")),
    "supervised": MethodFacts(
        "finetune",
        (
            *("mix", "head.kind", "head.bias", "head.label_smoothing", "head.lr_scale", "head.keep_mb"),
            "head.class_weight",
        ),
        groups=1,
    ),
    "simclr": MethodFacts("pretrain", ("simclr",), views=2, couples=True, temperature="simclr.temperature"),
    "mocov3": MethodFacts(
        "pretrain",
        ("mocov3",),
        views=2,
        couples=True,
        teacher_sees="all",
        temperature="mocov3.temperature",
    ),
    "lejepa": MethodFacts("pretrain", ("lejepa",), least_views=2, couples=True),
    "supcon": MethodFacts("pretrain", ("supcon",), views=2, couples=True, temperature="supcon.temperature"),
    "dino": MethodFacts(
        "pretrain", ("dino",), least_views=2, teacher_sees="first group", leaves_teacher=True
    ),
    "mae": MethodFacts("pretrain", ("mae",), hides_patches=True),
}
DEFAULT_METHODS: dict[str, MethodName] = {"pretrain": "idmm", "finetune": "supervised"}


def readers(key: str) -> list[str]:
    """The methods that read a dotted key; all of them where the key belongs to no method in particular."""
    special = {name: [part for part in facts.reads if _covers(part, key)] for name, facts in METHODS.items()}
    named = [name for name, parts in special.items() if parts]
    is_special = bool(named) or any(
        _covers(part.partition(".")[0], key) for facts in METHODS.values() for part in facts.reads
    )
    return named if is_special else list(METHODS)


def _covers(part: str, key: str) -> bool:
    return key == part or key.startswith(f"{part}.")
