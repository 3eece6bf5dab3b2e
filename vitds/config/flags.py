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
        data: the .beton file to train on; may be repeated, several make one set
        test: the .beton file to evaluate on at the end
        run: the run directory (default runs/RECIPE-N, the next free number)
        init: a run directory, checkpoint or weights file to begin from; without it training starts from
            scratch
        ds_config: a DeepSpeed JSON file, or the name of a packaged one: zero0 to zero3, zero2_offload,
            zero3_offload, large_1gpu, large_8gpu, large_64gpu (default zero0)
        epochs: passes over the images (default the recipe's)
        seed: of every random draw (default the recipe's)
        hold_out: in fine-tuning, train without this share of each class, and keep the epoch that does best on
            it
        set: one setting, as in --set optimizer.lr_peak=1e-3; may be repeated
    """

    recipe: str | None = None
    data: tuple[str, ...] | str = ()
    test: str | None = None
    run: str | None = None
    init: str | None = None
    ds_config: str | None = None
    epochs: int | None = None
    seed: int | None = None
    hold_out: float | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """How images and their labels are read: what `vitds data build` and `vitds fit` both take.

    Args:
        labels: a table of labels (CSV) with a row an image: a column of file names or paths, one of labels;
            an empty label keeps the image, without a class
        label_column: the column of the labels, by its name or number, where it is not clear
        label_encoding: of the table, as in gb18030, where it is neither UTF-8 nor UTF-16 nor Windows-1252
        label_from: take the class from the file's name, as `crazing` from crazing_12.jpg; shown before it is
            believed
        yes: the classes that --label_from found are right
        alike: labels, or class folders, that differ only by case or blanks: make one class of them, or keep
            them apart
        unlabelled: a further folder or archive of images without labels, for the pretraining
        no_labels: take no labels, whatever the folders are
        classes_are_folders: the first folders are the classes, even if they look like splits or like a folder
            around the classes
        split: the folder of this name within each source, as in SOURCE/train; of a named set, the part to
            take
        group: images of one group go to one side of a split; a regular expression that finds the patient,
            specimen or video in an image's path, or a column of --labels
        root: where a published set lies, as its publisher ships it
        download: fetch a published set into --root
    """

    labels: str | None = None
    label_column: str | None = None
    label_encoding: str | None = None
    label_from: Literal["name"] | None = None
    yes: bool = False
    alike: Literal["merge", "keep"] | None = None
    unlabelled: str | None = None
    no_labels: bool = False
    classes_are_folders: bool = False
    split: str | None = None
    group: str | None = None
    root: str | None = None
    download: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildFlags(SourceFlags):
    """What `vitds data build` takes beside its sources and SourceFlags.

    Args:
        out: the file to write, F.beton
        storage: raw pixels (fast, large), JPEG, or auto: raw where the set or its images are small
        side: larger images are scaled down to this short side, in pixels
        quality: of JPEGs that have to be written anew, 1 to 100 (default 90)
        workers: processes (default one a core)
        classes_from: take the class list of this .beton file, so that train and test agree
        test_fraction: write F-train.beton and F-test.beton instead, this share of every class for the test
        folds: write so many pairs instead, F-fold1-train.beton and F-fold1-test.beton and so on, for
            cross-validation
        per_class: this many training images of every class
        classes: this many classes
        total: this many training images
        seed: of what a split, --per_class, --classes and --total draw (default 0)
        list: of a published set, exactly the images that a list names; a sample's list is written beside its
            file
        no_names: keep no file names in the manifest, where they are private
        strict: stop if anything about the images is broken or odd, instead of counting and naming it
    """

    out: str
    storage: Literal["auto", "raw", "jpg"] = "auto"
    side: int | None = None
    quality: int | None = None
    workers: int | None = None
    classes_from: str | None = None
    test_fraction: float | None = None
    folds: int | None = None
    per_class: int | None = None
    classes: int | None = None
    total: int | None = None
    seed: int | None = None
    list: str | None = None
    no_names: bool = False
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class FitFlags(SourceFlags):
    """What `vitds fit` takes beside its sources and SourceFlags.

    Args:
        minutes: that building, training and evaluation may take
        out: the folder of the result (default runs/ and the name of the first source)
        plan: build the data, time a step and say what would be trained, then stop
        compare: also train from scratch for as many minutes, where the plan has a pretraining
        seed: of every random draw (default the recipes')
    """

    minutes: float
    out: str | None = None
    plan: bool = False
    compare: bool = False
    seed: int | None = None


@contextmanager
def as_arguments() -> Iterator[None]:
    """Errors from within speak of Python's arguments, `argument epochs`, and not of flags."""
    names = "|".join(field.name for field in fields(TrainFlags))
    try:
        yield
    except VitdsError as error:
        error.args = (re.sub(rf"(?<![\w-])--({names})\b", r"argument \1", str(error)),)
        raise
