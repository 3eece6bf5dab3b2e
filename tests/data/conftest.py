"""What the tests of data leave behind does not reach the next ones."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def numbas_leavings_are_gone() -> Iterator[None]:
    """Stock FFCV's pipelines leave cycles with finalisers. One that runs while a later test parses source
    makes Python 3.11's parser fail.
    """
    yield
    gc.collect()
