"""Settings as the command line loads them, or what it says of their mistakes."""

import pytest

from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.errors import SettingsError


def load(recipe=None, *assignments, command="pretrain", flags=None, **extra) -> Settings:
    """A recipe with words of --set, flags and Python's arguments."""
    return load_settings(
        recipe=recipe, command=command, assignments=assignments, flags=flags or {}, extra=extra
    )


def refusal(*words, **more) -> str:
    """What `load` says of mistakes."""
    with pytest.raises(SettingsError) as caught:
        load(*words, **more)
    return str(caught.value)
