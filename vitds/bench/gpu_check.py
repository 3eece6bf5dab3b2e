"""What the parts of `vitds bench gpu` share: where results go, the images, the settings."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.data.build import build_beton
from vitds.data.digits import build_digits
from vitds.data.sampling import Sample

RESULTS = "results.jsonl"
# Of the embedded digits, on a CPU: what is tried is that every part runs.
TOY = {
    "views.crop_px": 16,
    "backbone.options": "{patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}",
    "backbone.patch_drop": 0,
    "head.init": "noise",
    "batch.global_images": 24,
    "batch.chunk_images": 4,
    "engine.precision": "fp32",
    "engine.compile": "off",
}
QUIET = {"log.tensorboard": "false", "log.page": "false"}


class Choice(NamedTuple):
    """Settings, as every command takes them: a recipe, and assignments KEY=VALUE to it."""

    recipe: str
    words: tuple[str, ...]

    @property
    def settings(self) -> Settings:
        """As `vitds pretrain` reads them."""
        return load_settings(recipe=self.recipe, command="pretrain", assignments=self.words, flags={})

    @property
    def flags(self) -> list[str]:
        """Words of `vitds pretrain`."""
        return ["--recipe", self.recipe, *(flag for word in self.words for flag in ("--set", word))]


@dataclass(frozen=True)
class Check:
    """One part's place.

    Attributes:
        part: its name.
        out: where results are kept.
        work: where files are built; gone at the end.
        source: a folder or archive of images; None: the digits.
        toy: whether sizes are small.
    """

    part: str
    out: Path
    work: Path
    source: Path | None
    toy: bool

    def found(
        self, name: str, value: float | int | str | None, unit: str = "", *, goal: str = "", **more: Any
    ) -> None:
        """Keep a line.

        Args:
            name: what was measured.
            value: None where it could not be measured, which the name explains.
            goal: what is aimed at; it decides nothing.
            more: further facts.
        """
        self.write({"name": name, "value": value, "unit": unit, "goal": goal, **more})

    def write(self, line: dict[str, Any]) -> None:
        """Add a line to the results, which is kept at once."""
        with (self.out / RESULTS).open("a") as results:
            results.write(json.dumps({"part": self.part, **line}) + "\n")

    def choose(self, recipe: str = "idmm_deit_tiny", **changes: Any) -> Choice:
        """A recipe with changes, as in batch__global_images=128; the digits' own where sizes are small."""
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        given = {"data.workers": len(os.sched_getaffinity(0)), "engine.precision": "bf16", **QUIET, **changed}
        if self.toy:
            recipe, given = "idmm_digits", given | TOY
        return Choice(recipe, tuple(f"{key}={value}" for key, value in given.items()))

    def images(self, storage: str = "jpg", total: int | None = None) -> Path:
        """A .beton of the images, or of so many of them; built at the first call."""
        path = self.work / f"{storage}-{total or 'all'}.beton"
        options: dict[str, Any] = {"storage": storage, "sample": Sample(total=total)}
        if path.exists():
            return path
        if self.toy or self.source is None:
            build_digits(path, split="train", **options)
        else:
            build_beton([self.source], path, classes_are_folders=True, **options)
        return path
