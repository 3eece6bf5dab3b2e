"""The flags of the commands that have many, once: command line, Python functions and job all take these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

from vitds.errors import VitdsError


@dataclass(frozen=True)
class TrainFlags:
    """What `vitds pretrain` and `vitds finetune` take.

    Args:
        recipe: a name from `vitds recipes`, or a YAML file (default: the embedded digits' recipe)
        data: the .beton file to train on
        test: the .beton file to evaluate on at the end
        run: the run directory (default runs/RECIPE-N, the next free number)
        init: a run directory, checkpoint or weights file to begin from; without it training starts from
            scratch
        ds_config: a DeepSpeed JSON file, or the name of a packaged one: zero0 to zero3, zero2_offload,
            zero3_offload, large_1gpu, large_8gpu, large_64gpu (default zero0)
        epochs: passes over the images (default the recipe's)
        seed: of every random draw (default the recipe's)
        set: one setting, as in --set optimizer.lr_peak=1e-3; may be repeated
    """

    recipe: str | None = None
    data: str | None = None
    test: str | None = None
    run: str | None = None
    init: str | None = None
    ds_config: str | None = None
    epochs: int | None = None
    seed: int | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildFlags:
    """What `vitds data build` takes beside its sources.

    Args:
        out: the file to write, F.beton
        storage: raw pixels (fast, large), JPEG, or auto: raw where the set or its images are small
        side: larger images are scaled down to this short side, in pixels
        quality: of JPEGs that have to be written anew, 1 to 100 (default 90)
        workers: processes (default one a core)
        labels: a table of labels (CSV) with a row an image: a column of file names or paths, one of labels;
            an empty label keeps the image, without a class
        label_column: the column of the labels, by its name or number, where it is not clear
        label_from: take the class from the file's name, as `crazing` from crazing_12.jpg; shown before it is
            believed
        yes: the classes that --label_from found are right
        alike: labels that differ only by case or blanks: make one class of them, or keep them apart
        unlabelled: a further folder or archive of images without labels, for the pretraining
        no_labels: take no labels, whatever the folders are
        classes_are_folders: the first folders are the classes, even if they look like splits or like a folder
            around the classes
        classes_from: take the class list of this .beton file, so that train and test agree
        split: the folder of this name within each source, as in SOURCE/train; of a named set, the part to
            take
        test_fraction: write F-train.beton and F-test.beton instead, this share of every class for the test
        folds: write so many pairs instead, F-fold1-train.beton and F-fold1-test.beton and so on, for
            cross-validation
        group: images of one group go to one side of the split; a regular expression that finds the patient,
            specimen or video in an image's path, or a column of --labels
        per_class: this many training images of every class
        classes: this many classes
        total: this many training images
        seed: of what a split, --per_class, --classes and --total draw (default 0)
        list: of a published set, exactly the images that a list names; a sample's list is written beside its
            file
        no_names: keep no file names in the manifest, where they are private
        strict: stop if anything about the images is broken or odd, instead of counting and naming it
        root: where a published set lies, as its publisher ships it
        download: fetch a published set into --root
    """

    out: str
    storage: Literal["auto", "raw", "jpg"] = "auto"
    side: int | None = None
    quality: int | None = None
    workers: int | None = None
    labels: str | None = None
    label_column: str | None = None
    label_from: Literal["name"] | None = None
    yes: bool = False
    alike: Literal["merge", "keep"] | None = None
    unlabelled: str | None = None
    no_labels: bool = False
    classes_are_folders: bool = False
    classes_from: str | None = None
    split: str | None = None
    test_fraction: float | None = None
    folds: int | None = None
    group: str | None = None
    per_class: int | None = None
    classes: int | None = None
    total: int | None = None
    seed: int | None = None
    list: str | None = None
    no_names: bool = False
    strict: bool = False
    root: str | None = None
    download: bool = False


@contextmanager
def as_arguments() -> Iterator[None]:
    """Errors from within speak of Python's arguments, `argument epochs`, and not of flags."""
    names = "|".join(field.name for field in fields(TrainFlags))
    try:
        yield
    except VitdsError as error:
        error.args = (re.sub(rf"(?<![\w-])--({names})\b", r"argument \1", str(error)),)
        raise
