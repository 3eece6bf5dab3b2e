"""The settings tree: everything that decides a run's numbers, typed, checked and frozen.

A recipe is this tree as YAML. `load.py` merges a recipe with flags; the result is saved as RUN/settings.yaml.
Nothing here reads the disk. An `auto` is resolved once, at the run's first start, and saved as resolved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from vitds.config.methods import METHODS, MethodSections
from vitds.config.section import Count, Positive, Probability, Section

Deviation = Annotated[float, Field(gt=0)]


class ViewGroup(Section):
    """Crops that share an area range.

    A probability that is given here stands in place of the one in `views`.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    views: Positive = 1
    scale: tuple[float, float] = (0.08, 1.0)
    flip: Probability | None = None
    colour: Probability | None = None
    grey: Probability | None = None
    blur: Probability | None = None
    solarise: Probability | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, inner: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in inner(self).items() if value is not None}

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"must satisfy 0 < low <= high <= 1, got {list(scale)}")
        return scale


class Views(Section):
    """How an image becomes crops: random-resized crop, flip, colour, grey, blur, solarise, policy; all on
    the host, as uint8."""

    crop_px: Positive = 112
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    groups: Annotated[tuple[ViewGroup, ...], Field(min_length=1)] = (ViewGroup(name="train"),)
    flip: Probability = 0.5
    colour: Probability = 0.0
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grey: Probability = 0.0
    blur: Probability = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: Probability = 0.0
    policy: Literal["none", "randaugment"] = "none"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)

    @field_validator("groups")
    @classmethod
    def _distinct_names(cls, groups: tuple[ViewGroup, ...]) -> tuple[ViewGroup, ...]:
        names = [group.name for group in groups]
        if len(set(names)) < len(names):
            raise ValueError(f"group names must differ, got {names}")
        return groups

    @field_validator("blur_sigma")
    @classmethod
    def _ordered(cls, sigma: tuple[float, float]) -> tuple[float, float]:
        if not 0 < sigma[0] <= sigma[1] <= 4:
            raise ValueError(f"must satisfy 0 < low <= high <= 4 pixels, got {list(sigma)}")
        return sigma

    @property
    def count(self) -> int:
        """V, the views of one image."""
        return sum(group.views for group in self.groups)

    def of_each_view(self, name: str) -> list[float]:
        """The probability `name` (flip, colour, grey, blur or solarise) of each of the V views: its group's
        own, or that of all."""
        own = {group.name: getattr(group, name) for group in self.groups}
        chosen = {group: getattr(self, name) if value is None else value for group, value in own.items()}
        return [chosen[group.name] for group in self.groups for _ in range(group.views)]


class Data(Section):
    """Which files, and how they are read.

    train: one, or a list of several that make one set.
    """

    train: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    test: str | None = None
    workers: Literal["auto"] | Positive = "auto"
    order: Literal["random", "pages"] = "random"
    damaged: Literal["fatal", "skip"] = "fatal"

    @property
    def train_files(self) -> tuple[str, ...]:
        """The training files by name; () where none is named."""
        return (self.train,) if isinstance(self.train, str) else self.train or ()

    @property
    def train_text(self) -> str | None:
        """Them in a message or a table."""
        return " + ".join(self.train_files) or None

    @property
    def threads(self) -> int:
        """Of the loader; 1 where `auto` is not resolved, as in a plan or a preview, which train nothing."""
        return 1 if self.workers == "auto" else self.workers


class Mix(Section):
    """Mixing of images and targets, one draw a chunk and group.

    kind `alternate`: mixup in even epochs, CutMix in odd ones.
    """

    kind: Literal["none", "cutmix", "mixup", "alternate"] = "cutmix"
    alpha: Annotated[float, Field(gt=0)] = 0.5


class Backbone(Section):
    """A timm model. `options` go to timm.create_model as they are (patch_size, embed_dim, depth, ...).

    frozen: parts that keep their first weights, as their parameters' names begin: patch_embed, blocks.0,
        cls_token.
    """

    name: str = "deit_tiny_patch16_224"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    patch_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    options: dict[str, Any] = {}
    frozen: tuple[str, ...] = ()


