"""`vitds eval theory`: figures of real runs with rows and without, along training, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import vitds
from tests.engine.training import SMALL, small_run
from vitds.augment.images import normalise
from vitds.cli import main
from vitds.config.methods import METHODS, readers
from vitds.config.tree import Settings
from vitds.data.beton import open_beton
from vitds.data.build import build_beton
from vitds.data.loader import TrainLoader
from vitds.errors import UsageError
from vitds.evaluate.opened import open_model
from vitds.evaluate.theory import prototype_fidelity, semantic_mass, similarity_transfer
from vitds.jobs.theory import theory
from vitds.jobs.train import pretrain
from vitds.runs import checkpoint as checkpoints
from vitds.runs.directory import Run, read_json
from vitds.runs.metrics import read_metrics

EACH_EPOCH = {"checkpoint__every_epochs": 1, "checkpoint__keep": 9}


def train_all(folder: str, data: tuple[str, str], flat: str) -> None:
    small_run(f"{folder}/rows", data, epochs=2, eval__every_epochs=2, **EACH_EPOCH)
    small_run(f"{folder}/bank", data, method="simclr", epochs=2, **EACH_EPOCH)
    small_run(f"{folder}/fine", data, method="supervised", epochs=1)
    words = SMALL | {"head.kind": "sharded", "head.cosine": "true"}
    pretrain(
        recipe="idmm_digits",
        run=f"{folder}/sharded",
        data=flat,
        epochs=1,
        set=[f"{key}={value}" for key, value in words.items()],
    )


@pytest.fixture(scope="module")
def runs(rank_pool, digit_files, tmp_path_factory) -> Path:
    """Of an instance head (`rows`); the same sharded, by cosine and without labels (`sharded`); without rows
    (`bank`); fine-tuned (`fine`)."""
    folder = tmp_path_factory.mktemp("theory")
    flat = folder / "flat.beton"
    (folder / "images").mkdir()
    for number, image in enumerate(sorted((Path(digit_files[0]).parent / "train").rglob("*.png"))[:30]):
        shutil.copy(image, folder / "images" / f"{number:02}.png")
    build_beton([folder / "images"], flat, workers=1)
    rank_pool(1).run(train_all, str(folder), digit_files, str(flat))
    return folder


def steps(run: Path) -> list[str]:
    return [str(path) for path in checkpoints.list_checkpoints(run / "checkpoints")]


@torch.inference_mode()
def mean_features(run: Path) -> torch.Tensor:
    """Of each image over its crops of the first epochs, image by image."""
    model = open_model(steps(run)[-1])
    settings, backbone = model.settings, model.backbone.eval()
    file = open_beton(settings.data.train_files[0])
    loader = TrainLoader(file, settings, rank=0, ranks=1, micro_images=settings.batch.micro_images)
    found: dict[int, list[torch.Tensor]] = {image: [] for image in range(file.images)}
    for batch in loader.batches(0, 12 // settings.views.count * loader.steps_per_epoch):
        for crops, index, is_real in zip(batch.crops, batch.index, batch.is_real, strict=True):
            if is_real:
                found[int(index)] += backbone(normalise(crops, settings.views))
    assert {len(rows) for rows in found.values()} == {12}
    return torch.stack([torch.stack(rows).mean(0) for rows in found.values()])


def test_rows_and_features_of_a_run_are_compared_image_by_image(runs: Path) -> None:
    found, f_nD = theory(str(runs / "rows"))["theory"], mean_features(runs / "rows")
    held = load_file(Path(steps(runs / "rows")[-1]) / "model-0-of-1.safetensors")
    rows, bias = held["head.weight"], held["head.bias"]
    label = torch.arange(52) // 13
    assert found["prototype_cosine"] == pytest.approx(prototype_fidelity(rows, f_nD).cosine, abs=1e-4)
    assert found["own_row_first"] == pytest.approx(prototype_fidelity(rows, f_nD).first, abs=2)
    transfer = similarity_transfer(rows, f_nD)
    assert found["similarity_pearson"] == pytest.approx(transfer.pearson, abs=1e-3)
    mass = semantic_mass(f_nD, rows, bias, label)
    assert found["mass_ratio"] == pytest.approx(mass.ratio, abs=1e-4)
    assert found["off_target_mass"] == pytest.approx(mass.off_target, abs=1e-4)
    assert 0 < found["class_r2"] < 1 and 0 < found["rows_knn"] < 100 and found["features_auc"] > 0.5


def test_alignment_and_uniformity_are_those_of_the_probes_in_training(runs: Path) -> None:
    found = theory(str(runs / "rows"))["theory"]
    last = [line for line in read_metrics(Run(runs / "rows").metrics) if "probe/alignment" in line][-1]
    assert found["alignment"] == pytest.approx(last["probe/alignment"], rel=1e-3)
    assert found["uniformity"] == pytest.approx(last["probe/uniformity"], rel=1e-3)


def test_a_run_is_its_newest_checkpoint_and_each_keeps_its_own_figures(runs: Path, capsys) -> None:
    run, first, last = str(runs / "rows"), *steps(runs / "rows")
    assert main(["eval", "theory", run, first, last, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["runs"]
    assert scores[0]["theory"] == scores[2]["theory"] != scores[1]["theory"]
    analysis = runs / "rows" / "analysis"
    places = [analysis, analysis / Path(first).name, analysis / Path(last).name]
    assert [read_json(place / "theory.json") for place in places] == scores


def test_the_table_has_a_column_a_checkpoint(runs: Path, capsys) -> None:
    scores = theory(*steps(runs / "rows"))["runs"]
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("2  cosine of row"))
    values = [f"{score['theory']['prototype_cosine']:.3f}" for score in scores]
    assert line.split()[-3:] == [*values, "0.000"] and "[2] theory of" in printed


def test_a_sharded_cosine_head_without_labels_gives_what_needs_none(runs: Path) -> None:
    score, f_nD = theory(str(runs / "sharded")), mean_features(runs / "sharded")
    held = load_file(Path(steps(runs / "sharded")[-1]) / "head-0-of-1.safetensors")
    logit = F.normalize(f_nD, dim=1) @ F.normalize(held["weight"], dim=1).T / 0.1 + held["bias"]
    expected = float((1 - logit.softmax(1).diagonal()).mean())
    assert score["theory"]["off_target_mass"] == pytest.approx(expected, abs=1e-4)
    assert score["theory"]["mass_ratio"] is None and "rows_knn" not in score["theory"]
    assert "flat.beton has no two classes: what items 4 to 6 say" in " ".join(score["notes"])


def test_without_rows_the_features_of_the_checkpoint_before_and_the_methods_temperature_stand_for_them(
    runs: Path,
) -> None:
    first, last = (theory(name) for name in steps(runs / "bank"))
    assert "prototype_cosine" not in last["theory"] and "rows_auc" not in last["theory"]
    unit = F.normalize(mean_features(runs / "bank"), dim=1)
    expected = semantic_mass(unit / 0.2, unit, None, torch.arange(52) // 13).ratio
    assert last["theory"]["mass_ratio"] == pytest.approx(expected, abs=1e-4)
    assert 0 < last["theory"]["similarity_pearson"] < 1 and "similarity_pearson" not in first["theory"]
    assert f"item 3 is of the features at {first['checkpoint']} against" in " ".join(last["notes"])
    assert "no checkpoint before this one is kept: item 3 is left out" in first["notes"]


def test_without_a_softmax_over_images_item_4_is_left_out(runs: Path, monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "simclr", dataclasses.replace(METHODS["simclr"], temperature=None))
    score = theory(str(runs / "bank"))
    assert "mass_ratio" not in score["theory"]
    assert "the method has no softmax over images: item 4 is left out" in score["notes"]


def test_from_python_it_is_an_evaluation_like_the_others(runs: Path) -> None:
    run = str(runs / "rows")
    assert vitds.evaluate("theory", run) == theory(run)
    assert len(vitds.evaluate("theory", run, steps(runs / "rows")[0])["runs"]) == 2
    with pytest.raises(UsageError, match="`bank` does nothing for theory, which is of the training images"):
        vitds.evaluate("theory", run, bank="x.beton")
    with pytest.raises(UsageError, match="rows is given 2 times; leave one"):
        vitds.evaluate("theory", run, f"{run}/")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["eval", "theory", *words]) != 0
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


def test_what_is_no_pretraining_is_refused(runs: Path, capsys) -> None:
    assert "vit_tiny_patch16_224 is a timm model, and theory is for runs" in refusal(
        capsys, "vit_tiny_patch16_224"
    )
    assert "fine is a fine-tuned run, where images have no rows" in refusal(capsys, str(runs / "fine"))
    assert "does not exist; name a run directory" in refusal(capsys, str(runs / "nothing"))


def test_training_images_that_are_gone_or_others_are_asked_for(
    runs: Path, digit_files, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "rows", run)
    settings = run / "settings.yaml"
    settings.write_text(settings.read_text().replace(digit_files[0], "gone/train.beton"))
    said = refusal(capsys, str(run))
    assert "gone/train.beton, which the run names, is not there" in said and "with --data FILE.beton" in said
    said = refusal(capsys, str(run), "--data", digit_files[1])
    assert "does not hold the images that" in said and "name that file with --data FILE.beton" in said
    assert theory(str(run), data=digit_files[0])["theory"] == theory(str(runs / "rows"))["theory"]


def test_rows_that_are_nowhere_are_asked_for(runs: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "rows", run)
    newest = Path(steps(run)[-1])
    file = newest / "model-0-of-1.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "head" not in name}, file)
    manifest = read_json(newest / "manifest.json")
    manifest.pop("sha256")
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checkpoints._hash_and_sync(file)}
    manifest["sha256"] = checkpoints._hash_of(manifest)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    said = refusal(capsys, str(newest))
    assert f"{newest} does not hold the rows of the instance head; take another checkpoint" in said
    shutil.rmtree(run / "checkpoints")
    assert f"{run} has no checkpoint, and the rows of its instance head lie" in refusal(capsys, str(run))


def test_a_methods_temperature_is_a_key_of_its_own_section() -> None:
    keys = {name: facts.temperature for name, facts in METHODS.items() if facts.temperature}
    assert len(keys) >= 3
    for name, key in keys.items():
        assert readers(key) == [name] and reduce(getattr, key.split("."), Settings()) > 0
