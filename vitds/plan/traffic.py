"""Bytes that one rank hands to collectives in a step, by kind. Counted on 2 real ranks: tests/plan/test_traffic.py."""

from __future__ import annotations

from vitds.heads.sharded import bytes_sent
from vitds.plan.case import Case


def step_traffic(case: Case) -> dict[str, int]:
    """Kind -> bytes a rank and step, R - 1 of R of what an all-reduce of them moves apart; nothing on one rank.

    Under autocast stages 1 to 3 send gradients, and stage 3 gathers weights, in bf16, norms and biases apart (counted as bf16).
    """
    p, ranks, micro_steps = case.engine, case.ranks, case.accumulation
    if ranks == 1:
        return {}
    sent = case.weight if case.stage == 0 else case.compute
    traffic = {"gradients reduced": p * sent * (micro_steps if case.stage >= 2 else 1)}
    if case.stage in (1, 2):
        traffic["updated weights gathered"] = p * case.weight // ranks
    if case.stage == 3:
        # Once for forward and backward together, while all weights may be live at a time; else once for each.
        passes = 1 if case.weights <= case.buckets["stage3_max_live_parameters"] else 2
        traffic["weights gathered"] = case.weights * sent // ranks * micro_steps * passes
    if case.shard_rows:
        traffic["sharded head: features, targets, gradients"] = micro_steps * bytes_sent(
            case.crops * ranks, case.backbone.width, ranks
        )
    return traffic
