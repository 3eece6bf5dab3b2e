"""The paper's recipes: an epoch of each stage on a few photographs, each from the one before.

    python -m tests.soak_recipes [--backbones pvt_v2_b0,t2t_vit_7]

The sides are the recipes' own, 112, 224 and 448 px; steps have 8 images. Prints a line a stage. Ends with
status 1 if a loss is not finite; a stage that cannot begin from the weights before ends it at once.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

from tests.jobs.test_recipes_run import PAPERS_BACKBONES, TOY, make_photographs
from vitds.jobs.train import finetune, pretrain
from vitds.runs.metrics import read_metrics


def soak_stages(key: str, folder: Path, data: tuple[str, str]) -> bool:
    """Whether all three stages of a backbone are well."""
    is_well, before = True, None
    for recipe in (f"idmm_{key}", f"finetune_{key}_224", f"finetune_{key}_448"):
        job = pretrain if before is None else finetune
        words = {} if before is None else {"init": str(before)}
        began, path = time.monotonic(), folder / recipe
        job(recipe=recipe, data=data[0], test=data[1], run=path, epochs=1, set=TOY, **words)
        losses = [line["loss"] for line in read_metrics(path / "metrics.jsonl")]
        with safe_open(path / "backbone.safetensors", "pt") as weights:
            shape = weights.get_slice("pos_embed").get_shape() if "pos_embed" in weights.keys() else "none"
        is_finite = all(map(math.isfinite, losses))
        print(
            f"{recipe}: {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}, positions {shape}, "
            f"{time.monotonic() - began:.0f} s{'' if is_finite else ', NOT FINITE'}",
            flush=True,
        )
        is_well &= is_finite
        before = path
    return is_well


def main() -> None:
    """Soak the backbones that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", default=",".join(PAPERS_BACKBONES))
    keys = parser.parse_args().backbones.split(",")
    with tempfile.TemporaryDirectory() as folder:
        data = make_photographs(Path(folder) / "photographs")
        results = [soak_stages(key, Path(folder), data) for key in keys]
    print(f"{sum(results)} of {len(results)} backbones are well")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
