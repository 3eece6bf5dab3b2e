"""What heads take on one rank, from sizes alone: `vitds plan` asks before anything is built.

Each function names the code that it counts: a change there is a change here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vitds.config.tree import Head
from vitds.heads.tiles import CPU_TILE_NUMBERS, IN_PLACE_BYTES, in_place_row_bytes

FLOAT = 4  # bytes of a float32 number


class ShardBytes(NamedTuple):
    """The rows of a sharded head on one rank.

    Attributes:
        weight: with the biases.
        gradient: of all rows; lazy rows have none.
        moments: the optimizer's, and the number of steps that each lazy row has seen.
        in_play: of sampled rows, copies in float32 and their gradients, from the forward pass to the update.
    """

    weight: int
    gradient: int
    moments: int
    in_play: int


class Activations(NamedTuple):
    """What a part of the loss takes between its forward pass and its backward pass.

    Attributes:
        kept: bytes from the one to the other.
        passing: bytes on top while its own backward pass runs.
    """

    kept: int
    passing: int


def dense_parameters(head: Head, rows: int, width: int) -> tuple[int, ...]:
    """How many numbers each parameter of a DenseHead has."""
    return (rows * width, rows) if head.bias else (rows * width,)


def rows_in_play(head: Head, rows: int, crops: int) -> int:
    """The most rows that a micro step takes of those of a rank: the drawn ones, and two targets a crop.

    Args:
        head: its settings.
        rows: of the rank.
        crops: of all ranks.
    """
    return min(rows, int(rows * head.sample_rate) + 2 * crops)


def shard_bytes(head: Head, rows: int, width: int, crops: int) -> ShardBytes:
    """Bytes of a ShardedHead (sharded.py), its optimizer (optimizer.py) and its lazy rows (lazy.py).

    Args:
        head: its settings.
        rows: that the rank holds.
        width: D.
        crops: of a micro batch of all ranks.
    """
    a_row = width + head.bias
    weight = rows * (width * (2 if head.row_dtype == "bf16" else FLOAT) + FLOAT * head.bias)
    moments = 2 * FLOAT * a_row
    if head.optimizer == "lean":
        # A first moment in bfloat16 of each number, and a second one of the row and one of its bias.
        moments = 2 * a_row + FLOAT * (1 + head.bias)
    # An int32 a row: how many steps it has had.
    seen = 4 * head.lazy
    # The float32 copy of each row in play, and its gradient.
    copies = 2 * FLOAT * a_row * rows_in_play(head, rows, crops)
    return ShardBytes(
        weight=weight,
        gradient=0 if head.lazy else weight,
        moments=rows * (moments + seen),
        in_play=copies if head.sample_rate < 1 else 0,
    )


def work_bytes(head: Head, rows: int, width: int, crops: int, *, product: int, on_gpu: bool) -> int:
    """What either kind of head needs while it works (logsumexp.py, on a GPU in_place.py), beside its rows and
    their gradient.

    Args:
        head: its settings.
        rows: that take part on this rank.
        width: D.
        crops: that it sees: of all ranks where it is sharded.
        product: bytes of a number in matrix products.
        on_gpu: where tiles are larger.
    """
    logits = crops * rows * product
    # A tile has sqrt(rows) rows or more, so there are sqrt(rows) tiles at the most.
    if logits > head.keep_mb << 20 and on_gpu:
        tile = in_place_row_bytes(crops, width, product, head.cosine) * rows**0.5
        logits = int(max(IN_PLACE_BYTES, tile))
    elif logits > head.keep_mb << 20:
        # Its logits lie there in both dtypes, and each tile leaves five numbers a crop over both passes.
        tile = max(CPU_TILE_NUMBERS[product], crops * rows**0.5)
        logits = int(2 * tile + 5 * crops * rows**0.5) * FLOAT
    # The features, two targets' rows for each, the gradients of these three, and two copies on the way.
    return 8 * FLOAT * crops * width + logits


def projector_bytes(widths: Sequence[int], crops: int, *, product: int, last_scales: bool) -> Activations:
    """Of a Projector (projector.py).

    Args:
        widths: of the input, the hidden layers and the output.
        crops: of a micro batch.
        product: bytes of a number in matrix products.
        last_scales: whether the last norm has a scale, which needs the normalised numbers.
    """
    first, *hidden, last = widths
    # Of a hidden number: less the mean, normalised, after ReLU, and once more where it is cast.
    of_hidden = 3 * FLOAT + (product if product < FLOAT else 0)
    kept = first * product + sum(hidden) * of_hidden + last * FLOAT * (2 if last_scales else 1)
    # The backward pass of a norm has three numbers more on the way.
    return Activations(crops * kept, crops * 3 * FLOAT * max(hidden))


def contrast_bytes(pairs: int, crops: int, width: int, *, marks: int = 1) -> Activations:
    """Of a contrastive loss (contrast.py).

    Args:
        pairs: of crops that are compared.
        crops: of a micro batch.
        width: of what is compared.
        marks: of each pair: whether it counts, whether it is wanted.
    """
    # A similarity and its marks; what is compared, as it came and of length one.
    kept = pairs * (FLOAT + marks) + 2 * FLOAT * crops * width
    # While its gradient is made a similarity has three numbers more.
    return Activations(kept, pairs * 3 * FLOAT)
