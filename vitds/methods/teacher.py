"""What the methods with a teacher share: a frozen copy of the student that follows it by small steps."""

from __future__ import annotations

import copy

import torch
from torch import nn

from vitds.models.stochastic import without_stochastic


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy that starts equal, has no gradient, and drops no branch and no patch."""
    # Without a gradient no optimizer has it.
    return without_stochastic(copy.deepcopy(student)).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum · teacher + (1 - momentum) · student, for every parameter of the teacher.

    Args:
        teacher: whose parameters' names are all among the student's.
        student: may hold the teacher, whose own names then begin otherwise, and more.
        momentum: vitds.schedule.teacher_momentum.
    """
    own = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        parameter.lerp_(own[name], 1 - momentum)
