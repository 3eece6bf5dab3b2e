"""`vitds ablate`: five arms, each with one part more, at toy length on the digits."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.experiments.toy import flagged, refusal
from vitds.cli import main
from vitds.config.load import load_settings
from vitds.data.catalogue import CATALOGUE
from vitds.evaluate.bootstrap import interval_of_mean
from vitds.plan.units import units_of_epoch
from vitds.runs.directory import Run

ARMS = ("none", "smoothing", "low-resolution", "multi-crop", "mixing")
RUNS = [f"{arm}/{name}-seed0" for arm in ARMS for name in ("pretrain", "finetune")]


def words(files: tuple[str, str], out: Path, **changes: str) -> list[str]:
    flags = {
        "data": files[0],
        "test": files[1],
        "recipe": "idmm_digits",
        "finetune_recipe": "finetune_digits",
    }
    flags |= {"epochs": "1", "finetune_epochs": "1", "seeds": "1", "out": str(out)} | changes
    return ["ablate", *flagged(flags)]


@pytest.fixture(scope="module")
def ablation(digit_files, tmp_path_factory, ran) -> Path:
    """A finished one of one seed."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    assert main(words(digit_files, out)) == 0
    assert ran == [str(out / run) for run in RUNS]
    return out


def test_each_arm_has_one_part_more_than_the_one_before(ablation: Path) -> None:
    arms = [Run(ablation / f"{arm}/pretrain-seed0").settings for arm in ARMS]
    assert [arm.head.label_smoothing for arm in arms] == [0, 0.1, 0.1, 0.1, 0.1]
    assert [arm.views.crop_px for arm in arms] == [24, 24, 12, 12, 12]
    assert [arm.views.count for arm in arms] == [1, 1, 1, 6, 6]
    assert [arm.mix.kind for arm in arms] == ["none"] * 4 + ["cutmix"]
    tuned = [Run(ablation / f"{arm}/finetune-seed0").settings for arm in ARMS]
    assert [each.init for each in tuned] == [str(ablation / f"{arm}/pretrain-seed0") for arm in ARMS]
    assert all(each.model_copy(update={"init": tuned[0].init}) == tuned[0] for each in tuned)


def test_the_table_has_what_the_runs_measured(ablation: Path, capsys) -> None:
    result = json.loads((ablation / "ablation.json").read_text())
    assert [arm["arm"] for arm in result["arms"]] == [
        *("none", "+ smoothing", "+ low resolution", "+ multi-crop", "+ CutMix")
    ]
    for name, arm in zip(ARMS, result["arms"], strict=True):
        pretrained, tuned = (Run(ablation / f"{name}/{stage}-seed0") for stage in ("pretrain", "finetune"))
        assert arm["knn"]["mean"] == pytest.approx(pretrained.summary["knn"]["20"]["top1"])
        assert arm["finetuned"]["mean"] == pytest.approx(tuned.summary["top1"])
        assert arm["finetuned"]["interval"] == pytest.approx(tuned.summary["top1_interval"])
        assert arm["finetuned"]["deviation"] is None, "one seed has none"
    first, last = (load_file(ablation / f"{name}/finetune-seed0/analysis/top1-images.safetensors") for name in
                   ("none", "mixing"))  # fmt: skip
    gain = (last["label"] == last["predicted"]).astype(float) - (first["label"] == first["predicted"])
    difference = result["arms"][-1]["finetuned"]["difference"]
    assert difference["difference"] == pytest.approx(100 * gain.mean())
    assert difference["interval"] == pytest.approx([100 * end for end in interval_of_mean(gain)])
    rows = list(csv.DictReader((ablation / "ablation.csv").open()))
    assert [float(row["knn_top1"]) for row in rows] == [arm["knn"]["mean"] for arm in result["arms"]]
    page = (ablation / "report.html").read_text()
    assert "Ablation of idmm_digits" in page and "+ low resolution" in page


def test_a_finished_ablation_prints_and_a_run_that_is_missing_is_made_again(
    ablation: Path,
    digit_files,
    ran,
    capsys,
) -> None:
    before = json.loads((ablation / "ablation.json").read_text())
    ran.clear()
    assert main(words(digit_files, ablation)) == 0
    assert ran == [] and "+ CutMix" in capsys.readouterr().out
    shutil.rmtree(ablation / "none/finetune-seed0")
    assert main(words(digit_files, ablation)) == 0
    assert ran == [str(ablation / "none/finetune-seed0")]
    assert "9 of 10 runs are finished" in capsys.readouterr().out
    again = json.loads((ablation / "ablation.json").read_text())
    assert again["arms"][0]["finetuned"] == before["arms"][0]["finetuned"]


