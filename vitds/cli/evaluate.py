"""`vitds eval …`: what runs, checkpoints or timm's models are worth."""

from __future__ import annotations


def eval_top1(*runs: str, data: str | None = None, json: bool = False) -> None:
    """Accuracy of a fine-tuned model.

    Top-1, top-5, balanced accuracy, macro-F1, calibration, each class and the worst confusions. Several runs
    give one table, with the mean and the deviation of those that differ in their seed alone.

    Args:
        runs: a run directory, or one of its checkpoints
        data: the .beton file to classify (default the run's test file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_top1):
        evaluate("top1", *runs, data=data, as_json=json)


def eval_knn(*runs: str, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Accuracy of weighted nearest neighbours on frozen features.

    Several runs give one table, with the mean and the deviation of those that differ in their seed alone.

    Args:
        runs: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file to classify (default the run's test file)
        bank: the labelled .beton file whose images are the neighbours (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_knn):
        evaluate("knn", *runs, data=data, bank=bank, as_json=json)


def eval_linear(*runs: str, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Accuracy of a linear classifier on frozen features.

    Its regularisation is chosen on a part of the training images. Several runs give one table.

    Args:
        runs: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file to classify (default the run's test file)
        bank: the labelled .beton file that the classifier learns from (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_linear):
        evaluate("linear", *runs, data=data, bank=bank, as_json=json)


def eval_fewshot(*runs: str, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Accuracy from 1, 2, 5 and 10 labelled images a class, on frozen features.

    The nearest class mean decides. Each number is the mean of five draws of these images. Several runs give
    one table.

    Args:
        runs: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file to classify (default the run's test file)
        bank: the labelled .beton file that the few images are drawn from (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_fewshot):
        evaluate("fewshot", *runs, data=data, bank=bank, as_json=json)


def eval_retrieval(*runs: str, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Whether the nearest images are of the same class.

    Recall at 1, 5 and 10, and mAP. Several runs give one table.

    Args:
        runs: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file whose images are looked for (default the run's test file)
        bank: the labelled .beton file that is searched (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_retrieval):
        evaluate("retrieval", *runs, data=data, bank=bank, as_json=json)


def eval_theory(*runs: str, data: str | None = None, json: bool = False) -> None:
    """What the rows of the instance head became, and which images share probability.

    docs/theory.md has each figure and what it shows of the paper's claim. Measured on the run's training
    images. Several checkpoints of a run give a column each.

    Args:
        runs: a pretraining's run directory (its newest checkpoint is taken), or one of its checkpoints
        data: the run's training file, where it has moved
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_theory):
        evaluate("theory", *runs, data=data, as_json=json)
