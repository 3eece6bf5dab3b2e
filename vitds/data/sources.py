"""From what a person names (folders, tars, zips) to a sorted list of images with class names. None is
decoded.

A folder, tar or zip holds class folders (the first folder below it is an image's class, as in torchvision's
ImageFolder) or, flat, images without labels. Labels may come from a table or from file names instead
(labels.py). The same tree gives the same set from any of them. Several sources make one set: classes are
joined by name. The order, which decides the instance numbers, is by class name, then by path within the
source, then by source; images without a label beside labelled ones come last.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vitds.data.findings import PART_NAME, Findings, shown
from vitds.data.folders import Parts, require_classes
from vitds.data.labels import Placed, class_names, group_by_pattern, label_by_name, label_by_table
from vitds.data.tables import Table
from vitds.data.trees import ARCHIVE_SUFFIXES, SourceImage, SourceTree, read_source
from vitds.errors import DataError, UsageError


@dataclass(frozen=True)
class SourceOptions:
    """Which part of the sources is taken, where labels come from, and what belongs together.

    Attributes:
        split: the folder of this name, or path, in each source (train, images/train), or in each class
            folder.
        classes_are_folders: the first folders are the classes, whatever they look like.
        no_labels: no class, whatever the folders are.
        labels: a table of labels (vitds/data/tables.py).
        label_column: of that table, by name or number from 1; None to find it.
        label_encoding: of that table; None to find it.
        label_from: "name": the class is in the file's name.
        yes: the classes that `label_from` finds were looked at.
        alike: labels, or class folders, that differ only by case or blanks: "merge", "keep"; None: ask.
        unlabelled: a further folder or archive, whose images have no label.
        group: a regular expression or a column of the table: what it finds is not divided by a split.
    Raises: UsageError if two exclude each other, or one does nothing.
    """

    split: str | None = None
    classes_are_folders: bool = False
    no_labels: bool = False
    labels: str | Path | None = None
    label_column: str | None = None
    label_encoding: str | None = None
    label_from: str | None = None
    yes: bool = False
    alike: str | None = None
    unlabelled: str | Path | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        for name, values in {"label_from": ("name",), "alike": ("merge", "keep")}.items():
            if getattr(self, name) not in (None, *values):
                raise UsageError(f"`{name}={getattr(self, name)}`: must be {' or '.join(values)}.")
        ways = [name for name in ("labels", "label_from", "no_labels") if getattr(self, name)]
        if len(ways) > 1:
            raise UsageError(f"`{ways[0]}` and `{ways[1]}` exclude each other. Leave one out.")
        # What does nothing, and what it goes with.
        idle = {
            "label_column": (not self.labels, "`labels`"),
            "label_encoding": (not self.labels, "`labels`"),
            "yes": (not self.label_from, "`label_from`"),
            "alike": (self.no_labels, "labels"),
            "classes_are_folders": (bool(ways), "labels from folders"),
            "unlabelled": (self.no_labels, "labels; name it as one more source"),
        }
        for name, (does_nothing, partner) in idle.items():
            if getattr(self, name) and does_nothing:
                raise UsageError(f"`{name}` does nothing here: it goes with {partner}. Leave it out.")

    @property
    def is_by_folder(self) -> bool:
        """Whether class folders, where there are some, are the labels."""
        return not (self.labels or self.label_from or self.no_labels)


SOURCE_OPTIONS = frozenset(field.name for field in fields(SourceOptions))


@dataclass(frozen=True)
class ImageSet:
    """A set before it is decoded.

    Attributes:
        images: in instance order.
        classes: their names in label order; () without labels.
        sources: where the images come from.
        split: which part of the sources they are, if a part was taken.
    """

    images: list[SourceImage]
    classes: tuple[str, ...]
    sources: tuple[str, ...]
    split: str | None = None


def scan_sources(
    sources: Sequence[str | Path],
    findings: Findings,
    workspace: Path,
    options: SourceOptions = SourceOptions(),  # noqa: B008 (frozen)
) -> ImageSet:
    """All images of the sources, joined and sorted; without labels where the sources are flat.

    Args:
        sources: folders, tars or zips.
        findings: gets what was odd.
        workspace: a folder that the caller removes; a compressed tar is unpacked into it, as one tar.
        options: which part of them, and where labels come from.
    Raises: DataError if a source is missing, neither folder nor archive, a damaged archive, without images or
        without that split, if its folders look like splits or like a wrapper, if flat and class-folder
        sources are mixed (names the source); else as in vitds/data/labels.py.
    """
    paths = [Path(source) for source in sources]
    if not paths:
        raise DataError(
            "no source was given. Name a folder of class folders, a folder of images, a tar or zip of "
            "either, or digits."
        )
    found: list[Placed] = []
    for number, source in enumerate(paths):
        tree = _take_images(read_source(source, findings, workspace), source, options)
        images = _label_by_folder(tree, source, options, findings) if options.is_by_folder else tree.files
        found += [Placed(parts, number, images[parts]) for parts in sorted(images)]
    found, table = _with_labels(found, paths, options, findings)
    if options.unlabelled:
        found += _without_labels(found, Path(options.unlabelled), len(paths), findings, workspace)
        sources = (*sources, options.unlabelled)
    if options.group is not None:
        found = _with_groups(found, table, options.group, findings)
    found.sort(
        key=lambda each: (each.image.class_name is None, each.image.class_name, each.parts, each.source)
    )
    images = [replace(each.image, member=shown("/".join(each.parts))) for each in found]
    classes = tuple(sorted({image.class_name for image in images} - {None}))
    return ImageSet(images, classes, tuple(shown(str(source)) for source in sources), options.split)


def _with_labels(
    found: list[Placed], paths: Sequence[Path], options: SourceOptions, findings: Findings
) -> tuple[list[Placed], Table | None]:
    """The images with classes from elsewhere than folders, and the table of labels, if there is one."""
    table = None
    if options.is_by_folder:
        _require_one_kind(found, paths)
        found = _spelt_alike(found, options.alike, paths[0])
    elif options.label_from:
        found = label_by_name(found, findings, source=paths[0], is_sure=options.yes, alike=options.alike)
    elif options.labels:
        found, table = label_by_table(
            found,
            paths,
            Path(options.labels),
            findings,
            label_column=options.label_column,
            encoding=options.label_encoding,
            alike=options.alike,
            group=options.group,
        )
    return found, table


def _with_groups(found: list[Placed], table: Table | None, group: str, findings: Findings) -> list[Placed]:
    """The images with their groups; those of no group are counted."""
    if table is None or table.column(group) is None:  # else label_by_table has read the column
        found = group_by_pattern(found, group, (table.header or ()) if table else ())
    for each in found:
        if each.image.group is None:
            findings.add("groupless", each.image.name)
    return found


def _require_one_kind(found: Sequence[Placed], sources: Sequence[Path]) -> None:
    kinds = {each.image.class_name is None: sources[each.source] for each in reversed(found)}
    if len(kinds) == 2:
        raise DataError(
            f"{kinds[True]} holds images without class folders, {kinds[False]} class folders. Build them as "
            "two files, or give the one without labels as `unlabelled`."
        )


def _spelt_alike(found: list[Placed], alike: str | None, source: Path) -> list[Placed]:
    """The images with class folders of one name in other letters made one class, or kept, as `alike` says.

    Raises: DataError if there are such folders and it does not say; UsageError if it says, without labels.
    """
    folders = [each.image.class_name for each in found if each.image.class_name is not None]
    if alike and not folders:
        raise UsageError(f"`alike={alike}` does nothing here: {source} has no class folders. Leave it out.")
    names = class_names(folders, alike, str(source), "images")
    other = {folder: name for folder, name in names.items() if name not in (folder, None)}
    return [
        each._replace(image=replace(each.image, class_name=other[each.image.class_name]))
        if each.image.class_name in other
        else each
        for each in found
    ]


def _without_labels(
    found: Sequence[Placed], source: Path, number: int, findings: Findings, workspace: Path
) -> list[Placed]:
    if all(each.image.class_name is None for each in found):
        raise DataError(
            f"{source}: `unlabelled` stands beside images with labels, and there are none. Name it as one "
            "more source."
        )
    tree = read_source(source, findings, workspace)
    return [Placed(parts, number, tree.files[parts]) for parts in sorted(tree.files)]


def _take_images(tree: SourceTree, source: Path, options: SourceOptions) -> SourceTree:
    """The part of a source whose first folders are the classes."""
    split = options.split
    name = Path(os.path.abspath(source)).name
    if not source.is_dir():
        name = next(name[: -len(suffix)] for suffix in ARCHIVE_SUFFIXES if name.lower().endswith(suffix))
    if split is not None:
        tree = _take_split(tree, split, source)
        name = split.rsplit("/", 1)[-1]
    # `tar cf cats.tar cats`, or cats/cats: a folder of the source's own name around everything is the source.
    while all(len(parts) > 1 and parts[0].casefold() == name.casefold() for parts in tree.files):
        if options.classes_are_folders and all(len(parts) == 2 for parts in tree.files):
            break
        tree = _below(tree, next(iter(tree.files))[0])
    return tree


def _label_by_folder(
    tree: SourceTree, source: Path, options: SourceOptions, findings: Findings
) -> dict[Parts, SourceImage]:
    """Class names from the first folder; none where no image lies in a folder."""
    if not options.classes_are_folders:
        for folder in require_classes(tree.files, source, options.split):
            findings.add(PART_NAME, f"{source}/{folder}")
    tops = {parts[0] for parts in tree.files if len(parts) > 1}
    images = {}
    for parts, image in tree.files.items():
        if tops and len(parts) == 1:
            findings.add("unlabelled", image.name)
            continue
        name = unicodedata.normalize("NFC", shown(parts[0])) if tops else None
        images[parts] = replace(image, class_name=name)
    for parts in sorted(tree.folders if tops else ()):
        if len(parts) == 1 and parts[0] not in tops:
            findings.add("empty_class", f"{source}/{parts[0]}")
    return images


def _take_split(tree: SourceTree, split: str, source: Path) -> SourceTree:
    """SPLIT/..., below folders that are around everything; a path of such; or CLASS/SPLIT/... as CLASS/..."""
    for name in split.split("/"):
        while (
            name not in _tops(tree) and len(_tops(tree)) == 1 and all(len(parts) > 2 for parts in tree.files)
        ):
            tree = _below(tree, next(iter(tree.files))[0])
        within = {p: image for p, image in tree.files.items() if len(p) > 2 and p[1] == name}
        if name in _tops(tree):
            tree = _below(tree, name)
        elif within:
            tree = SourceTree({(p[0], *p[2:]): image for p, image in within.items()}, frozenset())
        else:
            some = ", ".join(shown(top) for top in _tops(tree)[:5]) or "no folders"
            raise DataError(
                f"{source}: there is no folder {split!r} with images in it to take as `split`; there are "
                f"{some}."
            )
    return tree


def _tops(tree: SourceTree) -> list[str]:
    return sorted({parts[0] for parts in tree.files if len(parts) > 1})


def _below(tree: SourceTree, top: str) -> SourceTree:
    files = {parts[1:]: image for parts, image in tree.files.items() if parts[0] == top and len(parts) > 1}
    return SourceTree(
        files, frozenset(parts[1:] for parts in tree.folders if parts[0] == top and len(parts) > 1)
    )