def test_equal_compute_gives_each_arm_the_units_of_the_whole_recipe(
    digit_files, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    assert main([*words(digit_files, out, epochs="9", budget="compute"), "--plan"]) == 0
    printed = capsys.readouterr().out
    assert not out.exists() and "10 runs, " in printed
    rows = [line for line in printed.splitlines() if "pretrain" in line]
    epochs, units = zip(*((int(row.split()[-6]), int(row.split()[-2])) for row in rows), strict=True)
    assert epochs == (12, 12, 54, 9, 9)
    assert max(units) - min(units) <= 1


def test_forward_units_count_views_pixels_kept_patches_and_teachers() -> None:
    """One unit is a forward pass over 224 x 224 pixels."""

    def settings(recipe: str, *words: str):
        return load_settings(recipe=recipe, command=None, assignments=words, flags={})

    # 52 images in steps of 48 are 96 with those that pad; 6 views of 12 px; 3 forwards; 4 of 9 patches,
    # which is what half of them comes to.
    units = 96 * 6 * 3 * 4 / 9 * (12 / 224) ** 2
    assert units_of_epoch(settings("idmm_digits"), 52) == pytest.approx(units)
    two = ("batch.global_images=96", "batch.chunk_images=48")
    contrast, with_teacher = (
        units_of_epoch(settings(f"{name}_digits", *two), 96) for name in ("simclr", "mocov3")
    )
    assert with_teacher / contrast == pytest.approx(4 / 3)
    dropped = units_of_epoch(settings("mocov3_digits", *two, "backbone.patch_drop=0.5"), 96)
    assert dropped / contrast == pytest.approx((3 * 4 / 9 + 1) / 3), "a teacher sees all patches"
    dino = settings("dino_digits", *two)
    views, seen = dino.views.count, dino.views.groups[0].views
    one = units_of_epoch(settings("simclr_digits", *two), 96) / (3 * 2)  # a forward pass of all images
    scale = (dino.views.crop_px / 12) ** 2
    assert units_of_epoch(dino, 96) / one == pytest.approx((3 * views + seen) * scale), "of the first group"


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"seeds": "0"}, 2, "--seeds 0: must be 1 or more"),
        (
            {"recipe": "simclr_digits"},
            2,
            "method simclr has no head.label_smoothing to take away; ablate takes",
        ),
        ({"recipe": "idmm_digit"}, 2, "recipe idmm_digit is unknown"),
        ({"recipe": "finetune_digits"}, 2, "recipe finetune_digits is for `vitds finetune`"),
        ({"set": "views.crop_px=24"}, 2, "not smaller than the fine-tuning's 24"),
        ({"set": "mix.kind=none"}, 2, "recipe idmm_digits has no mixing (mix.kind is none): an arm would be"),
        ({"epochs": "0"}, 2, "epochs: must be greater than or equal to 1"),
        ({"test": "absent.beton"}, 3, "absent.beton: cannot be opened"),
        ({"set": "backbone.name=vit_tiny"}, 2, "vit_tiny"),
        ({"set": "views.crop_px=13"}, 2, "13"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line_before_anything_runs(
    digit_files, tmp_path: Path, capsys, changes: dict[str, str], status: int, said: str
) -> None:
    out = tmp_path / "out"
    found, line = refusal(words(digit_files, out, **changes), out, capsys)
    assert found == status and said in line


def test_images_without_labels_are_refused(
    unlabelled: str,
    digit_files,
    tmp_path: Path,
    capsys,
) -> None:
    assert main(words((unlabelled, digit_files[1]), tmp_path / "out")) == 3
    assert "has no labels; training on labels needs two classes or more" in capsys.readouterr().err


def test_flowers_have_the_papers_figures_beside_them_with_a_remark(
    ablation: Path, digit_files, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words(digit_files, ablation)) == 0
    assert "published" not in capsys.readouterr().out
    for half, images in (("train", 52), ("test", 20)):  # as if these were the flowers
        monkeypatch.setitem(CATALOGUE["flowers102"].counts, half, images)
    assert main(words(digit_files, ablation)) == 0
    printed = capsys.readouterr().out
    assert "69.6" in printed and "79.9" in printed and "Published on Flowers: arXiv:2201.10728" in printed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": "2"}, "was begun with other words: epochs was 1, now 2"),
        ({"budget": "compute"}, "was begun with other words: budget was 'epochs', now 'compute'"),
    ],
)
def test_a_folder_of_another_ablation_is_refused(
    ablation: Path, digit_files, capsys, changes: dict[str, str], said: str
) -> None:
    assert main(words(digit_files, ablation, **changes)) == 5
    assert said in capsys.readouterr().err


def test_a_folder_with_other_things_in_it_is_not_written_to(digit_files, tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(words(digit_files, tmp_path)) == 5
    assert "is not empty and holds no experiment. Choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
