"""`vitds pretrain`: instance-discrimination pretraining of a backbone on the images of one file, without their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.recipes import DEFAULT_RECIPES
from vitds.data.beton import require_same_classes
from vitds.jobs.data_files import open_data
from vitds.jobs.evaluate import knn_of_run
from vitds.jobs.session import finish, open_session, train
from vitds.report.curve import draw_curve
from vitds.runs.directory import Run


def pretrain(
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
    """Pretrain, or go on with a run that was stopped; kNN at the end where there are labels and a test file.

    Args:
        recipe: a name from `vitds recipes` or a YAML file. data, test: .beton files. run: the run directory.
        init: weights to begin with. ds_config: DeepSpeed JSON. set: `key=value` words. settings: sections, as nested mappings.
    Returns: the finished run.
    Raises: VitdsError of the kind that vitds/errors.py lists.
    """
    flags = {"data": data, "test": test, "init": init, "epochs": epochs, "seed": seed}
    given = load_settings(recipe=recipe, command="pretrain", assignments=set, flags=flags, extra=settings)
    ds = load_ds_config(ds_config)
    with open_session(run, recipe or DEFAULT_RECIPES["pretrain"], given) as session:
        if session.run.is_finished:
            session.say(f"{session.run.path} is finished; nothing to do")
            return session.run
        file, test_file = open_data(session.settings)
        if test_file is not None:
            require_same_classes(file, test_file)
        trainer = train(session, ds, file, test_file, rows=file.images)
        has_labels = test_file is not None and file.manifest.classes and test_file.manifest.classes
        knn = knn_of_run(session.run, file, test_file, session.device) if has_labels else {}
        finish(session, trainer, {"knn": knn} if knn else {})
        draw_curve(session.run)
        for k, score in knn.items():
            session.say(f"kNN, k = {k}: top-1 {score['top1']:.1f} %, top-5 {score['top5']:.1f} %")
        return session.run
