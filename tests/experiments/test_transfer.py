"""`vitds transfer`: sources and targets as a matrix, at toy length on the digits."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.engine.training import small_run
from tests.experiments.toy import flagged, refusal
from vitds.cli import main
from vitds.config.tree import Settings
from vitds.errors import Stopped
from vitds.evaluate.bootstrap import interval_of_mean
from vitds.jobs.chain import Stage
from vitds.jobs.evaluate import evaluated
from vitds.jobs.transfer import _short_names, _sources
from vitds.models.build import build_backbone
from vitds.report.heat_map import draw_heat_maps
from vitds.runs.directory import Run, read_json, save_settings, write_json


@pytest.fixture(scope="module")
def source(digit_files, tmp_path_factory) -> Path:
    """A short pretraining."""
    return Path(small_run(str(tmp_path_factory.mktemp("source") / "pre"), digit_files, epochs=1).path)


@pytest.fixture(scope="module")
def target(digit_files, tmp_path_factory) -> str:
    """NAME-train.beton with NAME-test.beton beside it."""
    folder = tmp_path_factory.mktemp("target")
    for half, file in zip(("train", "test"), digit_files, strict=True):
        for suffix in ("", ".json"):
            shutil.copy(f"{file}{suffix}", folder / f"four-{half}.beton{suffix}")
    return str(folder / "four-train.beton")


def words(source: Path, target: str, out: Path, **changes: str) -> list[str]:
    flags = {
        "to": target,
        "out": str(out),
        "recipe": "finetune_digits",
        "epochs": "1",
        "seeds": "1",
    } | changes
    settings = ("views.crop_px=16", "log.page=false", "log.tensorboard=false", "engine.compile=off")
    more = flagged(flags, settings)
    return ["transfer", str(source), *more[: more.index("--finetune_set")]]


@pytest.fixture(scope="module")
def matrix(source: Path, target: str, tmp_path_factory, ran) -> Path:
    """A finished one of one source and one target."""
    out = tmp_path_factory.mktemp("transfer") / "out"
    assert main(words(source, target, out)) == 0
    assert ran == [str(out / f"{name}--four/finetune-seed0") for name in ("random", "1-pre")]
    return out


def test_the_matrix_has_random_weights_first_and_three_measures(
    matrix: Path, source: Path, target: str
) -> None:
    result = read_json(matrix / "transfer.json")
    assert result["sources"] == ["random", source.name] and result["targets"] == ["four"]
    assert result["budget"] == {"recipe": "finetune_digits", "epochs": 1}
    random, given = result["cells"]
    test = target.replace("-train", "-test")
    neighbours = evaluated("knn", str(source), test, target, knn_k=(20,)).score["knn"]
    assert given["knn"]["mean"] == pytest.approx(neighbours["20"]["top1"])
    assert given["linear"]["mean"] == evaluated("linear", str(source), test, target).score["top1"]
    for cell, name in ((random, "random"), (given, "1-pre")):
        run = Run(matrix / f"{name}--four/finetune-seed0")
        assert cell["finetuned"]["mean"] == run.summary["top1"]
    answers = [load_file(matrix / f"{name}--four/finetune-seed0/analysis/top1-images.safetensors") for name in
               ("random", "1-pre")]  # fmt: skip
    gain = np.subtract(*((each["label"] == each["predicted"]).astype(float) for each in answers[::-1]))
    assert given["finetuned"]["difference"]["interval"] == pytest.approx(
        [100 * end for end in interval_of_mean(gain)]
    )


def test_random_weights_are_those_of_a_training_before_its_first_step(matrix: Path, source: Path) -> None:
    """The source's network at the same seed, before anything was learned."""
    random = load_file(matrix / "random/source-seed0/backbone.safetensors")
    settings = Run(source).settings
    first = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0).state_dict()
    assert random.keys() == first.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(random[name], value)
    assert Run(matrix / "random--four/finetune-seed0").settings.init == str(matrix / "random/source-seed0")


def test_more_seeds_later_have_random_weights_of_their_own(
    matrix: Path, source: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Stage] = []

    def stop(stages: list[Stage]) -> None:
        asked.extend(stages)
        raise Stopped("now")

    kept = (matrix / "transfer.json").read_bytes()
    monkeypatch.setattr("vitds.jobs.experiment.run_stages", stop)
    assert main(words(source, target, matrix, seeds="3")) != 0
    (matrix / "transfer.json").write_bytes(kept)
    inits = [Path(stage.command[-1]).name for stage in asked if stage.run.parent.name == "random--four"]
    assert inits == ["source-seed1", "source-seed2"]


