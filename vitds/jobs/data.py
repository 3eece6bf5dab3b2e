"""`vitds data build`: from folders, tars, the digits or a published data set to .beton files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vitds.config.flags import BuildFlags, SourceFlags
from vitds.data.beton import open_beton
from vitds.data.build import BuildOptions, build_beton, build_set
from vitds.data.catalogue import CATALOGUE, load_named
from vitds.data.digits import NAME as DIGITS
from vitds.data.digits import build_digits
from vitds.data.findings import TABLE_READ, Findings
from vitds.data.manifest import MANIFEST_JSON, Manifest
from vitds.data.sampling import Sample, draw_sample, keep_classes, write_list
from vitds.data.sources import SOURCE_OPTIONS
from vitds.data.split import with_suffix
from vitds.data.workers import stops_in_order
from vitds.errors import UsageError
from vitds.jobs.data_check import images_per_class, print_findings
from vitds.terminal import say

Built = list[tuple[Path, Manifest]]
# Flags that are options of any build under their own names.
OF_ANY = ("storage", "quality", "workers", "classes_from", "strict", "no_names")
# What is for one kind of source alone.
OF_SPLITS = ("test_fraction", "folds", "group")
OF_LABELS = (
    *("labels", "label_column", "label_encoding", "label_from", "yes", "alike"),
    *("unlabelled", "no_labels"),
)
OF_FOLDERS = (*OF_SPLITS, *OF_LABELS, "classes_are_folders")
OF_PUBLISHED_SETS = ("root", "download", "list")
OF_SAMPLES = ("per_class", "classes", "total")
UNEQUAL = 10  # times as many images in the largest class as in the smallest: said at the build


def build(sources: Sequence[str], flags: BuildFlags) -> list[dict[str, Any]]:
    """Build .beton files and print what was built and what was odd.

    Args:
        sources: folders, tars or zips; or `digits`; or the name of a published set (vitds/data/catalogue.py),
            which lies under `root`.
        flags: as on the command line; `split` missing, digits and published sets give F-train and F-test.
    Returns: per file its path and its manifest's values, without the images' names.
    Raises: UsageError for flags that do not go together, or would do nothing; else as build.build_beton and
        catalogue.load_named.
    """
    started = time.monotonic()
    named = named_set(sources, flags)
    sample = Sample(flags.classes, flags.per_class, flags.total, flags.seed or 0, flags.list)
    options = {name: getattr(flags, name) for name in OF_ANY}
    options |= {"side_px": flags.side, "show_progress": True}
    if named == DIGITS:
        built = build_digits(flags.out, split=flags.split, seed=flags.seed, **options)
    elif named:
        seed = flags.seed if sample.is_everything or sample.list else None  # the sample has it
        built = _build_named(named, flags, sample, BuildOptions(seed=seed, **options))
    else:
        options |= {
            name: getattr(flags, name) for name in (*SOURCE_OPTIONS, "test_fraction", "folds", "seed")
        }
        built = build_beton(sources, flags.out, sample=sample, **options)
    print_built(built, time.monotonic() - started)
    record = partial(MANIFEST_JSON.dump_python, mode="json", exclude={"names"})
    return [{"file": str(path), **record(manifest)} for path, manifest in built]


def named_set(sources: Sequence[str], flags: SourceFlags) -> str | None:
    """The set that the sources name: `digits` or a published one; None where they are files.

    Raises: UsageError if others stand beside it, or a flag would do nothing with these sources.
    """
    named = next((name for name in sources if name in (DIGITS, *CATALOGUE)), None)
    _refuse_idle(named, flags)
    if named and len(sources) > 1:
        raise UsageError(f"{named}: this set is built by itself. A folder of that name is ./{named}.")
    if named == DIGITS and Path(named).exists():
        raise UsageError(
            f"{named}: there is a folder or file of this name here, and a set that comes with scikit-learn. "
            f"Write ./{named} for what lies here; for the set, call from another folder."
        )
    return named


def _refuse_idle(named: str | None, flags: SourceFlags) -> None:
    """Whatever was given and would do nothing with these sources."""
    given = {name for name in vars(flags) if getattr(flags, name) not in (None, False)}
    of_published = (*OF_PUBLISHED_SETS, *(OF_SAMPLES if named == DIGITS else ()))
    idle = [name for name in of_published if name in given and named not in CATALOGUE]
    if idle:
        folders = " or folders" if idle[0] in OF_SAMPLES else ""
        raise UsageError(
            f"`{idle[0]}` does nothing with {named or 'folders, tars and zips'}: it goes with one published "
            f"set{folders}: {', '.join(sorted(CATALOGUE))}. Leave it out."
        )
    idle = [name for name in OF_FOLDERS if name in given and named]
    if idle:
        raise UsageError(
            f"`{idle[0]}` does nothing with {named}, whose classes and split are published: it goes with "
            "folders, tars and zips. Leave it out, or choose a half with `split=train` or `split=test`."
        )


@stops_in_order()
def _build_named(name: str, flags: BuildFlags, sample: Sample, options: BuildOptions) -> Built:
    """A sample decides the training images, or those of the one split that is asked for; a test file beside
    it keeps its classes.
    """
    if flags.root is None:
        raise UsageError(
            f"{name}: `root` is missing, the folder where this published set lies. A folder of its name is "
            f"./{name}."
        )
    out, split, built = Path(flags.out), flags.split, []
    kept: tuple[str, ...] | None = None
    halves = {split: out} if split else {half: with_suffix(out, half) for half in ("train", "test")}
    for half, path in halves.items():
        findings = Findings()
        images = load_named(name, flags.root, half, findings, download=flags.download)
        if kept is not None:
            images = keep_classes(images, kept)
        elif not sample.is_everything:
            images = draw_sample(images, sample)
            kept = images.classes
        built += build_set(images, path, options, findings)
        if not sample.is_everything and len(built) == 1:
            write_list(images, path.with_name(f"{path.name}.list"))
    return built


def print_built(built: Built, seconds: float) -> None:
    """A line a file with what is in it, what it warns of, and the table of odd images; then the seconds."""
    for path, manifest in built:
        read = manifest.findings[TABLE_READ].names if TABLE_READ in manifest.findings else ()
        for line in (_summary(path, manifest), *read, *_warnings(path, manifest)):
            say(line)
        print_findings(manifest)
    say(f"{seconds:.1f} s")


def _summary(path: Path, manifest: Manifest) -> str:
    labels = f"{len(manifest.classes)} classes" if manifest.classes else "no labels"
    if manifest.unlabelled:
        labels += f", {manifest.unlabelled:,} without a label"
    if manifest.grouped:
        labels += f", {manifest.grouped.groups:,} groups by {manifest.grouped.by}"
    size = f"{manifest.file_bytes / 1e6:,.1f} MB"
    return f"{path}: {manifest.images:,} images, {labels}, {manifest.storage}, {size}"


def _warnings(path: Path, manifest: Manifest) -> Iterator[str]:
    """What a person should know before training on the classes."""
    if len(manifest.classes) == 1:
        yield (
            f"{path}: one class alone, {manifest.classes[0]}: enough to pretrain on, but there is nothing to "
            "tell it from, so no classes can be trained or measured"
        )
    if not manifest.classes:
        return
    counts = images_per_class(open_beton(path))
    (most, largest), (least, smallest) = (
        pick(zip(counts, manifest.classes, strict=True)) for pick in (max, min)
    )
    if most >= UNEQUAL * max(1, least):
        yield (
            f"{path}: very unequal classes: {largest} has {most:,} images, {smallest} {least:,}. Top-1 says "
            "little then: look at balanced accuracy and macro-F1"
        )
