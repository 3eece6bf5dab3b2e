"""Bytes that one rank hands to collectives in a step, by kind; tests/plan/test_traffic.py counts them."""

from __future__ import annotations

from vitds.heads.sharded import bytes_sent
from vitds.plan.case import Case


def step_traffic(case: Case) -> dict[str, int]:
    """Kind -> bytes that a rank gives in a step, whatever its collectives make of them; nothing on one rank.

    Under autocast stages 1 to 3 send gradients in bf16, and stage 3 gathers weights in bf16. (Norms and
    biases stay float32, but are few: they are counted as the rest.)
    """
    p = case.engine
    ranks = case.ranks
    micro_steps = case.accumulation
    if ranks == 1:
        return {}
    sent = case.weight if case.stage == 0 else case.compute
    # From stage 2 on each micro step reduces; before, only the last of a step.
    traffic = {"gradients reduced": p * sent * (micro_steps if case.stage >= 2 else 1)}
    # A rank gives the share that it updated.
    if case.stage in (1, 2):
        traffic["updated weights gathered"] = p * case.weight // ranks
    if case.stage == 3:
        # Once for forward and backward together, while all weights may be live at a time; else once for each.
        passes = 1 if case.weights <= case.buckets["stage3_max_live_parameters"] else 2
        traffic["weights gathered"] = case.weights * sent // ranks * micro_steps * passes
    if case.shard_rows:
        traffic["sharded head: features, targets, gradients"] = micro_steps * bytes_sent(
            case.crops * ranks, case.sizes.width, ranks
        )
    return traffic