def test_the_files_beside_have_the_same_figures(matrix: Path) -> None:
    cells = read_json(matrix / "transfer.json")["cells"]
    rows = list(csv.DictReader((matrix / "transfer.csv").open()))
    assert [float(row["top1"]) for row in rows] == [
        cell[key]["mean"] for cell in cells for key in ("knn", "linear", "finetuned")
    ]
    page = (matrix / "report.html").read_text()
    assert "fine-tuned by finetune_digits for 1 epochs" in page and "data:image/png;base64," in page


def test_a_finished_matrix_prints(matrix: Path, source: Path, target: str, ran, capsys) -> None:
    ran.clear()
    assert main(words(source, target, matrix)) == 0
    assert ran == [] and "fine-tuned: random" in capsys.readouterr().out


def test_a_heat_map_is_darker_where_figures_are_smaller(tmp_path: Path) -> None:
    (tmp_path / "map.png").write_bytes(draw_heat_maps({"kNN": [[10.0, 90.0]]}, ["a"], ["x", "y"]))
    grey = np.asarray(Image.open(tmp_path / "map.png").convert("L"), float)
    row = grey[grey.shape[0] // 2]
    inside = row[len(row) // 2 - 60 : len(row) // 2 + 60]
    assert inside[0] < inside[-1]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"to": "a.beton"}, 2, "--to a.beton: a target is NAME-train.beton, with NAME-test.beton beside it"),
        ({"to": "absent-train.beton"}, 3, "absent-train.beton: cannot be opened"),
        ({"recipe": "idmm_digits"}, 2, "recipe idmm_digits is for `vitds pretrain`"),
        ({"seeds": "0"}, 2, "--seeds 0: must be 1 or more"),
        ({"epochs": "0"}, 2, "epochs: must be greater than or equal to 1"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line_before_anything_runs(
    source: Path, target: str, tmp_path: Path, capsys, changes: dict[str, str], status: int, said: str
) -> None:
    out = tmp_path / "out"
    found, line = refusal(words(source, target, out, **changes), out, capsys)
    assert found == status and said in line


def test_runs_and_targets_that_do_not_fit_are_refused(
    source: Path, target: str, unlabelled: str, digit_files, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"

    def refused(*command: str) -> str:
        assert main(list(command)) != 0 and not out.exists()
        return capsys.readouterr().err

    assert "RUN is missing" in refused("transfer", *words(source, target, out)[2:])
    assert "is no finished run" in refused(*words(tmp_path / "gone", target, out))
    assert "is given 2 times; leave one" in refused(*words(source, target, out), str(source))
    assert "there is another target four" in refused(*words(source, target, out), "--to", target)
    for suffix in ("", ".json"):
        shutil.copy(f"{unlabelled}{suffix}", tmp_path / f"none-train.beton{suffix}")
        shutil.copy(f"{digit_files[1]}{suffix}", tmp_path / f"none-test.beton{suffix}")
    assert "has no labels" in refused(*words(source, str(tmp_path / "none-train.beton"), out))


def test_images_of_another_kind_are_refused(source: Path, target: str, tmp_path: Path, capsys) -> None:
    large = shutil.copytree(source, tmp_path / "large")
    settings = large / "settings.yaml"
    settings.write_text(settings.read_text().replace("crop_px: 16", "crop_px: 224"))
    assert main(words(large, target, tmp_path / "out")) == 3
    said = capsys.readouterr().err
    assert "its images have 20 pixels on their short side" in said and "they are of another kind" in said


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/pets", "runs/birds"], ["pets", "birds"]),
        (["a/pre", "b/pre"], ["a/pre", "b/pre"]),
        (["runs/random"], ["runs/random"]),
    ],
)
def test_a_table_names_sources_by_the_shortest_ends_that_tell_them_apart(
    paths: list[str], names: list[str]
) -> None:
    assert list(_short_names(paths).values()) == names


def test_each_network_has_a_random_row_of_its_own_also_where_they_share_a_timm_name(tmp_path: Path) -> None:
    runs = [Run(tmp_path / name) for name in ("narrow", "wide", "wide-seed1", "vit")]
    names = ("resnet18", "resnet18", "resnet18", "deit_tiny_patch16_224")
    for run, name in zip(runs, names, strict=True):
        options = {"channels": [8, 16, 32, 64]} if run.path.name == "narrow" else {}
        run.path.mkdir()
        save_settings(run, Settings.model_validate({"backbone": {"name": name, "options": options}}))
        write_json(run.path / "summary.json", {})
    sources = _sources([str(run.path) for run in runs[:3]], tmp_path / "out", seeds=2)
    assert [source.title for source in sources] == ["random narrow", "random wide", "narrow", "wide"]
    several = _sources([str(run.path) for run in (runs[0], runs[3])], tmp_path / "out", seeds=1)
    assert [source.title for source in several[:2]] == ["random resnet18", "random deit_tiny_patch16_224"]


def test_a_source_called_random_is_told_from_the_random_row() -> None:
    assert _short_names(["random"])["random"] == f"{Path.cwd().name}/random"
