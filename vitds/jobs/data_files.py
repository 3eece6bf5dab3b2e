"""The files that a run's settings name, and whether its method can use them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitds import dist
from vitds.config.methods import METHODS, Command
from vitds.config.recipes import DEFAULT_RECIPES, RECIPES_OF_PHOTOGRAPHS, list_recipes, read_recipe
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, labelled, open_beton, require_same_classes
from vitds.data.digits import NAME as DIGITS  # as data.train or data.test: the embedded set
from vitds.data.digits import embedded_digits
from vitds.data.joined import join
from vitds.errors import DataError, ResourceError, SettingsError
from vitds.evaluate.linear import draw_held_out
from vitds.methods import method_class
from vitds.rng import Purpose

DATA_FOLDER = Path("data")  # where the embedded set is built


def open_file(name: str, flag: str, half: str) -> BetonFile:
    """A .beton by its path, or the embedded digits by their name.

    Args:
        name: a path, or `digits`.
        flag: by which a person names this file.
        half: train or test, of the digits.
    Raises: DataError if the file is missing or not sound.
    """
    if name == DIGITS:
        train, test = dist.on_main(_digits)
        return open_beton(train if half == "train" else test)
    path = Path(name)
    if path.exists() or path.is_absolute():
        return open_beton(path)
    raise DataError(
        f"{name}: cannot be opened (No such file or directory) from {Path.cwd()}, the folder you call from. "
        f"Call from the folder that it is meant from, say where it is with {flag} FILE.beton, or build it "
        f"with `vitds data build SOURCE --out {name}`."
    )


def open_files(names: Sequence[str], flag: str, half: str) -> BetonFile:
    """One file, or several as one set.

    Raises: DataError as `open_file` and data.joined.join.
    """
    return join([open_file(name, flag, half) for name in names])


def named_file(argument: str, given: str | None, of_run: tuple[str, ...], half: str) -> BetonFile:
    """The file that an argument names, or the run's own, which may be several.

    Args:
        argument: by which a person can say where the file is.
        given: its value.
        of_run: names in the run's settings.
        half: train or test, of the embedded digits.
    Raises: DataError if it is not there, or not sound.
    """
    names = (given,) if given else of_run
    paths = [os.path.expanduser(name) for name in names]
    gone = [path for path in paths if not Path(path).exists() and path != DIGITS]
    if given is None and gone:
        raise DataError(
            f"{gone[0]}, which the run names, is not there, seen from {Path.cwd()}, the folder you call "
            f"from. Say where it is now with `{argument}=FILE.beton`, or call from the folder that the run "
            "was started in"
        )
    return open_files(paths, f"`{argument}`", half)


def _digits() -> tuple[Path, Path]:
    """The embedded set, built here, or, where nothing can be written, in the temporary folder."""
    try:
        return embedded_digits(DATA_FOLDER)
    except (DataError, ResourceError):
        return embedded_digits(Path(tempfile.gettempdir()) / f"vitds-{os.getuid()}")


def training_files(settings: Settings) -> tuple[BetonFile, BetonFile | None]:
    """The training file and the test file, if there is one.

    A method that needs labels gets the labelled images alone, any other all of them.

    Raises: SettingsError if no training file is named; DataError if a file is not sound, the method needs
        labels that it lacks, or nothing could be measured on the test file.
    """
    if not settings.data.train_files:
        raise SettingsError(
            "data.train is not set: give --data FILE.beton (`vitds data build IMAGES --out FILE.beton` "
            "makes one)"
        )
    train = open_files(settings.data.train_files, "--data", "train")
    method = method_class(settings.method)
    if method.needs_labels and (lack := _lack_of_classes(train)):
        raise DataError(
            f"{train.path} {lack}; training on labels needs two classes or more. Build it from a folder with "
            "one folder a class (`vitds data build`), or train without labels (`vitds pretrain --recipe "
            f"{RECIPES_OF_PHOTOGRAPHS['pretrain']}`)"
        )
    if method.needs_labels:
        train = _with_labels(train)
    if settings.data.test is None:
        if method.leaves_class_head and settings.eval.every_epochs and not settings.eval.hold_out:
            raise SettingsError(
                f"eval.every_epochs {settings.eval.every_epochs}: no images to measure accuracy on. "
                "Give --test FILE.beton, or hold a part of the training images out (--set eval.hold_out=0.1)"
            )
        return train, None
    test = open_file(settings.data.test, "--test", "test")
    for file, lack in ((train, _lack_of_classes(train)), (test, _lack_of_labels(test))):
        if lack:
            measured = (
                "top-1 cannot be measured"
                if method.leaves_class_head
                else "nearest neighbours cannot be counted"
            )
            raise DataError(
                f"{file.path} {lack}, so {measured} on {test.path}. Leave --test (data.test) out: training "
                "does not need it. Or build the file from a folder with one folder a class (`vitds data "
                "build`)"
            )
    require_same_classes(train, test)
    return train, _with_labels(test)


def hold_out(train: BetonFile, share: float, seed: int) -> tuple[BetonFile, BetonFile]:
    """The training images, and those of them that are held out to be measured along training.

    Args:
        train: labelled images.
        share: of each class.
        seed: with an image's position the key of the draw.
    Raises: DataError if no class has an image to spare.
    """
    is_held_out = draw_held_out(train.labels, share, Purpose.HOLD_OUT, seed)
    if not is_held_out.any():
        raise DataError(
            f"{train.path}: no class has two images or more, so none can be held out; leave eval.hold_out out"
        )
    return train.take(np.flatnonzero(~is_held_out)), train.take(np.flatnonzero(is_held_out))


def split_groups_note(train: BetonFile) -> str | None:
    """A line for the person who holds images out of a file whose build kept groups whole: the file does not
    say which image is of which group, so `hold_out` divides them."""
    if train.manifest.grouped is None:
        return None
    return (
        f"{train.path}: its build kept groups whole (by {train.manifest.grouped.by}), and images are held "
        "out one by one: a group may be on both sides, and accuracy along training too high. Better leave "
        "eval.hold_out out, and give a file of other groups as --test"
    )


def _with_labels(file: BetonFile) -> BetonFile:
    """The labelled images of a file, of which some at least are.

    Raises: DataError if none is.
    """
    if not (file.labels >= 0).any():
        raise DataError(
            f"{file.path}: none of its {file.images} images has a label, so nothing can be trained on or "
            "measured with them. Build it from labelled images (`vitds data build`)"
        )
    return labelled(file)


def _lack_of_classes(file: BetonFile) -> str:
    """What keeps a training file from being classified; nothing where it has images of two classes."""
    present = np.unique(file.labels[file.labels >= 0])
    if len(file.manifest.classes) > 1 and len(present) == 1:
        return f"has images of one class alone, {file.manifest.classes[present[0]]!r}, of those in its list"
    return _lack_of_labels(file)


def _lack_of_labels(file: BetonFile) -> str:
    """Likewise of a test file, whose images may be of one class of its list."""
    classes = file.manifest.classes
    if not classes:
        return "has no labels"
    return f"has one class alone, {classes[0]!r}" if len(classes) == 1 else ""


def check_recipe(command: Command, train: BetonFile) -> None:
    """A command's default recipe makes crops and a network for the digits, and is for them alone.

    Raises: SettingsError that names the recipes of the command, if it is not.
    """
    if train.manifest.sources == (DIGITS,):
        return
    own = [name for name, _ in list_recipes() if METHODS[read_recipe(name)["method"]].command == command]
    fitting = RECIPES_OF_PHOTOGRAPHS[command]
    others = ", ".join(name for name in own if name != fitting)
    raise SettingsError(
        f"{train.path}: --recipe is missing. Without it `vitds {command}` takes {DEFAULT_RECIPES[command]}, "
        f"which is for the embedded digits alone. For photographs take --recipe {fitting}; there are also "
        f"{others}, or a YAML file of your own"
    )
