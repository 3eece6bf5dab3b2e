"""All that memory and traffic of a run depend on, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.data.order import accumulation_steps
from vitds.errors import SettingsError
from vitds.heads.bytes import dense_parameters
from vitds.plan.activations import Stage

# DeepSpeed 0.19.8's own values of keys that a JSON may leave out, in numbers (not bytes).
BUCKETS = {"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 5e7, "stage3_max_live_parameters": 1e9}


def reduce_bucket(numbers: int) -> int:
    """`reduce_bucket_size` where a JSON leaves it out.

    On a GPU the bucket is there whole, so it need not be larger than all numbers that are trained.
    """
    return min(numbers, int(BUCKETS["reduce_bucket_size"]))


@dataclass(frozen=True)
class ModuleSizes:
    """What a run's engine owns, without its classifier.

    Attributes:
        trained: how many numbers each parameter that trains has, in order, by the part that it belongs to:
            the backbone, a projector.
        width: D of the backbone's features.
        stages: of the backbone, whose activations are counted; None if it has no formula.
        frozen: by part, how many numbers have weights and nothing else: a teacher's.
    """

    trained: dict[str, tuple[int, ...]]
    width: int
    stages: tuple[Stage, ...] | None
    frozen: dict[str, int] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        """All of them, trained and frozen."""
        return sum(map(sum, self.trained.values())) + sum(self.frozen.values())


@dataclass(frozen=True)
class Case:
    """One run on R ranks. Sizes are in numbers, not bytes, where not said otherwise.

    Attributes:
        sizes: of what the engine owns, without a classifier.
        settings: resolved.
        rows: of the classifier; 0: none.
        ranks: R.
        stage: of ZeRO.
        head: of each parameter of a head inside the engine; none with a sharded one.
        shard_rows: of a sharded head, the most that a rank holds.
        images: of a micro batch.
        accumulation: A, the micro batches of a step.
        weight: bytes of a weight in the engine.
        compute: bytes of a number in matrix products.
        offloads_states: whether masters and moments are in the host's memory.
        offloads_weights: whether the weights are.
        buckets: see BUCKETS.
        on_gpu: on a CPU memory that was allocated but never touched takes none, and the host's memory is the
            device's.
    """

    sizes: ModuleSizes
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
    def trained(self) -> dict[str, tuple[int, ...]]:
        """The numbers of each parameter that DeepSpeed trains, by part; a dense head is one of the parts."""
        # A sharded head is not among them: DeepSpeed never sees it.
        return self.sizes.trained | ({"dense head": self.head} if self.head else {})

    @property
    def engine(self) -> int:
        """All numbers that DeepSpeed trains."""
        return sum(sum(parameters) for parameters in self.trained.values())

    @property
    def weights(self) -> int:
        """All numbers of the engine."""
        return self.sizes.numbers + sum(self.head)

    @property
    def has_masters(self) -> bool:
        """Whether fp32 copies of the weights are kept: from stage 1 on, and always beside 2-byte weights."""
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
    # Called for its refusal: do the ranks divide the step at all?
    accumulation_steps(images, chunk_images=chunk, ranks=ranks, micro_images=chunk)
    # Chunks of a rank in a step; a micro batch takes a divisor of them.
    own = images // chunk // ranks
    return [chunk * m for m in range(1, own + 1) if own % m == 0]


def make_case(
    settings: Settings, ds: DsConfig, sizes: ModuleSizes, *, rows: int, ranks: int, on_gpu: bool
) -> Case:
    """The numbers of a run.

    Args:
        settings: resolved: no `auto` in engine.precision, batch.micro_images and head.kind.
        ds: the user's DeepSpeed JSON.
        sizes: of what the engine owns, without a classifier.
        rows: of the classifier: N, C, or 0 where there is none.
        ranks: R.
        on_gpu: see Case.
    Raises: SettingsError if the ranks or the micro batch do not divide the step, or a sharded head has fewer
        rows than ranks.
    """
    micro = settings.batch.micro_images
    # The run's own function, so the plan refuses what the run would refuse.
    accumulation = accumulation_steps(
        settings.batch.global_images,
        chunk_images=settings.batch.chunk_images,
        ranks=ranks,
        micro_images=micro,
    )
    is_sharded = settings.head.kind == "sharded"
    if is_sharded and rows < ranks:
        raise SettingsError(
            f"head.kind sharded: {rows} instances cannot be spread over {ranks} ranks; use dense"
        )
    # What decides the bytes of a weight and of a number in products: docs/plan.md, "The formulas".
    precision = settings.engine.precision
    # bf16 by autocast keeps fp32 weights; the JSON's block "bf16" makes the weights themselves bf16.
    has_small_weights = precision == "fp16" or ds.enabled_blocks() == ["bf16"]
    # Rows are counted once: inside the engine, or in shard_rows.
    head = dense_parameters(settings.head, rows, sizes.width) if rows and not is_sharded else ()
    # All that DeepSpeed reduces, by which its bucket is sized.
    trained = sum(map(sum, (*sizes.trained.values(), head)))
    return Case(
        sizes=sizes,
        settings=settings,
        rows=rows,
        ranks=ranks,
        stage=max(1, ds.zero_stage) if precision == "fp16" else ds.zero_stage,  # as engine/build.py does
        head=head,
        # The rank with the most rows decides.
        shard_rows=-(-rows // ranks) if is_sharded else 0,
        images=micro,
        accumulation=accumulation,
        weight=2 if has_small_weights else 4,
        compute=4 if precision == "fp32" else 2,
        offloads_states=ds.offloads_optimizer,
        offloads_weights=ds.offloads_parameters,
        buckets=_buckets(ds, trained),
        on_gpu=on_gpu,
    )


def _buckets(ds: DsConfig, trained: int) -> dict[str, int]:
    """The sizes that the JSON has, or what stands in for them where it has none."""
    zero = ds.values.get("zero_optimization", {})
    defaults = BUCKETS | {"reduce_bucket_size": reduce_bucket(trained)}
    # `auto` counts as left out.
    given = {key: zero[key] for key in defaults if zero.get(key, "auto") != "auto"}
    return {key: int(value) for key, value in (defaults | given).items()}