class Head(Section):
    """The classifier: N instances in pretraining, C classes in fine-tuning."""

    kind: Literal["auto", "dense", "sharded"] = "auto"
    bias: bool = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    cosine: bool = False
    temperature: Annotated[float, Field(gt=0)] = 0.1
    optimizer: Literal["adamw", "lean"] = "adamw"
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    init: Literal["noise", "features"] = "noise"
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    lazy: bool = False
    row_dtype: Literal["fp32", "bf16"] = "fp32"
    class_weight: Literal["none", "balanced"] = "none"
    keep_mb: Annotated[int, Field(ge=0)] = 64

    @model_validator(mode="after")
    def _is_sharded_where_it_must_be(self) -> Head:
        if self.needs_shards and self.kind == "dense":
            wanted = "optimizer lean" if self.optimizer == "lean" else f"sample_rate {self.sample_rate:g}"
            raise ValueError(f"{wanted} is for a sharded head, got kind dense; set kind to sharded or auto")
        if self.lazy and self.sample_rate == 1:
            raise ValueError(
                "lazy is for sampled negatives, but with sample_rate 1 every row is in play in each step; "
                "set one of them"
            )
        if self.row_dtype == "bf16" and self.optimizer != "lean":
            raise ValueError(
                f"row_dtype bf16 needs the lean optimizer, which rounds rows by chance, got optimizer "
                f"{self.optimizer}"
            )
        return self

    @property
    def needs_shards(self) -> bool:
        """Whether something is wanted that only a head outside the engine can do."""
        return self.optimizer == "lean" or self.sample_rate < 1

    @property
    def form(self) -> dict[str, Any]:
        """What either kind of head is built with; temperature is None where the head is linear."""
        temperature = self.temperature if self.cosine else None
        kept = {"keep_bytes": self.keep_mb << 20}
        return {"bias": self.bias, "label_smoothing": self.label_smoothing, "temperature": temperature} | kept


class Batch(Section):
    """G images a step, cut into chunks; the micro batch is what one rank puts through the backbone at once.

    Whatever lets one image see another happens within a chunk: CutMix partners, negatives, statistics of a
    projector.
    """

    global_images: Positive = 256
    chunk_images: Positive = 64
    micro_images: Literal["auto"] | Positive = "auto"


class Optimizer(Section):
    """How the weights of the engine move.

    kind: AdamW for all of them, Muon for the matrices, at the same rate, or SGD with Nesterov's momentum of
        0.9, which wants a rate a hundred times as large.
    weight_decay_end: to which the weight decay goes by a cosine; None: it stays.
    decay: the weight decay is of all parameters, as in the paper's code, or of those with two dimensions and
        more.
    """

    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    lr_peak: Annotated[float, Field(gt=0, le=1e30)] = 5e-4  # float32 holds no step of more
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    decay: Literal["all", "matrices"] = "all"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Schedule(Section):
    """Linear warm-up from 0, then a cosine to 0, a value a step.

    The warm-up is at most a tenth of the run.
    """

    warmup_epochs: Annotated[float, Field(ge=0)] = 2.0


