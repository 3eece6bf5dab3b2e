"""`vitds data build`: from folders, tars, the digits or a published data set to .beton files."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vitds.data.beton import MANIFEST_JSON, Manifest
from vitds.data.build import BuildOptions, build_beton, build_set, with_suffix
from vitds.data.catalogue import CATALOGUE, load_named
from vitds.data.digits import NAME as DIGITS
from vitds.data.digits import build_digits
from vitds.data.findings import Findings
from vitds.data.sampling import Sample, draw_sample, keep_classes, write_list
from vitds.errors import UsageError
from vitds.jobs.data_check import print_findings

Built = list[tuple[Path, Manifest]]


def build(
    sources: Sequence[str],
    *,
    out: str,
    storage: str = "auto",
    side_px: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    split: str | None = None,
    test_fraction: float | None = None,
    classes_from: str | None = None,
    strict: bool = False,
    root: str | None = None,
    download: bool = False,
    per_class: int | None = None,
    classes: int | None = None,
    total: int | None = None,
    seed: int = 0,
    list: str | None = None,
) -> list[dict[str, Any]]:
    """Build one or two .beton files and print what was built and what was odd.

    Args:
        sources: folders or tars; or `digits`; or the name of a published set (vitds/data/catalogue.py), which lies under `root`.
        out, storage, ..., strict: as in BuildOptions. split: without it, digits and published sets give F-train and F-test.
        root, download: of a published set. per_class, classes, total, seed, list: a sample of it, as in sampling.Sample.
    Returns: per file its path and its manifest's values.
    Raises: UsageError for words that do not go together; else as build.build_beton and catalogue.load_named.
    """
    started = time.monotonic()
    options = {
        "storage": storage, "side_px": side_px, "quality": quality, "workers": workers, "test_fraction": test_fraction,
        "classes_from": classes_from, "strict": strict, "show_progress": True,
    }  # fmt: skip
    sample = Sample(classes, per_class, total, seed, list)
    named = [name for name in sources if name in CATALOGUE]
    if named:
        if len(sources) > 1 or root is None:
            raise UsageError(
                f"{named[0]}: a published set is built by itself, with --root DIR. A folder of that name is ./{named[0]}."
            )
        built = _build_named(
            named[0], Path(root), Path(out), split, download, sample, BuildOptions(**options)
        )
    elif root is not None or download or not sample.is_everything:
        raise UsageError(
            f"--root, --download, --per_class, --classes, --total and --list are for one published set: {', '.join(sorted(CATALOGUE))}."
        )
    elif DIGITS in sources:
        if len(sources) > 1:
            raise UsageError(
                f"{DIGITS}: the embedded set is built by itself. A folder of that name is ./{DIGITS}."
            )
        built = build_digits(out, split=split, **options)
    else:
        built = build_beton(sources, out, split=split, **options)
    _print_built(built, time.monotonic() - started)
    return [{"file": str(path), **json.loads(MANIFEST_JSON.dump_json(manifest))} for path, manifest in built]


def _build_named(
    name: str, root: Path, out: Path, split: str | None, download: bool, sample: Sample, options: BuildOptions
) -> Built:
    """A sample decides the training images (or those of the one split that is asked for); a test file beside it keeps its classes."""
    if options.test_fraction is not None:
        raise UsageError(
            f"--test_fraction: {name} has a published split. Leave it out, or choose a half with --split train or test."
        )
    built: Built = []
    kept: tuple[str, ...] | None = None
    for half, path in (
        {split: out} if split else {half: with_suffix(out, half) for half in ("train", "test")}
    ).items():
        findings = Findings()
        images = load_named(name, root, half, findings, download=download)
        if kept is not None:
            images = keep_classes(images, kept)
        elif not sample.is_everything:
            images = draw_sample(images, sample)
            kept = images.classes
        built += build_set(images, path, options, findings)
        if not sample.is_everything and len(built) == 1:
            write_list(images, path.with_name(f"{path.name}.list"))
    return built


def _print_built(built: Built, seconds: float) -> None:
    console = Console()
    for path, manifest in built:
        labels = f"{len(manifest.classes)} classes" if manifest.classes else "no labels"
        size = f"{manifest.file_bytes / 1e6:,.1f} MB"
        console.print(
            Text(f"{path}: {manifest.images:,} images, {labels}, {manifest.storage}, {size}"), soft_wrap=True
        )
        print_findings(console, manifest)
    console.print(f"{seconds:.1f} s")
