"""`vitds compare`: methods at equal epochs, compute or minutes, at toy length on the digits."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.experiments.toy import TINY, flagged, refusal
from vitds.cli import main
from vitds.config.load import load_settings
from vitds.data.beton import open_beton
from vitds.errors import Stopped
from vitds.jobs import compare_methods
from vitds.jobs.experiment import RECORD, _hash, planned_training, training_speed
from vitds.jobs.experiment_result import figures
from vitds.jobs.fit_plan import Speed
from vitds.runs.directory import Run, read_json

BATCH = ("batch.global_images=24", "batch.chunk_images=12")


def words(files: tuple[str, str], out: Path, **changes: str) -> list[str]:
    flags = {"data": files[0], "test": files[1], "methods": METHODS, "amount": "1", "seeds": "1"}
    flags |= {"finetune_recipe": "finetune_digits", "finetune_epochs": "2", "out": str(out)} | changes
    return ["compare", *flagged(flags), *(word for setting in BATCH for word in ("--set", setting))]


METHODS = "idmm=idmm_digits,mocov3=mocov3_digits,scratch"


@pytest.fixture(scope="module")
def comparison(digit_files, tmp_path_factory, ran) -> Path:
    """A finished one of one seed."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert main(words(digit_files, out)) == 0
    assert len(ran) == 5
    return out


def test_each_method_is_pretrained_by_its_recipe_and_all_are_fine_tuned_alike(comparison: Path) -> None:
    runs = {path.parent.name: Run(path) for path in comparison.glob("*/finetune-seed0")}
    assert runs.keys() == {"idmm", "mocov3", "scratch"}
    pretrained = [Run(comparison / name / "pretrain-seed0").settings for name in ("idmm", "mocov3")]
    assert [(each.method, each.epochs) for each in pretrained] == [("idmm", 1), ("mocov3", 1)]
    assert [runs[name].settings.epochs for name in runs] == [3 if name == "scratch" else 2 for name in runs]
    one, other = runs["idmm"].settings, runs["mocov3"].settings
    assert one.model_copy(update={"init": other.init}) == other
    assert runs["scratch"].settings.init is None


def test_the_table_has_neighbours_linear_classifier_and_fine_tuning(comparison: Path) -> None:
    result = read_json(comparison / "comparison.json")
    assert list(result["measures"]) == ["knn", "linear", "finetuned"]
    by_arm = {arm["arm"]: arm for arm in result["arms"]}
    assert by_arm["scratch"]["knn"] is None and by_arm["scratch"]["linear"] is None
    for name in ("idmm", "mocov3"):
        linear = json.loads((comparison / name / "pretrain-seed0/analysis/linear.json").read_text())
        assert by_arm[name]["linear"]["mean"] == pytest.approx(linear["top1"])
        assert by_arm[name]["finetuned"]["mean"] == Run(comparison / name / "finetune-seed0").summary["top1"]
    assert "Methods at equal epochs" in (comparison / "report.html").read_text()


def plan(
    data: tuple[str, str], out: Path, capsys: pytest.CaptureFixture[str], **changes: str
) -> list[list[str]]:
    """The rows of a plan: arm, training, views, x, px, images, epochs, steps, units."""
    assert main([*words(data, out, **changes), "--plan"]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if line[1:2] in (["pretrain"], ["finetune"])]


def test_equal_compute_counts_views_pixels_and_teachers(digit_files, tmp_path: Path, capsys) -> None:
    one, tuned, other, _, scratch = plan(
        digit_files, tmp_path / "a", capsys, budget="compute", amount="60", methods=METHODS
    )
    units = [float(row[-1].replace(",", "")) for row in (one, tuned, other, scratch)]
    assert units[0] == pytest.approx(60, rel=0.05) and units[2] == pytest.approx(60, rel=0.05)
    assert int(one[6]) / int(other[6]) == pytest.approx(4 * 2 / (6 * 3 * 4 / 9), rel=0.1)
    assert units[3] == pytest.approx(60 + units[1], rel=0.05)


