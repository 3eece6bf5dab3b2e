"""`vitds checkpoint …`: list, verify and remove a run's checkpoints."""

from __future__ import annotations


def checkpoint_list(run: str, *, json: bool = False) -> None:
    """List a run's checkpoints.

    Args:
        run: a run directory
        json: print one JSON object and nothing else
    """
    from vitds.jobs.checkpoints import list_run

    list_run(run, as_json=json)


def checkpoint_verify(run: str, *, json: bool = False) -> None:
    """Hash every file of a run's checkpoints; a damaged one is named.

    Args:
        run: a run directory
        json: print one JSON object and nothing else
    """
    from vitds.jobs.checkpoints import verify_run

    verify_run(run, as_json=json)


def checkpoint_prune(run: str, *, keep: int = 1, json: bool = False) -> None:
    """Remove a run's checkpoints but the newest sound ones.

    A finished run needs none to be evaluated or to begin another from. The rows of its instance head are in
    them alone.

    Args:
        run: a run directory
        keep: how many stay
        json: print one JSON object and nothing else
    """
    from vitds.jobs.checkpoints import prune_run

    prune_run(run, keep=keep, as_json=json)
