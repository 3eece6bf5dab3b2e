"""What evaluations leave in RUN/analysis: features that the next one takes, and what was found."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

from tests.engine.training import small_run_path
from vitds.cli import main
from vitds.data.beton import labelled, open_beton
from vitds.data.build import build_beton
from vitds.evaluate import opened
from vitds.evaluate.answers import class_score
from vitds.evaluate.few_shot import few_shot
from vitds.evaluate.files import file_features
from vitds.evaluate.kept import feature_facts
from vitds.evaluate.opened import open_model
from vitds.evaluate.retrieval import retrieve
from vitds.jobs import eval_kinds
from vitds.jobs.evaluate import KINDS, evaluate, top1_of_run
from vitds.jobs.scene import open_scene
from vitds.runs.directory import Run, read_json


@pytest.fixture(scope="module")
def trained(rank_pool, digit_files, tmp_path_factory) -> Path:
    """A fine-tuned run; tests change copies of it."""
    run = tmp_path_factory.mktemp("analysed") / "run"
    options = {"method": "supervised", "checkpoint__every_steps": 2, "checkpoint__keep": 9}
    rank_pool(1).run(small_run_path, str(run), digit_files, **options)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of which features were made, as it happens."""
    made = []

    def noted(settings, model, file, device):
        made.append(Path(file.path).name)
        return file_features(settings, model, file, device)

    monkeypatch.setattr(eval_kinds, "file_features", noted)
    return made


def kept(run: Path) -> list[Path]:
    return sorted((run / "analysis").glob("features-*.safetensors"))


def test_features_are_made_once_for_all_kinds(run: Path, passes: list[str]) -> None:
    shutil.rmtree(run / "analysis")
    first = {kind: evaluate(kind, str(run)) for kind in KINDS}
    assert passes == ["test.beton", "train.beton"] and len(kept(run)) == 2
    assert {kind: evaluate(kind, str(run)) for kind in KINDS} == first
    assert passes == ["test.beton", "train.beton"]


def test_the_end_of_a_run_leaves_them_too(run: Path, passes: list[str]) -> None:
    assert evaluate("top1", str(run))["top1"] == read_json(run / "summary.json")["top1"] and passes == []


