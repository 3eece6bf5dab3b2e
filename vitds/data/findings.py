"""What a build found odd in its sources, counted and named: nothing is dropped or changed in silence."""

from __future__ import annotations

from pathlib import PurePath

from vitds.data.manifest import Finding
from vitds.errors import DataError

NAMES_KEPT = 1000

KINDS = {
    "not_image": "left out: not an image",
    "truncated": "left out: the file ends early",
    "damaged": "left out: cannot be decoded",
    "no_decoder": "left out: a picture in a format that cannot be read here",
    "range_unknown": "left out: signed, floating-point or 32-bit pixels of unknown range",
    "too_large": "left out: too large (above 179 million pixels, or a side above 65,535)",
    "unreadable": "left out: cannot be read",
    "dead_link": "left out: a link that leads nowhere, or in a circle",
    "archive_link": "left out: a link inside an archive to none of its images",
    "archive_twice": "an archive's member in place of an earlier one of the same path",
    "archive_outside": "left out: an archive member whose path leads outside",
    "unlabelled": "left out: an image beside the class folders",
    "unlisted": "left out: not in the table of labels (an empty label there would keep it, without a class)",
    "table_missing": "a row of the table of labels without an image",
    "nameless": "left out: no class in its name",
    "empty_class": "a class folder without images, not a class",
    "class_lost": "a class of which no image could be used",
    "single": "a class of one image, all in the training file",
    "groupless": "belongs to no group, a group of its own",
    "link_outside": "a link out of the folder, followed",
    "duplicate": "same content as another image of the file: two instances that look alike",
    "leak": "same content as an image of the training file (=): the test is easier than it seems",
    "near_duplicate": "looks almost like an image of the training file (~): the test is easier than it seems",
    "one_sided": "a class whose images are all on one side of the split, because its groups are",
    "share_missed": "the groups are too large to give the test file its share",
    "fold_lacks": "a class with fewer images or groups than folds: not in every test file",
    "metadata": "metadata that cannot be read (EXIF, text, checksums, ...), ignored; not turned without EXIF",
    "mended": "JPEG with faulty data, decoded with what could be read, stored anew",
    "grey": "greyscale, now RGB",
    "cmyk": "CMYK, now RGB",
    "deep": "more than 8 bits a channel, scaled to 8",
    "palette": "palette, now RGB",
    "transparent": "with an alpha channel, laid on white",
    "rotated": "turned upright as its EXIF tag says",
    "animated": "several frames, the first taken",
}
# Of folders, tables and of what is no image; nothing is wrong with any image, so these are no error under
# `strict`.
TEST_GROUP = "test_group"
OTHER_FILE = "other_file"
LEFT_BEHIND = "left_behind"
PART_NAME = "part_name"
TABLE_READ = "table_read"
TABLE_TWICE = "table_twice"
TEXTS = {
    **KINDS,
    TABLE_READ: "how the table of labels was read",
    TABLE_TWICE: "a row of the table of labels that says again what another one says",
    TEST_GROUP: "without a label, of a group in the test file: there too, and kept out of training",
    PART_NAME: "a class by its folder, whose name is that of a part of a data set",
    LEFT_BEHIND: "passed over: a hidden folder, or one that a system left behind",
    OTHER_FILE: "passed over: no picture, by name and content",
}


def shown(name: str | PurePath) -> str:
    """A file's name as printable text in its script; undecodable bytes and control characters are escaped."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


class Findings:
    """Oddities by kind (a key of TEXTS)."""

    def __init__(self, earlier: Findings | None = None) -> None:
        """Empty, or a copy of earlier ones that can grow by itself."""
        self.counts: dict[str, int] = dict(earlier.counts) if earlier else {}
        self.names: dict[str, list[str]] = (
            {kind: list(names) for kind, names in earlier.names.items()} if earlier else {}
        )

    def add(self, kind: str, name: str) -> None:
        """Count one; `name` says which, and where known why."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        names = self.names.setdefault(kind, [])
        if len(names) < NAMES_KEPT:
            names.append(shown(name))

    def as_record(self) -> dict[str, Finding]:
        """For the manifest, in the order of TEXTS."""
        return {
            kind: Finding(count=self.counts[kind], names=tuple(self.names[kind]))
            for kind in TEXTS
            if kind in self.counts
        }

    def require_none(self) -> None:
        """The rule of `strict`: no image may need any handling. Files that are no pictures do not count.

        Raises: DataError naming each kind, its count and its first image.
        """
        listed = [
            f"{self.counts[kind]} x {text} (first: {self.names[kind][0]})"
            for kind, text in KINDS.items()
            if kind in self.counts
        ]
        if listed:
            raise DataError(
                f"`strict`: {'; '.join(listed)}. Nothing was written. Mend or remove these images, or build "
                "without `strict`."
            )
