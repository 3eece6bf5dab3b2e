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
# What an argument is for, where it is for one kind of source alone.
OF_FOLDERS = ("test_fraction", "classes_are_folders")
OF_PUBLISHED_SETS = ("root", "download", "per_class", "classes", "total", "list")


def build(
    sources: Sequence[str],
    *,
    out: str,
    storage: str = "auto",
    side_px: int | None = None,
    quality: int | None = None,
    workers: int | None = None,
    split: str | None = None,
    classes_are_folders: bool = False,
    test_fraction: float | None = None,
    classes_from: str | None = None,
    strict: bool = False,
    root: str | None = None,
    download: bool = False,
    per_class: int | None = None,
    classes: int | None = None,
    total: int | None = None,
    seed: int | None = None,
    list: str | None = None,
) -> list[dict[str, Any]]:
    """Build one or two .beton files and print what was built and what was odd.

    Args:
        sources: folders or tars; or `digits`; or the name of a published set (vitds/data/catalogue.py), which
            lies under `root`.
        out: the file, x.beton.
        storage: as in BuildOptions.
        side_px: as in BuildOptions.
        quality: as in BuildOptions.
        workers: as in BuildOptions.
        split: the folder to take of each source; without it, digits and published sets give F-train and
            F-test.
        classes_are_folders: as in build_beton.
        test_fraction: as in BuildOptions.
        classes_from: as in BuildOptions.
        strict: as in BuildOptions.
        root: where a published set lies.
        download: fetch it there first.
        per_class: of a published set, as in sampling.Sample.
        classes: of a published set, as in sampling.Sample.
        total: of a published set, as in sampling.Sample.
        seed: of what `test_fraction` or a sample draws; None for 0.
        list: of a published set, as in sampling.Sample.
    Returns: per file its path and its manifest's values.
    Raises: UsageError for arguments that do not go together, or would do nothing; else as build.build_beton
        and catalogue.load_named.
    """
    started = time.monotonic()
    given = {name: value for name, value in locals().items() if value not in (None, False)}
    named = next((name for name in sources if name in (DIGITS, *CATALOGUE)), None)
    _refuse_idle(named, given)
    if named and len(sources) > 1:
        raise UsageError(f"{named}: this set is built by itself. A folder of that name is ./{named}.")
    sample = Sample(classes, per_class, total, seed or 0, list)
    is_drawn = not (sample.is_everything or sample.list)
    options = {
        "storage": storage,
        "side_px": side_px,
        "quality": quality,
        "workers": workers,
        "test_fraction": test_fraction,
        "seed": None if is_drawn else seed,
        "classes_from": classes_from,
        "strict": strict,
        "show_progress": True,
    }
    if named == DIGITS:
        built = build_digits(out, split=split, **options)
    elif named:
        if root is None:
            raise UsageError(
                f"{named}: `root` is missing, the folder where this published set lies. A folder of its name "
                f"is ./{named}."
            )
        built = _build_named(named, Path(root), Path(out), split, download, sample, BuildOptions(**options))
    else:
        built = build_beton(sources, out, split=split, classes_are_folders=classes_are_folders, **options)
    _print_built(built, time.monotonic() - started)
    return [{"file": str(path), **json.loads(MANIFEST_JSON.dump_json(manifest))} for path, manifest in built]


def _refuse_idle(named: str | None, given: dict[str, Any]) -> None:
    """Whatever was given and would do nothing with these sources."""
    idle = [name for name in OF_PUBLISHED_SETS if name in given and named not in CATALOGUE]
    if idle:
        raise UsageError(
            f"`{idle[0]}` does nothing with {named or 'folders and tars'}: it goes with one published set: "
            f"{', '.join(sorted(CATALOGUE))}. Leave it out."
        )
    idle = [name for name in OF_FOLDERS if name in given and named]
    if idle:
        raise UsageError(
            f"`{idle[0]}` does nothing with {named}, whose classes and split are published: it goes with "
            "folders and tars. Leave it out, or choose a half with `split=train` or `split=test`."
        )


def _build_named(
    name: str, root: Path, out: Path, split: str | None, download: bool, sample: Sample, options: BuildOptions
) -> Built:
    """A sample decides the training images, or those of the one split that is asked for; a test file beside
    it keeps its classes.
    """
    built: Built = []
    kept: tuple[str, ...] | None = None
    halves = {split: out} if split else {half: with_suffix(out, half) for half in ("train", "test")}
    for half, path in halves.items():
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
        if len(manifest.classes) == 1:
            console.print(
                Text(
                    f"{path}: one class alone, {manifest.classes[0]}: enough to pretrain on, but there is "
                    "nothing to tell it from, so no classes can be trained or measured"
                ),
                soft_wrap=True,
            )
        print_findings(console, manifest)
    console.print(f"{seconds:.1f} s")
