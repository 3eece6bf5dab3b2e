"""Names of weights as other programs write them: which of a file's tensors are the backbone's.

A file may hold several backbones (student and teacher), each behind dictionaries (`state_dict`, `model`) and
wrappers (`module.`, `backbone.`) in any order. So no list of prefixes is kept: every prefix behind which
names of the model stand is tried, and the one that matches most is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What torch.compile, FSDP and activation checkpointing put into names, also in their middle.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Of backbones that match as well, running averages are what their authors evaluate (DINO, timm's EMA), except
# MoCo's.
AVERAGES = ("teacher", "target_encoder", "ema", "model_ema", "state_dict_ema", "ema_model", "ema_state_dict")
SLOW_COPIES = ("momentum_encoder", "encoder_k")


@dataclass(frozen=True)
class Chosen:
    """The backbone's tensors by the model's names.

    Attributes:
        weights: the backbone's.
        rest: names of the file's other tensors.
        taken_off: what stood in the names besides the model's own, as `module.` or `_orig_mod.`.
        rivals: prefixes behind which as much matches.
    """

    weights: dict[str, Tensor]
    rest: list[str]
    taken_off: list[str]
    rivals: list[str]


def flat_names(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of dictionaries within dictionaries, keys joined by dots; all else is left out."""
    if isinstance(tree, Tensor):
        return {prefix.removesuffix("."): tree}
    found: dict[str, Tensor] = {}
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            found |= flat_names(value, f"{prefix}{key}.")
    return found


def choose_backbone(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Chosen:
    """The tensors behind the prefix that matches the model best.

    Best is: most numbers in tensors of the model's name and shape; then most by name alone; then a running
    average, and last MoCo's slow copy; then the shortest prefix.

    Args:
        weights: the file's, by name.
        own: the model's state, by name.
    """
    plain = {name: _without_wrappers(name) for name in weights}
    score: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, parts in plain.items():
        for cut in range(len(parts)):
            tail = ".".join(parts[cut:])
            if tail in own:
                same = own[tail].shape == weights[name].shape
                prefix = "".join(f"{part}." for part in parts[:cut])
                score[prefix][0] += own[tail].numel() * same
                score[prefix][1] += own[tail].numel()
    best = max(score, key=lambda prefix: (score[prefix], _rank(prefix), -len(prefix)), default="")
    chosen = {".".join(parts).removeprefix(best): name for name, parts in plain.items()
              if ".".join(parts).startswith(best)}  # fmt: skip
    used = {tail: name for tail, name in chosen.items() if tail in own}
    seen = {part for name in used.values() for part in name.split(".") if part in WRAPPERS}
    return Chosen(
        weights={tail: weights[name] for tail, name in used.items()},
        rest=sorted(set(weights) - set(used.values())),
        taken_off=[f"{wrapper}." for wrapper in sorted(seen)] + ([best] if best else []),
        rivals=sorted(prefix for prefix in score if prefix != best and score[prefix] == score[best]),
    )


def _without_wrappers(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in WRAPPERS]


def _rank(prefix: str) -> int:
    parts = prefix.split(".")
    if any(part in AVERAGES for part in parts):
        return 1
    return -1 if any(part in SLOW_COPIES for part in parts) else 0
