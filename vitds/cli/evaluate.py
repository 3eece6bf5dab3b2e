"""`vitds eval …`: accuracy of a run, a checkpoint or one of timm's models."""

from __future__ import annotations


def eval_top1(run: str, *, data: str | None = None, json: bool = False) -> None:
    """Top-1 and top-5 of a fine-tuned model.

    Args:
        run: a run directory, or one of its checkpoints
        data: the .beton file to classify (default the run's test file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_top1):
        evaluate("top1", run, data=data, as_json=json)


def eval_knn(run: str, *, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Top-1 and top-5 of weighted nearest neighbours on frozen features.

    Args:
        run: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file to classify (default the run's test file)
        bank: the labelled .beton file whose images are the neighbours (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_knn):
        evaluate("knn", run, data=data, bank=bank, as_json=json)


def eval_linear(run: str, *, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Top-1 and top-5 of a linear classifier on frozen features.

    Its regularisation is chosen on a part of the training images.

    Args:
        run: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file to classify (default the run's test file)
        bank: the labelled .beton file that the classifier learns from (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_linear):
        evaluate("linear", run, data=data, bank=bank, as_json=json)
