"""Images to .beton files: `vitds data build`."""

from __future__ import annotations

import functools
import hashlib
import posixpath
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vitds.data.findings import Findings, shown
from vitds.data.images import LeftOut, Stored, Storing, hash_entry, image_size, store_image
from vitds.data.likeness import nearest_looks
from vitds.data.manifest import MANIFEST_VERSION, Grouped, Manifest, load_manifest
from vitds.data.sampling import Sample, draw_classes, draw_images
from vitds.data.sources import SOURCE_OPTIONS, ImageSet, SourceOptions, scan_sources
from vitds.data.split import Part, split_folds, split_once
from vitds.data.trees import SourceImage
from vitds.data.workers import stops_in_order, work_through
from vitds.data.writer import BetonWriter
from vitds.errors import DataError, UsageError
from vitds.rng import LARGEST_SEED

# `auto` takes raw storage up to this size of a set, or for images of this size, of which a JPEG saves little.
RAW_BYTES = 2 << 30
TINY_BYTES = 64 * 64 * 3
MEASURED = 1000  # images that `auto` looks at
QUALITY = 90  # of JPEGs, where none is asked for


@dataclass(frozen=True)
class BuildOptions:
    """How a file is built.

    Attributes:
        storage: "raw" pixels; "jpg"; "auto": raw where the set is expected to take at most 2 GiB so, or its
            images 12 kB.
        side_px: short side that larger images are reduced to; None for none.
        quality: of JPEGs that have to be encoded, 1 to 100; None for 90. Refused where the storage is raw.
        workers: processes; None for one a core.
        test_fraction: share of each class that goes to F-test instead of F-train; None for one file.
        folds: so many pairs F-fold1-train and F-fold1-test, ... of which each image is in one test file.
        sample: which of the training images are taken; its classes are drawn before the split.
        seed: of the draw that a split makes; None for 0. Refused where there is none.
        classes_from: a .beton whose class list is taken.
        strict: any finding is an error.
        no_names: the manifest keeps neither the images' names nor those of the findings, only counts.
        show_progress: a bar on standard error, if that is a terminal.
    Raises: UsageError if a value is out of range (names the field and the range), or does nothing.
    """

    storage: str = "auto"
    side_px: int | None = None
    quality: int | None = None
    workers: int | None = None
    test_fraction: float | None = None
    folds: int | None = None
    sample: Sample = Sample()  # noqa: RUF009 (frozen)
    seed: int | None = None
    classes_from: str | Path | None = None
    strict: bool = False
    no_names: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        if self.storage not in ("auto", "raw", "jpg"):
            raise UsageError(f"`storage={self.storage}`: must be auto, raw or jpg.")
        limits = (
            *(("side_px", 1, 65535), ("quality", 1, 100), ("workers", 1, 1024), ("folds", 2, 100)),
            ("seed", 0, LARGEST_SEED),
        )
        for name, low, high in limits:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"`{name}={value}`: must be from {low} to {high}.")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UsageError(f"`test_fraction={self.test_fraction}`: must be between 0 and 1.")
        if self.test_fraction is not None and self.folds is not None:
            raise UsageError("`test_fraction` and `folds` exclude each other: both split the set.")
        if self.classes_from and self.sample.classes:
            raise UsageError(
                "`classes_from` and `classes` exclude each other: both decide the class list. Leave one out."
            )
        if self.seed is not None and not self.is_split and self.sample.is_everything:
            raise UsageError(
                f"`seed={self.seed}`: nothing is drawn. It goes with `test_fraction` or `folds`, or with "
                "`per_class`, `classes` or `total`. Leave it out."
            )
        if self.storage == "raw":
            _refuse_quality(self.quality, "the storage is raw")

    @property
    def is_split(self) -> bool:
        """Whether several files are written."""
        return self.test_fraction is not None or self.folds is not None


def _refuse_quality(quality: int | None, why: str) -> None:
    if quality is not None:
        raise UsageError(
            f"`quality={quality}`: {why}, so no JPEG is encoded. It goes with `storage=jpg`. Leave it out."
        )


@stops_in_order()
def build_beton(
    sources: Sequence[str | Path], out: str | Path, **options: Any
) -> list[tuple[Path, Manifest]]:
    """Build F.beton from folders, tars or zips of images; F-train.beton and F-test.beton with
    `test_fraction`.

    Args:
        sources: see vitds/data/sources.py.
        out: the file, x.beton. An existing one is replaced when the new one is complete.
        options: the fields of SourceOptions and of BuildOptions.
    Returns: each file with its manifest. The manifest's `findings` say what was odd about the images.
    Raises: DataError if there are no usable images, the class list does not fit, or with `strict` anything is
        odd. UsageError for values out of range. ResourceError if `out` cannot be written. Nothing new is
        under the final name then.
    """
    reading = SourceOptions(**{name: options.pop(name) for name in SOURCE_OPTIONS & options.keys()})
    checked = BuildOptions(**options)
    if reading.group is not None and not checked.is_split:
        raise UsageError("`group` does nothing here: it goes with `test_fraction` or `folds`. Leave it out.")
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="vitds-build-") as workspace:
        images = scan_sources(sources, findings, Path(workspace), reading)
        return build_set(images, Path(out), checked, findings, grouped_by=reading.group)


