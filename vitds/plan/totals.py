"""The plan of a run: its parts, its highest moment, in numbers and in one line."""

from __future__ import annotations

from dataclasses import dataclass

from vitds.plan.case import Case
from vitds.plan.memory import Part, memory_parts, sums

GB = 1e9

FEWER_CROPS = (
    "lower batch.micro_images (batch.chunk_images is the least), set engine.activation_checkpointing=true, "
    "or lower views.crop_px"
)
SMALLER_CHUNKS = "lower batch.chunk_images"
# The start of a part's name -> what makes it smaller; the last one fits all.
REMEDIES = {
    "activations": FEWER_CROPS,
    "gradients of activations": FEWER_CROPS,
    "crops": FEWER_CROPS,
    "similarities": SMALLER_CHUNKS,
    "gradients of similarities": SMALLER_CHUNKS,
    "head at work": "lower batch.micro_images",
    "sharded head": "start more ranks, or set head.optimizer=lean",
    "reduce_bucket_size": "lower zero_optimization.reduce_bucket_size in the DeepSpeed JSON",
    "": (
        "start more ranks with a higher ZeRO stage, as --ds_config zero3, or with zero2_offload or "
        "zero3_offload"
    ),
}


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank holds.

    Attributes:
        parts: on the device.
        moments: their sums at each of memory.MOMENTS, in bytes.
        host_parts: of a run on GPUs, in the host's memory.
        host: the highest sum of these, in bytes.
    """

    parts: tuple[Part, ...]
    moments: dict[str, int]
    host_parts: tuple[Part, ...] = ()
    host: int = 0

    @property
    def worst(self) -> str:
        """The moment at which the device's memory is highest."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def peak(self) -> int:
        """Bytes on the device at that moment."""
        return self.moments[self.worst]

    def line(self) -> str:
        """The peak and its largest parts, in GB."""
        # Four parts tell a person where the memory goes; `vitds plan` has all of them.
        largest = ", ".join(f"{part.name} {part.bytes / GB:.2f}" for part in self._at_worst()[:4])
        return f"{self.peak / GB:.2f} GB a rank, highest at the {self.worst} ({largest})"

    def remedy(self) -> str:
        """What makes the largest part smaller."""
        # The empty start, last in REMEDIES, fits every name.
        name = self._at_worst()[0].name
        return next(text for start, text in REMEDIES.items() if name.startswith(start))

    def _at_worst(self) -> list[Part]:
        """The parts at the worst moment, the largest first."""
        return sorted(
            (part for part in self.parts if self.worst in part.moments), key=lambda part: -part.bytes
        )


def plan_memory(case: Case) -> MemoryPlan:
    """All parts of a case and their sums."""
    parts = memory_parts(case)
    # On a CPU the host's memory is the device's, so all parts count together.
    on_host = tuple(part for part in parts if part.on_host and case.on_gpu)
    on_device = tuple(part for part in parts if part not in on_host)
    return MemoryPlan(on_device, sums(on_device), on_host, max(sums(on_host).values()))
