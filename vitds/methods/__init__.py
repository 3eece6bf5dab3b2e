"""What one training step means.

A method is the file that has its name; base.py says what such a file has to hold.
"""

from __future__ import annotations

import importlib

from vitds.methods.base import Method


def method_class(name: str) -> type[Method]:
    """The class `NAME.Method` of a method; config/methods.py lists the names."""
    return importlib.import_module(f"{__name__}.{name}").Method
