"""All that memory and traffic of a run depend on, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.data.order import accumulation_steps
from vitds.errors import SettingsError
from vitds.plan.vit import Vit

# DeepSpeed 0.19.8's own values of keys that a JSON may leave out, in numbers (not bytes).
BUCKETS = {"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 5e7, "stage3_max_live_parameters": 1e9}


def reduce_bucket(numbers: int) -> int:
    """`reduce_bucket_size` where a JSON leaves it out: all numbers that are trained, for on a GPU the bucket is there whole."""
    return min(numbers, int(BUCKETS["reduce_bucket_size"]))


@dataclass(frozen=True)
class BackboneSizes:
    """What of a backbone enters.

    Attributes:
        parameters: how many numbers each has that trains, in order. width: D. vit: its form, None if it is no plain Vision Transformer.
        frozen: numbers that have weights and nothing else.
    """

    parameters: tuple[int, ...]
    width: int
    vit: Vit | None
    frozen: int = 0


@dataclass(frozen=True)
class Case:
    """One run on R ranks. Sizes are in numbers, not bytes, where not said otherwise.

    Attributes:
        head: of each parameter of a head inside the engine, none with a sharded one. shard_rows: of a sharded head, the most a rank holds.
        images: of a micro batch. weight, compute: bytes of a weight in the engine, and of a number in matrix products.
        on_gpu: on a CPU memory that was allocated but never touched takes none, and the host's memory is the device's.
    """

    backbone: BackboneSizes
    settings: Settings
    rows: int
    ranks: int
    stage: int
    head: tuple[int, ...]
    shard_rows: int
    images: int
    accumulation: int
    weight: int
    compute: int
    offloads_states: bool
    offloads_weights: bool
    buckets: dict[str, int]
    on_gpu: bool

    @property
    def crops(self) -> int:
        """M, the crops of a micro batch on one rank."""
        return self.images * self.settings.views.count

    @property
    def engine(self) -> int:
        """All that DeepSpeed trains: the backbone's numbers and a dense head's."""
        return sum(self.backbone.parameters) + sum(self.head)

    @property
    def weights(self) -> int:
        """All that passes forward: these and the frozen."""
        return self.engine + self.backbone.frozen

    @property
    def has_masters(self) -> bool:
        """Whether fp32 copies of the weights are kept beside them: at every stage but 0, and always beside 2-byte weights."""
        return self.stage > 0 or self.weight == 2

    @property
    def is_autocast(self) -> bool:
        """bf16 products of fp32 weights."""
        return self.weight > self.compute


def micro_choices(settings: Settings, ranks: int) -> list[int]:
    """Images that a micro batch may have, the fewest first.

    Raises: SettingsError if the ranks do not divide the step.
    """
    images, chunk = settings.batch.global_images, settings.batch.chunk_images
    accumulation_steps(images, chunk_images=chunk, ranks=ranks, micro_images=chunk)
    own = images // chunk // ranks
    return [chunk * m for m in range(1, own + 1) if own % m == 0]


def make_case(
    settings: Settings, ds: DsConfig, backbone: BackboneSizes, *, rows: int, ranks: int, on_gpu: bool
) -> Case:
    """The numbers of a run.

    Args:
        settings: resolved: no `auto` in engine.precision, batch.micro_images and head.kind. rows: N or C.
    Raises: SettingsError if the ranks or the micro batch do not divide the step, or a sharded head has fewer rows than ranks.
    """
    micro = settings.batch.micro_images
    chunk = settings.batch.chunk_images
    accumulation = accumulation_steps(
        settings.batch.global_images, chunk_images=chunk, ranks=ranks, micro_images=micro
    )
    is_sharded = settings.head.kind == "sharded"
    if is_sharded and rows < ranks:
        raise SettingsError(
            f"head.kind sharded: {rows} instances cannot be spread over {ranks} ranks; use dense"
        )
    precision = settings.engine.precision
    has_small_weights = precision == "fp16" or ds.enabled_blocks() == ["bf16"]
    zero = ds.values.get("zero_optimization", {})
    head_numbers = () if is_sharded else (rows * backbone.width, *[rows] * settings.head.bias)
    defaults = BUCKETS | {"reduce_bucket_size": reduce_bucket(sum(backbone.parameters) + sum(head_numbers))}
    return Case(
        backbone=backbone,
        settings=settings,
        rows=rows,
        ranks=ranks,
        stage=ds.zero_stage,
        head=head_numbers,
        shard_rows=-(-rows // ranks) if is_sharded else 0,
        images=micro,
        accumulation=accumulation,
        weight=2 if has_small_weights else 4,
        compute=4 if precision == "fp32" else 2,
        offloads_states=ds.offloads_optimizer,
        offloads_weights=ds.offloads_parameters,
        buckets={
            key: int(value if zero.get(key, "auto") == "auto" else zero[key])
            for key, value in defaults.items()
        },
        on_gpu=on_gpu,
    )