@stops_in_order()
def build_set(
    images: ImageSet,
    out: Path,
    options: BuildOptions,
    findings: Findings | None = None,
    *,
    grouped_by: str | None = None,
) -> list[tuple[Path, Manifest]]:
    """Build the file or files of one set, else as build_beton.

    Args:
        images: the set.
        out: as in build_beton.
        options: checked.
        findings: what was odd while the set was gathered.
        grouped_by: what the images' groups are, for the manifest.
    """
    if out.suffix != ".beton" or out.is_dir():
        raise UsageError(f"`out={out}`: must be a file name that ends in .beton.")
    findings = findings or Findings()
    if options.classes_from:
        images = _with_classes_of(images, options.classes_from)
    images, splits = _split(images, out, options, findings)
    if options.strict:
        findings.require_none()
    storage = _choose_storage(images.images, options)
    if storage == "raw":
        _refuse_quality(options.quality, "this set is small and `storage=auto` keeps raw pixels")
    storing = Storing(storage, options.side_px, options.quality or QUALITY, has_look=options.is_split)
    built = []
    with ExitStack() as stack:
        for parts in splits:
            seen = _Seen()
            for part in parts:
                found = Findings(findings)
                writer = stack.enter_context(BetonWriter(part.out, len(part.chosen)))
                manifest = _write(writer, images, part, storing, options, found, seen)
                groups = {images.images[i].group for i in part.chosen} - {None}
                if grouped_by is not None:
                    manifest = replace(manifest, grouped=Grouped(by=shown(grouped_by), groups=len(groups)))
                built.append((writer, manifest))
                if options.strict:
                    found.require_none()
        for writer, manifest in built:
            writer.publish(_without_names(manifest) if options.no_names else manifest)
    return [(writer.path, manifest) for writer, manifest in built]


def _split(
    images: ImageSet, out: Path, options: BuildOptions, findings: Findings
) -> tuple[ImageSet, list[list[Part]]]:
    """The set with the classes that are drawn, and the files to be made of it: one, a pair, or a pair a fold.

    A sample decides the training images; a test file keeps all of its share, so that results on it compare.
    """
    sample, seed = options.sample, options.seed or 0
    if (sample.classes or sample.per_class) and not images.classes:
        given = "classes" if sample.classes else "per_class"
        raise UsageError(f"`{given}`: the images have no labels. Draw with `total`, or leave it out.")
    images = draw_classes(images, sample)
    if options.test_fraction is not None:
        splits = [split_once(images, out, options.test_fraction, seed, findings)]
    elif options.folds is not None:
        splits = split_folds(images, out, options.folds, seed, findings)
    else:
        splits = [[Part(out, range(len(images.images)), images.split)]]
    return images, [
        [replace(train, chosen=draw_images(images, train.chosen, sample)), *test] for train, *test in splits
    ]


def _without_names(manifest: Manifest) -> Manifest:
    counts = {kind: replace(found, names=()) for kind, found in manifest.findings.items()}
    return replace(manifest, names=None, findings=counts)


def _below_source(name: str, sources: tuple[str, ...]) -> str:
    """An image's path below its source; with several sources the source's path too, as it was given."""
    if len(sources) > 1:
        return name
    below = name.removeprefix(shown(Path(sources[0])))
    return posixpath.normpath(below.lstrip("/:")) if below != name else name


def _with_classes_of(images: ImageSet, other: str | Path) -> ImageSet:
    classes = load_manifest(other).classes
    if missing := [name for name in images.classes if name not in set(classes)]:
        raise DataError(
            f"{images.sources[0]}: {len(missing)} of its {len(images.classes)} classes are not among the "
            f"{len(classes)} of {other} (`classes_from`), first {missing[0]!r}. Rename the folders, or leave "
            "`classes_from` out."
        )
    if not images.classes:
        raise DataError(
            f"{images.sources[0]}: its images have no labels, so `classes_from` has nothing to number. Leave "
            "it out."
        )
    return replace(images, classes=classes)


