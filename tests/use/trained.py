"""A small training whose returned run is used at once, for a pool of ranks to call."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.engine.training import small_run


def trained(run: str, data: tuple[str, str], method: str) -> tuple[str, np.ndarray]:
    """The run's path, and the features that the run itself gives of the test images' folder."""
    back = small_run(run, data, method=method, epochs=1)
    return str(back.path), back.embed([Path(data[1]).parent / "test"])
