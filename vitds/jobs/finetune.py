"""`vitds finetune`: supervised training of a backbone on labelled images, from a pretrained run or from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.recipes import DEFAULT_RECIPES
from vitds.data.beton import require_same_classes
from vitds.errors import DataError
from vitds.jobs.data_files import open_data
from vitds.jobs.evaluate import top1_of_run
from vitds.jobs.session import finish, open_session, train
from vitds.report.curve import draw_curve
from vitds.runs.directory import Run


def finetune(
    *,
    recipe: str | None = None,
    data: str | None = None,
    test: str | None = None,
    run: str | None = None,
    init: str | None = None,
    ds_config: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    set: Sequence[str] = (),
    **settings: Any,
) -> Run:
    """Fine-tune, or go on with a run that was stopped; top-1 and top-5 of the last epoch on the test file.

    Args:
        init: a run directory, checkpoint or weights file; without it training starts from scratch. The others: see `pretrain`.
    Returns: the finished run.
    Raises: VitdsError of the kind that vitds/errors.py lists; DataError if the training file has no labels.
    """
    flags = {"data": data, "test": test, "init": init, "epochs": epochs, "seed": seed}
    given = load_settings(recipe=recipe, command="finetune", assignments=set, flags=flags, extra=settings)
    ds = load_ds_config(ds_config)
    with open_session(run, recipe or DEFAULT_RECIPES["finetune"], given) as session:
        if session.run.is_finished:
            session.say(f"{session.run.path} is finished; nothing to do")
            return session.run
        file, test_file = open_data(session.settings)
        if not file.manifest.classes:
            raise DataError(
                f"{file.path} has no labels; build it from a folder with one folder a class, or use `vitds pretrain`"
            )
        if test_file is not None:
            require_same_classes(file, test_file)
        trainer = train(session, ds, file, test_file, rows=len(file.manifest.classes))
        score = top1_of_run(session.run, test_file, session.device) if test_file is not None else {}
        finish(session, trainer, score)
        draw_curve(session.run)
        if score:
            session.say(f"test top-1 {score['top1']:.1f} %, top-5 {score['top5']:.1f} %")
        return session.run
