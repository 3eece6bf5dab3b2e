"""docs/results.md is what its rows make, and a row is what its runs reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file

from docs.results import add_experiment
from docs.results.add import _differing, row_of
from docs.results.picture import draw
from docs.results.render import FOLDER, PAGE, page
from tests.engine.training import small_run
from vitds.data.catalogue import CATALOGUE
from vitds.errors import UsageError
from vitds.jobs.experiment import RECORD
from vitds.jobs.result_rows import ROW_JSON, Row
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

NOTHING_GIVEN = {"title": None, "table": None, "seconds": None}


@pytest.fixture(scope="module")
def runs(digit_files, tmp_path_factory) -> list[Run]:
    """Two seeds of a fine-tuning, each from a pretraining of its own."""
    folder, found = tmp_path_factory.mktemp("rows"), []
    for seed in (0, 1):
        pretrained = small_run(str(folder / f"pre-seed{seed}"), digit_files, epochs=1, seed=seed)
        options = {"method": "supervised", "epochs": 1, "seed": seed, "init": str(pretrained.path)}
        found.append(small_run(str(folder / f"fine-seed{seed}"), digit_files, **options))
    return found


def write(row: Row, folder: Path) -> None:
    (folder / "new.json").write_text(json.dumps(ROW_JSON.dump_python(row, mode="json")))


def test_the_page_is_what_its_rows_make() -> None:
    assert PAGE.read_text("utf-8") == page(), "python docs/results/render.py writes it again"


def test_the_picture_is_of_rows_that_are_there(tmp_path: Path) -> None:
    draw(tmp_path / "picture.png")
    width, height = Image.open(tmp_path / "picture.png").size
    assert width > height > 300


def test_a_row_has_stages_seeds_and_figures_of_its_runs(runs: list[Run], tmp_path: Path) -> None:
    row = row_of(runs, "new", "held-out", **NOTHING_GIVEN, folder=tmp_path)
    assert [(stage.command, stage.recipe, stage.epochs) for stage in row.stages] == [
        ("pretrain", "idmm_digits", 1),
        ("finetune", "finetune_digits", 1),
    ]
    assert "batch.global_images=24" in row.stages[0].set and row.held_out.seeds == (0, 1)
    assert row.stages[0].data == Path(runs[0].settings.data.train).name
    assert not any(word.startswith("backbone.name") for word in row.stages[1].set)
    answers = [load_file(run.path / "analysis/top1-images.safetensors") for run in runs]
    top1 = [100 * float((each["label"] == each["predicted"]).mean()) for each in answers]
    assert row.held_out.mean == pytest.approx(sum(top1) / 2) and row.test is None
    assert row.held_out.top1 == pytest.approx(top1, abs=1e-4)
    assert row.held_out.interval[0] <= row.held_out.mean <= row.held_out.interval[1]


def test_a_row_keeps_the_course_of_the_loss_of_each_stage(runs: list[Run], tmp_path: Path) -> None:
    row = row_of(runs, "new", "held-out", **NOTHING_GIVEN, folder=tmp_path)
    for losses, run in zip(row.losses, (Path(runs[0].settings.init), runs[0].path), strict=True):
        steps = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
        assert len(losses) == min(20, len(steps))
        assert losses[0] == pytest.approx(steps[0], abs=1e-4), "fewer steps than parts: each is one"


def test_a_row_names_every_setting_that_changes_its_figures(runs: list[Run], tmp_path: Path) -> None:
    chosen = {"hold_out": 0.2, "choose": "best", "every_epochs": 1, "batch_images": 7}
    settings = runs[0].settings
    changed = settings.model_copy(
        update={
            "eval": settings.eval.model_copy(update=chosen),
            "data": settings.data.model_copy(update={"order": "pages"}),
            "engine": settings.engine.model_copy(update={"precision": "bf16"}),
        }
    )
    differing = _differing("finetune_digits", changed)
    named = {"eval.hold_out=0.2", 'eval.choose="best"', "eval.every_epochs=1", 'data.order="pages"'}
    assert named | {'engine.precision="bf16"'} <= set(differing)
    assert not any(word.startswith("eval.batch_images") for word in differing)


def test_a_row_keeps_what_it_has_of_the_other_split(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = row_of(runs, "new", "held-out", title="A title", table="t", seconds=5, folder=tmp_path)
    write(before, tmp_path)
    monkeypatch.setitem(CATALOGUE["flowers102"].counts, "test", 20)
    after = row_of(runs, "new", "test", **NOTHING_GIVEN, folder=tmp_path)
    assert (after.title, after.held_out, after.test) == ("A title", before.held_out, before.held_out)
    write(after, tmp_path)
    assert "| A title |" in page(tmp_path) and "test top-1" in page(tmp_path)
    assert f"| 2: {', '.join(f'{top1:.1f}' for top1 in after.test.top1)} |" in page(tmp_path)


def test_figures_of_another_split_of_toy_length_or_of_two_settings_are_refused(
    runs: list[Run], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="evaluated on 20 images, the official test images are 6,149"):
        row_of(runs, "new", "test", **NOTHING_GIVEN, folder=tmp_path)
    with pytest.raises(UsageError, match="has other settings than"):
        row_of([runs[0], Run(runs[1].settings.init and Path(runs[1].settings.init))], "new", "held-out",
               **NOTHING_GIVEN, folder=tmp_path)  # fmt: skip
    with pytest.raises(UsageError, match="two runs have one seed"):
        row_of([runs[0], runs[0]], "new", "held-out", **NOTHING_GIVEN, folder=tmp_path)
    record = runs[0].path.parent / RECORD
    record.write_text(json.dumps({"asked": {"toy": True}}))
    try:
        with pytest.raises(UsageError, match="is of toy length, and no result"):
            row_of(runs, "new", "held-out", **NOTHING_GIVEN, folder=tmp_path)
    finally:
        record.unlink()


def test_the_folder_of_rows_is_the_one_that_the_package_reads() -> None:
    assert (Path(__file__).parents[2] / "vitds" / "results").resolve() == FOLDER


def test_an_experiment_is_kept_without_the_paths_of_the_machine(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(add_experiment, "PAGE", tmp_path / "results.md")
    found = json.loads((FOLDER / "experiments/flowers_ablation_epochs.json").read_text())
    found["asked"]["data"] = str(tmp_path / "my-train.beton")
    found["arms"][0]["knn"]["runs"][0]["run"] = str(tmp_path / "runs/none/pretrain-seed0")
    (tmp_path / "ablation.json").write_text(json.dumps(found))
    add_experiment.main([str(tmp_path), "kept"], folder=tmp_path / "experiments")
    kept = json.loads((tmp_path / "experiments/kept.json").read_text())
    assert kept["asked"]["data"] == "my-train.beton"
    assert kept["arms"][0]["knn"]["runs"][0]["run"] == "pretrain-seed0"
    assert kept["arms"][0]["knn"]["mean"] == found["arms"][0]["knn"]["mean"]


def test_a_folder_without_a_result_is_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no finished experiment"):
        add_experiment.main([str(tmp_path), "kept"], folder=tmp_path)