class Engine(Section):
    """How the numbers are computed; `auto` is resolved at the first start of a run."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "torch", "flash", "efficient", "cudnn", "math"] = "auto"
    activation_checkpointing: bool = False
    deterministic: bool = False


class Checkpoint(Section):
    """When to save; 0 switches a rule off. The end of a run is always saved."""

    every_steps: Count = 0
    every_epochs: Count = 0
    every_minutes: Annotated[float, Field(ge=0)] = 10.0
    keep: Positive = 2
    keep_every_steps: Count = 0


class Eval(Section):
    """Probes during training (0: never), and evaluation at the end of a run.

    hold_out: the share of each class's training images that is not trained on, but measured along training.
    choose: the epoch whose weights are the run's result: the last, or the best on the images held out.
    """

    every_epochs: Count = 0
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    choose: Literal["last", "best"] = "last"
    batch_images: Positive = 256
    knn_k: Annotated[tuple[Positive, ...], Field(min_length=1)] = (10, 20, 100, 200)

    @model_validator(mode="after")
    def _measures_what_is_held_out(self) -> Eval:
        if self.hold_out and not self.every_epochs:
            raise ValueError(
                f"hold_out {self.hold_out:g} takes images out of training to measure accuracy along it, but "
                "every_epochs is 0, never; set every_epochs too, or leave hold_out out"
            )
        if self.choose == "best" and not self.hold_out:
            raise ValueError(
                "choose best needs images to choose by, neither trained on nor tested on; set hold_out"
            )
        return self


class Log(Section):
    """What is shown beside metrics.jsonl, which always has every step.

    page: RUN/report.html, at the end of the run.
    """

    tensorboard: bool = True
    page: bool = True


class Settings(MethodSections):
    """A run, whole."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    epochs: Positive = 100
    init: str | None = None
    data: Data = Data()
    views: Views = Views()
    mix: Mix = Mix()
    backbone: Backbone = Backbone()
    head: Head = Head()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()

    @model_validator(mode="after")
    def _chunks_divide(self) -> Settings:
        images, chunk = self.batch.global_images, self.batch.chunk_images
        if images % chunk:
            fits = [k for k in range(1, images + 1) if images % k == 0]
            raise ValueError(
                f"batch.global_images {images} is not a multiple of batch.chunk_images {chunk}; chunk_images "
                f"may be {fits}"
            )
        micro = self.batch.micro_images
        if micro != "auto" and (micro % chunk or images % micro):
            fits = [k for k in range(chunk, images + 1, chunk) if images % k == 0]
            raise ValueError(
                f"batch.micro_images {micro} must be whole chunks of {chunk} images that divide {images}; it "
                f"may be {fits}"
            )
        return self

    @model_validator(mode="after")
    def _measures_an_epoch_to_choose(self) -> Settings:
        if self.eval.choose == "best" and self.eval.every_epochs > self.epochs:
            raise ValueError(
                f"eval.choose best: of {self.epochs} epochs none is measured with eval.every_epochs "
                f"{self.eval.every_epochs}"
            )
        return self

    @model_validator(mode="after")
    def _lazy_rows_decay_evenly(self) -> Settings:
        if self.head.lazy and self.optimizer.weight_decay_end is not None:
            raise ValueError(
                "optimizer.weight_decay_end: rows that head.lazy leaves out make up for steps of one weight "
                "decay; leave one of the two out"
            )
        if self.head.lazy and self.head.bias and self.optimizer.decay == "matrices":
            raise ValueError(
                "optimizer.decay: rows that head.lazy leaves out make up for the weight decay of all their "
                "numbers; set it to all, or head.bias=false"
            )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Settings:
        facts, groups, views = METHODS[self.method], len(self.views.groups), self.views.count
        if facts.groups not in (None, groups):
            raise ValueError(f"views.groups: method {self.method} takes {facts.groups} group, got {groups}")
        if facts.views not in (None, views):
            raise ValueError(
                f"views.groups: method {self.method} takes {facts.views} views of an image in all, got "
                f"{views}"
            )
        if views < facts.least_views:
            raise ValueError(
                f"views.groups: method {self.method} compares the views of an image, so it needs "
                f"{facts.least_views} or more, got {views}"
            )
        for_classes = {
            "head.class_weight": self.head.class_weight != "none",
            "eval.hold_out": self.eval.hold_out,
        }
        if facts.command != "finetune" and (given := [key for key, is_set in for_classes.items() if is_set]):
            raise ValueError(f"{given[0]}: is for fine-tuning; method {self.method} trains no class head")
        if facts.hides_patches and not self.backbone.patch_drop:
            raise ValueError(
                f"backbone.patch_drop: method {self.method} paints the patches that are left out, so it "
                "needs more than 0, got 0; timm's vit_ and deit_ models take it"
            )
        if self.optimizer.kind == "sgd" and "head" in facts.reads and self.head.kind != "dense":
            raise ValueError(
                f"optimizer.kind: rows of a sharded head move by AdamW, which has other rates than sgd; set "
                f"head.kind=dense, got {self.head.kind}"
            )
        if facts.leaves_teacher and self.optimizer.average_decay:
            raise ValueError(
                f"optimizer.average_decay: the result of method {self.method} is its teacher, an average of "
                f"weights already; set {self.method}.momentum"
            )
        if "mix" in facts.reads and self.mix.kind != "none" and self.batch.chunk_images < 2:
            raise ValueError(
                f"batch.chunk_images: {self.mix.kind} mixes the images of a chunk, so it needs 2 or more, "
                "got 1; or set mix.kind=none"
            )
        if facts.couples and self.batch.chunk_images < 2:
            raise ValueError(
                f"batch.chunk_images: method {self.method} compares the images of a chunk, so it needs 2 or "
                f"more, got 1"
            )
        return self
