"""Every family of timm by its smallest member: it trains, or is refused with what would do.

    python -m tests.models.walk [FAMILY ...] > table.md

About an hour and 8 GB. docs/models.md holds the table; tests/models/test_families.py does the same with a
dozen models.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field

import timm
import torch
from timm.layers import DropPath, PatchDropout
from torch import nn

from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.jobs.models import model_row, sides_text
from vitds.models.build import build_backbone
from vitds.models.facts import trains
from vitds.models.resize import why_not_at
from vitds.models.stochastic import KeyedDropPath, StochasticDraws
from vitds.runs.backbone import load_backbone

SIDES = (64, 96, 112)
CROPS = 2


@dataclass
class Walked:
    """What one family did."""

    family: str
    name: str
    trained: set[int] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def smallest_members(families: list[str]) -> Iterator[tuple[str, str]]:
    """Each family of timm with the name of its smallest model."""
    for family in families or timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                sizes[name] = sum(
                    weight.numel() for weight in timm.create_model(name, num_classes=0).parameters()
                )
        yield family, min(sizes, key=sizes.get)


def train_once(settings: Backbone, side: int) -> nn.Module:
    """One forward and backward pass of two crops for real; asserts what training relies on."""
    backbone = build_backbone(settings, crop_px=side, seed=0).train()
    left = [module for module in backbone.modules() if isinstance(module, DropPath | PatchDropout)]
    assert not left, f"{len(left)} modules of timm draw for themselves"
    draws = StochasticDraws(backbone, seed=0, rows_per_chunk=1, patches=backbone.facts.patches)
    draws.fill(0, 0, CROPS)
    features = backbone(torch.randn(CROPS, 3, side, side, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (CROPS, backbone.facts.width), f"features {tuple(features.shape)}"
    assert torch.isfinite(features).all(), "features that are not finite"
    features.square().mean().backward()
    for name, weight in backbone.named_parameters():
        assert weight.grad is None or torch.isfinite(weight.grad).all(), f"a gradient of {name} is not finite"
    # EfficientViM has a few numbers that only its classifier uses.
    idle = sum(weight.numel() for weight in backbone.parameters() if weight.grad is None)
    assert idle < 1e-4 * backbone.facts.parameters, f"no gradient for {idle} numbers"
    return backbone


def assert_masks_are_of_crops(backbone: nn.Module, side: int) -> None:
    """Leaving out the branches of one crop changes this crop and no other."""
    keyed = [module for module in backbone.eval().modules() if isinstance(module, KeyedDropPath)]
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    for weight in backbone.parameters():
        if (
            weight.abs().max() < 1e-3
        ):  # many branches end in a scale that starts near zero: they add nothing yet
            torch.nn.init.constant_(weight, 0.1)
    outputs = []
    for factor in (torch.ones(3), torch.tensor([1.0, 0.0, 1.0])):
        for module in keyed:
            module.train().factor = factor
        with torch.no_grad():
            outputs.append(backbone(images))
    whole, without = outputs
    torch.testing.assert_close(without[[0, 2]], whole[[0, 2]], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(without[1], whole[1]), "the crop's own features do not change"


def walk(family: str, name: str) -> Walked:
    """All sides, with and without drop path and patch drop; what is refused once is not asked again."""
    result = Walked(family, name)
    refused_drops: set[str] = set()
    for side in SIDES:
        for drops in ({}, {"drop_path": 0.1}, {"patch_drop": 0.5}, {"drop_path": 0.1, "patch_drop": 0.5}):
            if refused_drops & set(drops):
                continue
            what = f"{side} px, {drops}"
            try:
                backbone = train_once(Backbone(name=name, **{"drop_path": 0.0} | drops), side)
                if set(drops) == {"drop_path"}:
                    assert_masks_are_of_crops(backbone, side)
            except SettingsError as error:
                result.refused[what] = str(error)
                if not drops:
                    break  # the side itself
                refused_drops |= set(drops)
            except Exception as error:
                traceback.print_exc()
                result.faults.append(f"{what}: {type(error).__name__} {str(error)[:200]}")
            else:
                result.trained.add(side)
            backbone = None
            gc.collect()
    return result


def can_be_built(settings: Backbone, side: int) -> bool:
    """Whether build_backbone takes it, a pass with numbers included."""
    try:
        build_backbone(settings, crop_px=side, seed=0)
    except SettingsError:
        return False
    return True


def resizing(name: str) -> str:
    """Whether weights go from about 112 to 224 and 448 px: really loaded there, and finite features."""
    settings = Backbone(name=name, drop_path=0)
    first = next((side for side in (112, 96, 120, 126, 128, 256) if can_be_built(settings, side)), None)
    if first is None:
        return "one side"
    later = {120: (240, 480), 256: (512,)}.get(first, (224, 448))
    weights = build_backbone(settings, crop_px=first, seed=0).state_dict()
    for side in later:
        if why := why_not_at(settings, first, side):
            return f"no: `{why.rpartition(': ')[2].partition(' has shape')[0]}`"
        backbone = build_backbone(settings, crop_px=side, seed=1).eval()
        assert not load_backbone(backbone, weights, name).not_found
        if side == later[0]:
            with torch.no_grad():
                assert torch.isfinite(backbone(torch.zeros(1, 3, side, side))).all()
    return f"{first} to {' and '.join(map(str, later))}"


def line(result: Walked) -> str:
    """A line of the table in docs/models.md."""
    row = model_row(result.name)
    drops = Backbone(name=result.name, drop_path=0, patch_drop=0.5)
    takes_patch_drop = any(trains(drops, side) for side in (*SIDES, row.published_px))
    cells = [
        result.family,
        f"`{result.name}`",
        f"{row.parameters / 1e6:.1f}",
        str(row.width),
        sides_text(row.side_step, row.published_px),
        ", ".join(map(str, sorted(result.trained))) or "none",
        "yes" if row.drop_path else "no",
        "yes" if takes_patch_drop else "no",
        resizing(result.name),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table; what went wrong, and each refusal, goes to standard error."""
    faults = 0
    columns = ("family", "smallest model", "M parameters", "width", "sides", "trained at", "drop path")
    columns += ("patch drop", "weights")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for family, name in smallest_members(sys.argv[1:]):
        began = time.monotonic()
        result = walk(family, name)
        try:
            print(line(result), flush=True)
        except Exception as error:
            traceback.print_exc()
            result.faults.append(f"{type(error).__name__} {str(error)[:200]}")
        faults += len(result.faults)
        for what, why in (*result.refused.items(), *enumerate(result.faults)):
            print(f"{name}: {what}: {why}", file=sys.stderr)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(f"{faults} faults", file=sys.stderr)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
