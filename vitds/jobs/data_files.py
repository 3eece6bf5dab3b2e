"""The files that a run's settings name."""

from __future__ import annotations

from pathlib import Path

from vitds import dist
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, open_beton
from vitds.data.digits import embedded_digits
from vitds.errors import SettingsError

DIGITS = "digits"  # as data.train or data.test: the embedded set
DATA_FOLDER = Path("data")  # where the embedded set is built


def open_data(settings: Settings) -> tuple[BetonFile, BetonFile | None]:
    """The training file and the test file, if there is one; the name `digits` stands for the embedded set.

    Raises: SettingsError if no training file is named; DataError if a file is not sound.
    """
    if settings.data.train is None:
        raise SettingsError(
            "data.train is not set: give --data FILE.beton (`vitds data build IMAGES --out FILE.beton` makes one)"
        )
    names = [settings.data.train, settings.data.test]
    if DIGITS in names:
        embedded = dist.on_main(embedded_digits, DATA_FOLDER)
        names = [path if name == DIGITS else name for name, path in zip(names, embedded, strict=True)]
    train_name, test_name = names
    return open_beton(Path(train_name)), None if test_name is None else open_beton(Path(test_name))