def test_other_weights_have_features_of_their_own(run: Path, passes: list[str]) -> None:
    evaluate("top1", str(run / "checkpoints" / "step-00000002"))
    assert passes == ["test.beton"] and len(kept(run)) == 2
    with safe_open(run / "backbone.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) * 1.01 for name in file.keys()}  # noqa: SIM118 (no mapping)
    save_file(weights, run / "backbone.safetensors")
    evaluate("top1", str(run))
    assert passes == ["test.beton"] * 2 and len(kept(run)) == 3


def test_everything_that_features_depend_on_is_in_their_key(run: Path, digit_files) -> None:
    settings, file = Run(run).settings, open_beton(digit_files[1])

    def changed(section: str, **values: object):
        own = getattr(settings, section).model_copy(update=values)
        return feature_facts(settings.model_copy(update={section: own}), "w", file)

    plain = feature_facts(settings, "w", file)
    assert plain == feature_facts(settings, "w", open_beton(digit_files[1]))
    others = [
        feature_facts(settings, "other", file),
        feature_facts(settings, "w", open_beton(digit_files[0])),
        feature_facts(settings, "w", file.take(np.arange(3))),
        changed("views", crop_px=24),
        changed("views", mean=(0.5, 0.5, 0.5)),
        changed("views", std=(0.5, 0.5, 0.5)),
        changed("backbone", options={"global_pool": "avg"}),
        changed("engine", precision="bf16"),
    ]
    texts = {json.dumps(facts, sort_keys=True) for facts in [plain, *others]}
    assert len(texts) == 1 + len(others)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def of_another_key(path: Path) -> None:
    text = path.read_bytes()
    path.write_bytes(text.replace(b"fp32", b"bf16", 1))


@pytest.mark.parametrize("damage", [cut, turn_a_bit, of_another_key, Path.unlink])
def test_what_is_not_as_it_was_written_is_made_anew(run: Path, passes: list[str], damage) -> None:
    (path,) = kept(run)
    before = path.read_bytes()
    score = evaluate("top1", str(run))
    damage(path)
    assert evaluate("top1", str(run)) == score and passes == ["test.beton"]
    assert path.read_bytes() == before


def test_a_run_that_cannot_be_written_to_is_evaluated_all_the_same(run: Path, trained: Path, capsys) -> None:
    shutil.rmtree(run / "analysis")
    (run / "analysis").write_text("a file where the folder would be")
    score = evaluate("top1", str(run))
    assert score["top1"] == evaluate("top1", str(trained))["top1"]
    assert [note.partition(":")[0] for note in score["notes"]] == [
        "the features were not kept, the next evaluation computes them again",
        "what was found is not kept in the run",
    ]
    assert main(["eval", "top1", str(run)]) == 0
    assert "what was found is not kept in the run: " in capsys.readouterr().out


def test_the_json_on_the_disk_is_the_one_that_is_printed(run: Path, capsys) -> None:
    for kind in KINDS:
        assert main(["eval", kind, str(run), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert read_json(run / "analysis" / f"{kind}.json") == printed
        assert {"kind", "model", "data", "images", "data_hash", "weights", "classes", "notes"} <= set(printed)


def test_top1_says_everything_of_its_answers(run: Path) -> None:
    score = evaluate("top1", str(run))
    images = load_file(run / "analysis" / "top1-images.safetensors")
    file = open_beton(score["data"])
    assert images["label"].tolist() == file.labels.tolist() and images["index"].tolist() == list(range(20))
    right = images["label"] == images["predicted"]
    assert score["top1"] == pytest.approx(100 * right.mean()) and score["majority"] == 25
    assert sum(count for *_, count in score["confusion"]) == 20
    assert [row["class"] for row in score["per_class"]] == score["classes"] == list(file.manifest.classes)
    assert sum(each["images"] for each in score["reliability"]) == 20
    assert score["top1_interval"][0] <= score["top1"] <= score["top1_interval"][1]
    assert (images["probability"] > 0.25).all() and (images["probability"] <= 1).all()


def test_images_that_were_skipped_as_damaged_shift_no_others(rank_pool, digit_files, tmp_path: Path) -> None:
    whole = []
    for half, lost in (("train", 3), ("test", 1)):
        path = tmp_path / f"{half}.beton"
        build_beton([Path(digit_files[0]).parent / half], path, storage="jpg", workers=1)
        whole.append(open_beton(path))
        with path.open("r+b") as pixels:
            pixels.seek(int(whole[-1].offsets[lost]) + 2)
            pixels.write(bytes(int(whole[-1].sizes[lost]) - 2))
    files = tuple(str(file.path) for file in whole)
    options = {"method": "supervised", "epochs": 1, "data__damaged": "skip"}
    rank_pool(1).run(small_run_path, str(tmp_path / "run"), files, **options)
    images = load_file(tmp_path / "run/analysis/top1-images.safetensors")
    assert images["index"].tolist() == [0, *range(2, 20)]
    assert images["label"].tolist() == whole[1].labels[images["index"]].tolist()
    assert read_json(tmp_path / "run/analysis/top1.json")["images"] == 19
    scene = open_scene(Run(tmp_path / "run"), *whole)
    assert scene.query.index.tolist() == images["index"].tolist()
    assert scene.bank.images == len(scene.bank_features) == 51 and 3 not in scene.bank.index


def test_the_other_kinds_say_what_their_functions_do(run: Path) -> None:
    found, (train, test) = {kind: evaluate(kind, str(run)) for kind in KINDS}, files_of(run)
    model = open_model(str(run))
    bank, query = (
        file_features(model.settings, model.backbone, file, torch.device("cpu")) for file in (train, test)
    )
    pair = (bank.rows_MD, bank.label_M, query.rows_MD, query.label_M)
    ranked = retrieve(*pair, classes=4)
    assert found["retrieval"]["map"] == ranked.mean_precision
    assert found["retrieval"]["recall"] == {str(k): share for k, share in ranked.recall().items()}
    five = few_shot(*pair, shots=5, classes=4)
    assert found["fewshot"]["fewshot"]["5"]["top1_draws"] == pytest.approx(
        [answers.top(1) for answers in five]
    )
    assert found["fewshot"]["fewshot"]["5"]["top1"] == pytest.approx(np.mean([a.top(1) for a in five]))
    first = asdict(class_score(five[0], 4))
    assert first["top1"] == pytest.approx(found["fewshot"]["fewshot"]["5"]["top1_draws"][0])
    assert list(found["fewshot"]["fewshot"]) == ["1", "2", "5", "10"]
    assert set(found["knn"]["knn"]["5"]) >= {"balanced_accuracy", "macro_f1", "majority", "top1_interval"}
    assert found["linear"]["reliability"] and found["linear"]["ece"] >= 0


def files_of(run: Path):
    data = Run(run).settings.data
    return open_beton(data.train), open_beton(data.test)


def test_classes_with_too_few_images_for_the_shots_are_said(run: Path, digit_files, tmp_path: Path) -> None:
    small = tmp_path / "small"
    for label in range(4):
        shutil.copytree(Path(digit_files[0]).parent / "test" / f"digit {label}", small / f"digit {label}")
    build_beton([small], tmp_path / "small.beton", workers=1)
    score = evaluate("fewshot", str(run), bank=str(tmp_path / "small.beton"))
    assert [score["fewshot"][shots]["short_classes"] for shots in ("5", "10")] == [0, 4]
    assert any("4 of 4 classes have fewer than 10 images in" in note for note in score["notes"])


def test_a_result_on_other_images_does_not_replace_the_runs_own(run: Path, digit_files) -> None:
    own = (run / "analysis" / "top1.json").read_bytes()
    evaluate("top1", str(run), data=digit_files[0])
    assert (run / "analysis" / "top1.json").read_bytes() == own
    (other,) = set((run / "analysis").glob("top1-*.json"))
    assert read_json(other)["images"] == 52
    evaluate("top1", str(run), data=digit_files[1])  # the run's own, by its name
    assert len(list((run / "analysis").glob("top1*.json"))) == 2


def test_a_checkpoint_has_a_folder_of_its_own(run: Path) -> None:
    own = (run / "analysis" / "top1.json").read_bytes()
    evaluate("top1", str(run / "checkpoints" / "step-00000002"))
    assert (run / "analysis" / "top1.json").read_bytes() == own
    assert read_json(run / "analysis" / "step-00000002" / "top1.json")["images"] == 20


def test_images_without_a_label_are_left_out(run: Path, digit_files, tmp_path: Path) -> None:
    images = Path(digit_files[0]).parent / "test"
    more = tmp_path / "more"
    more.mkdir()
    for number in range(3):
        shutil.copy(images / "digit 0" / f"{number}.png", more / f"{number}.png")
    build_beton([images], tmp_path / "some.beton", workers=1, unlabelled=more)
    assert open_beton(tmp_path / "some.beton").images == 23
    score, whole = evaluate("top1", str(run), data=str(tmp_path / "some.beton")), evaluate("top1", str(run))
    assert (score["images"], score["top1"], score["confusion"]) == (20, whole["top1"], whole["confusion"])


def test_a_bank_that_is_also_the_data_is_said(run: Path, digit_files) -> None:
    score = evaluate("knn", str(run), data=digit_files[0])
    assert score["notes"] == [f"{digit_files[0]} is data and bank: each image finds itself"]


def test_of_a_timm_model_nothing_is_written(
    digit_files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its published weights cannot be had here, so it has random ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        opened,
        "timm",
        SimpleNamespace(
            create_model=lambda name, pretrained, **options: timm.create_model(name, **options),
        ),
    )
    score = evaluate("retrieval", "test_vit", data=digit_files[1], bank=digit_files[0])
    assert score["map"] > 20 and score["weights"] is None and list(tmp_path.iterdir()) == []


def evaluated_twice(run: str) -> tuple[float, float, int]:
    """Top-1 of a run, computed and from the kept features; and how many files of features there are."""
    file = labelled(open_beton(Run(Path(run)).settings.data.test))
    found = [top1_of_run(Run(Path(run)), file, torch.device("cpu"))["top1"] for _ in range(2)]
    return *found, len(kept(Path(run)))


def test_two_ranks_make_and_take_the_features_together(run: Path, rank_pool) -> None:
    shutil.rmtree(run / "analysis")
    top1 = read_json(run / "summary.json")["top1"]
    assert rank_pool(2).run(evaluated_twice, str(run)) == [(top1, top1, 1)] * 2


def test_a_linear_classifier_of_one_class_is_refused(run: Path, digit_files, tmp_path: Path, capsys) -> None:
    shutil.copytree(Path(digit_files[0]).parent / "test" / "digit 0", tmp_path / "one" / "digit 0")
    one = str(tmp_path / "one.beton")
    build_beton([tmp_path / "one"], one, workers=1)
    assert main(["eval", "linear", str(run), "--data", one, "--bank", one]) == 3
    said = capsys.readouterr().err
    assert f"{one}: all 5 labelled images are of one class, 'digit 0'; a linear classifier needs two" in said
    assert "Give another file with --bank" in said
