"""`vitds runs`: what lies in a folder of runs."""

from __future__ import annotations


def runs(folder: str = "runs", *, csv: str | None = None, json: bool = False) -> None:
    """List every run below a folder: its state, method, data, result and seconds.

    Args:
        folder: the folder to search, at any depth
        csv: a file that gets the same as comma-separated values
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.runs import list_runs

    with as_flags(runs):
        list_runs(folder, to_csv=csv, as_json=json)
