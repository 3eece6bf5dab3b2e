"""Steps that a card takes, or skips, by itself, and of which the host reads a step later.

So the host gives the card its next step while this one runs.
"""

from __future__ import annotations

import torch

from vitds.config.tree import Settings
from vitds.methods.base import Method


def may_be_late(settings: Settings, method: Method, *, zero_stage: int, device: torch.device) -> bool:
    """Whether nothing on the host needs to know at once if a step was sound.

    Only torch's fused AdamW reads it on the card. So a run waits for each step in which DeepSpeed has the
    gradients (ZeRO 1 to 3, fp16), or with weights or rows of another optimizer, or where something follows
    the weights: a teacher, a centre, averages.
    """
    rows_read_it = not method.outside or (settings.head.optimizer == "adamw" and not settings.head.lazy)
    # By what is overridden: a new method cannot forget to say so.
    nothing_follows = (
        type(method).after_update is Method.after_update and not settings.optimizer.average_decay
    )
    return (
        device.type == "cuda"
        and zero_stage == 0
        and settings.engine.precision != "fp16"
        and settings.optimizer.kind == "adamw"
        and rows_read_it
        and nothing_follows
    )