def test_equal_minutes_go_by_the_speed_of_this_machine(
    digit_files, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitds.jobs.experiment.measure", lambda *_: Speed(epoch_s=10.0, around_s=30.0))
    rows = plan(digit_files, tmp_path / "a", capsys, budget="minutes", amount="3")
    # (180 - 30) / 10 epochs; scratch also has the 30 + 2 * 10 seconds of the fine-tuning.
    assert [int(row[6]) for row in rows] == [15, 2, 15, 2, 20]


def test_a_backbone_is_for_all_stages_and_takes_no_options_of_another(digit_files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["compare", "--data", digit_files[0], "--test", digit_files[1], "--out", str(out)]
    command += ["--methods", METHODS, "--finetune_recipe", "finetune_digits", "--amount", "1", "--plan"]
    assert main([*command, "--backbone", "no_such_net"]) == 2
    patch = [word for flag in ("--set", "--finetune_set") for word in (flag, "views.crop_px=32")]
    assert main([*command, "--set", "backbone.patch_drop=0", "--backbone", "resnet18", *patch]) == 0


def test_options_given_by_hand_are_those_of_the_backbone_given_by_hand(
    digit_files, tmp_path: Path, capsys
) -> None:
    small = "backbone.options={patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3}"
    command = ["compare", "--data", digit_files[0], "--test", digit_files[1], "--out", str(tmp_path / "out")]
    command += ["--methods", METHODS, "--finetune_recipe", "finetune_digits", "--amount", "1", "--plan"]
    # Without them the model has patches of 16 pixels, which 12 are not made of.
    assert main([*command, "--backbone", "vit_small_patch16_224", "--set", small]) == 0
    assert main([*command, "--backbone", "vit_small_patch16_224"]) == 2


def test_a_speed_is_measured_whatever_is_evaluated_along_a_training(digit_files) -> None:
    along = {"every_epochs": 1, "hold_out": 0.2, "choose": "best"}
    flags = {"data": digit_files[0], "test": digit_files[1], "epochs": 2}
    words = [f"eval.{name}={value}" for name, value in along.items()]
    words += [*TINY, "batch.global_images=8", "batch.chunk_images=8"]
    settings = load_settings(recipe="finetune_digits", command="finetune", assignments=words, flags=flags)
    speed = training_speed(planned_training("finetune", settings), open_beton(digit_files[1]))
    assert speed.epoch_s > 0


def test_knn_of_an_experiment_has_20_neighbours_whatever_a_recipe_measures(
    comparison: Path, digit_files, tmp_path: Path
) -> None:
    own = {title: [str(comparison / title / "pretrain-seed0")] for title in ("idmm", "mocov3")}
    expected = figures("knn", own)
    for title, (run,) in own.items():
        shutil.copytree(run, tmp_path / title)
        text = (tmp_path / title / "settings.yaml").read_text()
        assert "knn_k: [5, 20]" in text
        (tmp_path / title / "settings.yaml").write_text(text.replace("knn_k: [5, 20]", "knn_k: [5]"))
    found = figures("knn", {title: [str(tmp_path / title)] for title in own})
    assert [each["mean"] for each in found.values()] == [each["mean"] for each in expected.values()]


def test_a_recipe_file_that_changed_since_is_refused(
    digit_files, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "own.yaml", tmp_path / "out"
    recipe.write_text("base: idmm_digits\n", "utf-8")
    command = words(digit_files, out, methods=f"own={recipe},scratch")
    monkeypatch.setattr("vitds.jobs.experiment.run_stages", lambda _: (_ for _ in ()).throw(Stopped("now")))
    assert main(command) != 0 and (out / RECORD).exists()
    capsys.readouterr()
    written = out / "recipes/own-pretrain.yaml"
    written.write_text(written.read_text().replace("lr_peak: 0.001", "lr_peak: 0.002"), "utf-8")
    assert main([*command, "--plan"]) == 5
    assert "own-pretrain.yaml was changed after the experiment began" in capsys.readouterr().err
    written.write_text(written.read_text().replace("lr_peak: 0.002", "lr_peak: 0.001"), "utf-8")
    assert main([*command, "--plan"]) == 0
    recipe.write_text("base: idmm_digits\noptimizer: {lr_peak: 2e-3}\n", "utf-8")
    assert main([*command, "--plan"]) == 5
    assert "was begun with other words: recipe_files was" in capsys.readouterr().err


def test_a_recipe_that_an_older_version_wrote_goes_on(
    digit_files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks a setting that there is now, and means its default."""
    out = tmp_path / "out"
    monkeypatch.setattr("vitds.jobs.experiment.run_stages", lambda _: (_ for _ in ()).throw(Stopped("now")))
    assert main(words(digit_files, out)) != 0
    for written in (out / "recipes").iterdir():
        older = re.sub(r"\n +average_decay: .*", "", written.read_text())
        assert older != written.read_text()
        record = (out / RECORD).read_text()
        (out / RECORD).write_text(record.replace(_hash(written.read_text()), _hash(older)))
        written.write_text(older)
    assert main([*words(digit_files, out), "--plan"]) == 0


def test_other_weights_to_begin_from_than_those_of_the_first_seeds_are_refused(
    digit_files, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out"
    save_file({"norm.weight": np.ones(24, np.float32)}, weights)
    command = [*words(digit_files, out), "--set", f"init={weights}"]
    monkeypatch.setattr("vitds.jobs.experiment.run_stages", lambda _: (_ for _ in ()).throw(Stopped("now")))
    assert main(command) != 0 and main([*command, "--plan"]) == 0
    save_file({"norm.weight": np.zeros(24, np.float32)}, weights)
    capsys.readouterr()
    assert main([*command, "--plan"]) == 5
    assert "weights.safetensors: other weights than when the experiment began" in capsys.readouterr().err


def test_a_fine_tuning_recipe_with_weights_of_its_own_is_refused(digit_files, tmp_path: Path, capsys) -> None:
    """Scratch would begin from them."""
    (tmp_path / "fine.yaml").write_text("base: finetune_digits\ninit: weights.safetensors\n", "utf-8")
    command = words(digit_files, tmp_path / "out", finetune_recipe=str(tmp_path / "fine.yaml"))
    status, line = refusal(command, tmp_path / "out", capsys)
    assert status == 2 and "fine.yaml has init weights.safetensors: a fine-tuning begins from its" in line


def test_training_images_are_no_test_images(digit_files, tmp_path: Path, capsys) -> None:
    command = words(digit_files, tmp_path / "out", test=digit_files[0])
    status, line = refusal(command, tmp_path / "out", capsys)
    assert status == 2 and "holds the same images as --data" in line


def test_a_backbone_given_by_hand_has_timms_own_options_in_every_recipe(
    digit_files, tmp_path: Path, capsys
) -> None:
    """Also in one whose backbone has that name, with options of its own."""
    flags = {"data": digit_files[0], "test": digit_files[1], "out": str(tmp_path / "out"), "amount": "1"}
    flags |= {"methods": "idmm=photos_cpu,simclr=simclr_deit_tiny", "finetune_recipe": "finetune_photos_cpu"}
    command = ["compare", *flagged(flags, ["views.crop_px=32"]), "--backbone", "resnet18", "--plan"]
    assert main(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize("record", ["{}", '{"kind": "comparison", "asked": {}, "arms": [{"name": "a"}]}'])
def test_a_record_that_is_none_is_named(digit_files, tmp_path: Path, capsys, record: str) -> None:
    (tmp_path / RECORD).write_text(record)
    assert main(words(digit_files, tmp_path)) == 5
    assert "experiment.json is no record of an experiment: it lacks '" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "seed=5"], "--set seed: --seeds says how many seeds there are"),
        (["--set", "epochs=7"], "--set epochs: --amount says how long each method pretrains"),
        (["--set", "data.train=a.beton"], "--set data.train: --data names the training images"),
        (["--set", "init=/nowhere"], "/nowhere"),
        (["--finetune_set", "init=a"], "--finetune_set init: a fine-tuning begins from its pretraining"),
        (
            ["--finetune_set", "backbone.name=resnet18"],
            "--finetune_set backbone.name is 'resnet18', but the ",
        ),
        (["--finetune_set", "foo=1"], "(from --finetune_set foo=1)"),
        (["--finetune_set", "head.kind=sharded"], "head.kind sharded is for the instance head"),
        (["--finetune_set", "engine.attention=flash"], "engine.attention is flash, which is for GPUs"),
        (["--set", "engine.precision=fp16"], "engine.precision is fp16, which is for GPUs"),
    ],
)
@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_what_a_stage_would_refuse_or_ignore_is_refused_before_anything_runs(
    digit_files, tmp_path: Path, capsys, more: list[str], said: str
) -> None:
    out = tmp_path / "out"
    status, line = refusal([*words(digit_files, out), *more], out, capsys)
    assert status != 0 and said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: idmm_digits\nbackbone: {options: {patch_size: 4, embed_dim: 48}}\n", "with options "),
        ("base: idmm_digits\nbackbone: resnet18\n", "backbone: "),
        ("base: idmm_digits\nbackbone:\n", "backbone: "),
    ],
)
def test_recipes_of_two_networks_or_of_none_are_refused(
    digit_files, tmp_path: Path, capsys, text: str, said: str
) -> None:
    (tmp_path / "other.yaml").write_text(text, "utf-8")
    files = ["--data", digit_files[0], "--test", digit_files[1], "--finetune_recipe", "finetune_digits"]
    methods = f"idmm=idmm_digits,other={tmp_path / 'other.yaml'}"
    command = ["compare", *files, "--methods", methods, "--amount", "1", "--out", str(tmp_path / "out")]
    status, line = refusal(command, tmp_path / "out", capsys)
    assert status == 2 and said in line


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"methods": "idm"}, 2, "--methods: idm is unknown; did you mean idmm?"),
        ({"methods": "supervised"}, 2, "--methods: supervised is unknown"),
        ({"methods": "idmm,idmm"}, 2, "idmm is given twice; leave one"),
        ({"methods": "../idmm=photos_cpu"}, 2, "'../idmm' names no folder"),
        ({"methods": "scratch=photos_cpu"}, 2, "scratch has no pretraining, and so no recipe"),
        ({"methods": ","}, 2, "--methods is empty; name some of idmm, "),
        ({"methods": "simclr=idmm_digits"}, 2, "recipe idmm_digits is of method idmm, not simclr"),
        ({"methods": "idmm=photos_cpu,mocov3=mocov3_digits"}, 2, "name one for all with --backbone"),
        ({"amount": "0"}, 2, "--amount 0: must be more than 0"),
        ({"amount": "inf", "budget": "compute"}, 2, "--amount inf: must be more than 0, and finite"),
        ({"amount": "1.5"}, 2, "--amount 1.5: of epochs it must be a whole number"),
        ({"amount": "0.1", "budget": "compute"}, 2, "Give at least that"),
        ({"data": "absent.beton"}, 3, "absent.beton: cannot be opened"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line_before_anything_runs(
    digit_files, tmp_path: Path, capsys, changes: dict[str, str], status: int, said: str
) -> None:
    out = tmp_path / "out"
    found, line = refusal(words(digit_files, out, **changes), out, capsys)
    assert found == status and said in line


def test_a_method_without_a_recipe_for_the_images_is_refused(
    digit_files, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setitem(compare_methods.METHODS, "own", compare_methods.METHODS["simclr"])
    out = tmp_path / "out"
    status, line = refusal(words(digit_files, out, methods="own"), out, capsys)
    assert status == 2 and "own has no recipe that ends in " in line


def test_a_usual_recipe_is_that_of_the_images(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"data": "digits", "test": "digits", "methods": "idmm,simclr", "amount": "2", "out": "out"}
    assert (
        main(["compare", *(word for pair in flags.items() for word in (f"--{pair[0]}", pair[1])), "--plan"])
        == 0
    )
    assert "12 runs" in capsys.readouterr().out


def test_a_variant_of_a_method_is_an_arm_of_its_own(digit_files, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    hot = tmp_path / "hot.yaml"
    hot.write_text("base: idmm_digits\noptimizer: {lr_peak: 2e-3}\n", "utf-8")
    command = ["compare", "--data", "digits", "--test", "digits", "--amount", "2", "--out", "out", "--plan"]
    assert main([*command, "--methods", f"idmm,idmm-hot={hot},diet"]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    views = {line[0]: line[2] for line in lines if line[1:2] == ["pretrain"]}
    assert views == {"idmm": "6", "idmm-hot": "6", "diet": "1"}
