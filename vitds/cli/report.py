"""`vitds report`: a page to look at."""

from __future__ import annotations


def report_runs(*runs: str, out: str | None = None) -> None:
    """Write a page of a run, or of several beside each other, to look at.

    It is one HTML file that needs nothing else and no network: result, data, curves, crops, neighbours,
    confusions, where the network looks, a map of the features. Every run writes its own at its end; call this
    after further evaluations. Of several runs it has the settings that differ, results with their seeds, and
    curves over one another.

    Args:
        runs: a finished run directory
        out: the file to write (default report.html in the run)
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.report import report

    with as_flags(report_runs):
        report(*runs, out=out)
