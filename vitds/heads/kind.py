"""Dense or sharded: which kind of instance head a run gets, and why."""

from __future__ import annotations

from vitds.config.tree import Head

DENSE_WEIGHT_BYTES = (
    64 << 20
)  # a dense head's gradient is all-reduced each step; above this features are cheaper to send


def resolve_head(head: Head, rows: int, width: int) -> str:
    """`dense` while the head is small beside the backbone's traffic, `sharded` above.

    It is also sharded for what only that kind can do. Both kinds give the same loss.
    """
    if head.kind != "auto":
        return head.kind
    # 4 bytes: rows and their gradients are counted in float32.
    return "dense" if rows * width * 4 <= DENSE_WEIGHT_BYTES and not head.needs_shards else "sharded"


def head_reason(head: Head, rows: int, width: int) -> str:
    """What speaks for the kind that `auto` gives, for the line at a run's start."""
    if head.needs_shards:
        return "sharded for its optimizer or its sample_rate"
    return f"{rows * width * 4 / 1e6:,.1f} MB of rows; auto is dense up to {DENSE_WEIGHT_BYTES / 1e6:.0f} MB"