def _choose_storage(images: list[SourceImage], options: BuildOptions) -> Literal["raw", "jpg"]:
    """`auto`, resolved from the sizes of up to a thousand images spread over the set."""
    if options.storage != "auto":
        return options.storage
    sample = images[:: max(1, len(images) // MEASURED)]
    sizes = [size for size in (image_size(image) for image in sample) if size]
    scales = [min(1.0, (options.side_px or 65535) / min(size)) for size in sizes]
    mean = (
        3
        * sum(height * width * scale**2 for (height, width), scale in zip(sizes, scales, strict=True))
        / max(1, len(sizes))
    )
    return "raw" if mean <= TINY_BYTES or mean * len(images) <= RAW_BYTES else "jpg"


class _Seen:
    """What the files of one split hold so far: content and looks that may come again."""

    def __init__(self) -> None:
        self.digests: dict[bytes, str] = {}
        self.earlier: set[bytes] = set()  # digests of the files before this one
        self.looks: list[bytes] = []  # likewise
        self.names: list[str] = []

    def is_double(self, digest: bytes, name: str, findings: Findings) -> bool:
        """Whether these pixels came before; notes it if so."""
        first = self.digests.setdefault(digest, name)
        if first is not name:
            findings.add("leak" if digest in self.earlier else "duplicate", f"{name} = {first}")
        return first is not name

    def add_file(self, looks: list[bytes], names: list[str], findings: Findings) -> None:
        """The file is complete: note which of its images look like one of a file before it."""
        for i, other in enumerate(nearest_looks(looks, self.looks).tolist()):
            if other >= 0:
                findings.add("near_duplicate", f"{names[i]} ~ {self.names[other]}")
        self.looks += looks
        self.names += names
        self.earlier |= self.digests.keys()


def _write(
    writer: BetonWriter,
    images: ImageSet,
    part: Part,
    storing: Storing,
    options: BuildOptions,
    findings: Findings,
    seen: _Seen,
) -> Manifest:
    chosen = [images.images[i] for i in part.chosen]
    label_of = {name: label for label, name in enumerate(images.classes)}
    totals, looks, looking = _Totals(), [], []  # looks, and the names of the images that have them
    store = functools.partial(store_image, storing=storing)
    results = work_through(
        store,
        chosen,
        workers=options.workers,
        title=f"building {part.out.name}",
        show_progress=options.show_progress,
    )
    for image, stored in results:
        if isinstance(stored, LeftOut):
            findings.add(stored.kind, f"{image.name} ({stored.reason})")
            continue
        for kind in stored.kinds:
            findings.add(kind, image.name)
        if not seen.is_double(stored.digest, image.name, findings) and storing.has_look:
            looks.append(stored.look)
            looking.append(image.name)
        label = label_of[image.class_name] if image.class_name is not None else -1
        writer.add(stored.data, is_jpeg=stored.is_jpeg, height=stored.height, width=stored.width, label=label)
        totals.add(image.name, stored, label)
    if not totals.images:
        first = next((names[0] for names in findings.names.values()), "")
        raise DataError(
            f"{part.out}: none of the {len(chosen)} images can be used, the first: {first}. Nothing was "
            "written."
        )
    asked_for = {image.class_name for image in chosen} - {None}
    for name in sorted(asked_for - {images.classes[label] for label in totals.labels if label >= 0}):
        findings.add("class_lost", name)
    seen.add_file(looks, looking, findings)
    return Manifest(
        **totals.facts(),
        version=MANIFEST_VERSION,
        file_bytes=writer.finish(totals.content.digest()),
        classes=images.classes,
        storage=storing.storage,
        side_px=storing.side_px,
        quality=storing.quality,
        sources=images.sources,
        split=None if part.split is None else shown(part.split),
        findings=findings.as_record(),
        unlabelled=totals.labels[-1] if images.classes else 0,
        names="\n".join(_below_source(name, images.sources) for name in totals.names),
    )


class _Totals:
    """What the manifest says of all samples together; sums are Python integers, so exact in any order."""

    def __init__(self) -> None:
        self.images, self.pixels = 0, 0
        self.sums = [[0, 0], [0, 0], [0, 0]]
        self.widths: set[int] = set()
        self.heights: set[int] = set()
        self.labels: Counter[int] = Counter()
        self.names: list[str] = []
        self.content = hashlib.sha256()  # over all samples in index order

    def add(self, name: str, stored: Stored, label: int) -> None:
        """The next sample."""
        self.names.append(name)
        self.content.update(hash_entry(stored.digest, label))
        self.images += 1
        self.pixels += stored.height * stored.width
        self.sums = [
            [total + int(own) for total, own in zip(*pair, strict=True)]
            for pair in zip(self.sums, stored.sums, strict=True)
        ]
        self.widths.add(stored.width)
        self.heights.add(stored.height)
        self.labels[label] += 1

    def facts(self) -> dict[str, Any]:
        """Fields of the manifest."""
        mean, std = self.mean_std()
        return {
            "images": self.images,
            "width_px": (min(self.widths), max(self.widths)),
            "height_px": (min(self.heights), max(self.heights)),
            "mean": mean,
            "std": std,
            "content_hash": f"sha256:{self.content.hexdigest()}",
        }

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per channel, 0..1, over all pixels."""
        mean = [total / self.pixels / 255 for total, _ in self.sums]
        # n·Σx² - (Σx)² is exact in integers; a difference of floating-point means would lose most digits.
        std = [
            (self.pixels * squares - total * total) ** 0.5 / self.pixels / 255 for total, squares in self.sums
        ]
        return tuple(mean), tuple(std)
