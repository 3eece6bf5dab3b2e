"""`vitds fit`: from a folder of images to a model in use."""

from __future__ import annotations

from vitds.config.flags import FitFlags
from vitds.words import takes


@takes(FitFlags)
def fit(*sources: str, flags: FitFlags) -> None:
    """Train a model on a folder of images in the minutes that you have.

    Makes OUT/data (a fifth of each class is for the test), the runs that fill the minutes, and
    OUT/report.html; ends with the accuracy and the commands to classify, find and export. The recipe fits the
    images and this machine; the reason is said. The same call goes on where it was stopped; with more minutes
    it trains on from there. Without labels it pretrains.

    Args:
        sources: folders, tars or zips of images, or the name of a set, as for `vitds data build`
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.fit import run_fit

    with as_flags(fit):
        run_fit(sources, flags)
