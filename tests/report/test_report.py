"""`vitds report`: what the page says, where its pictures come from, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.engine.training import small_run_path
from vitds.cli import main
from vitds.config.load import load_settings
from vitds.evaluate.files import own_features
from vitds.evaluate.opened import open_model
from vitds.jobs.data_files import training_files
from vitds.jobs.gallery import _without_folders, gallery
from vitds.jobs.report import _table, report
from vitds.report.lines import number
from vitds.runs.directory import Run, read_json, save_settings, write_json

CPU = torch.device("cpu")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["report", *words]) != 0
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


def kept(run: Path) -> dict:
    return read_json(run / "analysis" / "page.json")


def test_the_page_has_the_result_its_interval_and_the_majority_baseline(runs, pages) -> None:
    text = pages["fine-seed0"].read_text()
    summary = Run(runs["fine-seed0"]).summary
    low, high = summary["top1_interval"]
    assert f"<b>{summary['top1']:.1f} %</b>top-1" in text and f"{low:.1f} to {high:.1f}" in text
    assert f"<b>{summary['majority']:.1f} %</b>always the most frequent class" in text


def test_runs_of_other_images_or_another_checkpoint_are_no_seeds_of_one_group(tmp_path: Path) -> None:
    changes = {"a": [], "b": ["eval.hold_out=0.1", "eval.every_epochs=1"], "c": ["eval.batch_images=64"]}
    for name, words in changes.items():
        (tmp_path / name).mkdir()
        flags = {"recipe": "finetune_digits", "command": "finetune", "flags": {}}
        save_settings(Run(tmp_path / name), load_settings(assignments=words, **flags))
        write_json(tmp_path / name / "summary.json", {"seconds": 1.0})
    table = _table([Run(tmp_path / name) for name in "abc"])
    assert table["keys"] == ["eval.hold_out"] and [row["group"] for row in table["rows"]] == [1, 2, 1]


def test_the_command_on_the_page_gives_the_settings_of_the_run(runs, pages) -> None:
    command = re.search(r"<pre><code>vitds finetune (.*)</code>", pages["fine-seed0"].read_text())[1]
    words = shlex.split(command)
    settings = load_settings(recipe=words[words.index("--recipe") + 1], command="finetune", flags={})
    assert settings == Run(runs["fine-seed0"]).settings


def test_the_command_of_a_run_on_several_ranks_has_their_number_and_stage(own_run: Path) -> None:
    environment = read_json(own_run / "environment.json") | {"ranks": 4, "zero_stage": 2}
    (own_run / "environment.json").write_text(json.dumps(environment))
    report(str(own_run))
    command = re.search(r"<pre><code>(.*)</code>", (own_run / "report.html").read_text())[1]
    assert command.startswith("deepspeed --num_gpus 4 launch/finetune.py --recipe ")
    assert command.endswith("--ds_config zero2")


def test_what_the_build_found_stands_on_the_page(pages) -> None:
    text = pages["fine-seed0"].read_text()
    assert "52 images, 4 classes" in text and "20 images, 4 classes" in text
    assert "greyscale, now RGB" in text and "52 ×" in text


def test_neighbours_are_the_nearest_by_cosine(runs) -> None:
    run = Run(runs["fine-seed0"])
    gallery(run)
    train, test = training_files(run.settings)
    backbone = open_model(str(run.path)).backbone.eval()
    rows = [
        F.normalize(
            own_features(run.settings, backbone, file, np.arange(file.images), torch.device("cpu"))[0]
        )
        for file in (test, train)
    ]
    for image in kept(run.path)["neighbours"]:
        query = next(i for i in range(test.images) if image["name"] == test.describe(i))
        order = (rows[0][query] @ rows[1].T).argsort(descending=True)[:5].tolist()
        assert [other["name"] for other in image["neighbours"]] == [train.describe(i) for i in order]
        assert image["class"] == test.manifest.classes[test.labels[query]]


def test_right_and_wrong_images_are_shown_and_agree_with_the_evaluation(runs, pages) -> None:
    run = runs["fine-seed0"]
    shown, top1 = kept(run), read_json(run / "analysis" / "top1.json")
    is_right = [image["class"] == image["answer"] for image in shown["neighbours"]]
    assert any(is_right) and not all(is_right) and len(is_right) == 8
    wrong = {(pair[0], pair[1]): pair[2] for pair in top1["confusion"] if pair[0] != pair[1]}
    names = top1["classes"]
    for pair in shown["confusions"]:
        assert wrong[names.index(pair["right"]), names.index(pair["predicted"])] == pair["images"]
    assert shown["confusions"][0]["images"] == max(wrong.values())


def test_photographs_are_named_below_their_source_wherever_that_lies(runs, pages, hostile_files) -> None:
    found = kept(runs["hostile"])["data"]["train"]["findings"]
    assert all(name.startswith(("images/<b>", "/")) for each in found for name in each["names"])
    folder = Path(hostile_files[0]).parent / "images"
    assert str(folder) not in pages["hostile"].read_text()


@pytest.mark.parametrize(
    ("name", "source", "below"),
    [
        ("image 3 (/p/photos/a.b.png)", "/p/photos", "image 3 (photos/a.b.png)"),
        ("/p/x.tar:a.png ~ /p/x.tar:b.png", "/p/x.tar", "x.tar:a.png ~ x.tar:b.png"),
        ("image 3 (cat/a.png)", ".", "image 3 (cat/a.png)"),
        ("my/photos/a.png", "photos", "my/photos/a.png"),
    ],
)
def test_a_source_is_taken_off_where_a_path_begins(name: str, source: str, below: str) -> None:
    assert _without_folders(name, (source,)) == below


def test_near_duplicates_across_the_split_are_named(own_run: Path) -> None:
    report(str(own_run))
    assert "none was noted" in (own_run / "report.html").read_text()
    shown = kept(own_run)
    text = "looks almost like an image of the training file (~): the test is easier than it seems"
    found = {"kind": "near_duplicate", "text": text, "count": 3, "names": ["a.png ~ b.png"]}
    shown["data"]["test"]["findings"].append(found)
    (own_run / "analysis" / "page.json").write_text(json.dumps(shown))
    report(str(own_run))
    text = (own_run / "report.html").read_text()
    assert "0 test images are a copy of a training image, 3 more look almost like one" in text
    assert "a.png ~ b.png" in text


def test_every_evaluation_that_lies_in_the_run_stands_on_the_page(own_run: Path) -> None:
    for kind in ("linear", "fewshot", "retrieval", "knn"):
        assert main(["eval", kind, str(own_run)]) == 0
    report(str(own_run))
    rows = re.findall(r'<th scope="row">([^<]*)</th><td>([\d.]+)</td>', (own_run / "report.html").read_text())
    found = dict(rows)
    assert set(found) >= {"class head, top-1", "kNN, k = 5", "linear classifier", "retrieval, mAP"}
    assert {f"few-shot, {shots} a class" for shots in (1, 2, 5, 10)} <= set(found)
    score = read_json(own_run / "analysis" / "retrieval.json")["map"]
    assert found["retrieval, mAP"] == f"{score:.1f}"


def test_what_theory_found_is_a_column_a_checkpoint_and_a_curve_a_figure(runs, pages) -> None:
    scores = [read_json(path) for path in sorted((runs["pre"] / "analysis").glob("step-*/theory.json"))]
    section = re.search(r'<h2 id="theory">.*?<h2', pages["pre"].read_text(), re.DOTALL)[0]
    assert re.findall(r'<th scope="col">(epoch \d|blind)', section) == ["epoch 1", "epoch 2", "blind"]
    for key, words in (("alignment", "alignment: distance of two crops"), ("rows_auc", "rows alone: AUC")):
        values = [score["theory"][key] for score in scores] + [scores[0]["blind"][key]]
        row = re.search(f'<th scope="row">{words}</th><td>\\d</td>(.*?)</tr>', section)[1]
        assert re.findall(r"<td>([\d.]+)</td>", row) == [f"{value:.3f}" for value in values]
        assert re.search(
            f'aria-label="{words}: measured: {number(values[0])} to {number(values[1])}', section
        )
    assert section.count("<svg") == section.count("<h3>") > 8
    assert 'id="theory"' not in pages["alone"].read_text()


def test_a_run_alone_whose_theory_was_measured_once_has_no_curve(runs, own_run: Path) -> None:
    step = next((runs["pre"] / "analysis").glob("step-*/theory.json"))
    score = read_json(step) | {"checkpoint": None}
    (own_run / "analysis" / "theory.json").write_text(json.dumps(score))
    report(str(own_run))
    section = re.search(r'<h2 id="theory">.*?<h2', (own_run / "report.html").read_text(), re.DOTALL)[0]
    assert '<th scope="col">epoch 2</th><th scope="col">blind' in section and "<svg" not in section


def test_a_run_without_test_images_shows_its_training_images_and_never_the_image_itself(runs, pages) -> None:
    shown = kept(runs["alone"])
    assert shown["query"] == "training" and len(shown["map"]["x"]) == 52
    for image in shown["neighbours"]:
        assert image["answer"] is None
        assert image["name"] not in [other["name"] for other in image["neighbours"]]
    assert "It was not evaluated" in pages["alone"].read_text()


def test_evaluations_of_a_run_without_test_images_stand_beside_each_other(
    runs, digit_files, tmp_path: Path
) -> None:
    run = shutil.copytree(runs["alone"], tmp_path / "run")
    for data in digit_files:
        assert main(["eval", "knn", str(run), "--data", data]) == 0
    assert len(list((run / "analysis").glob("knn-*-*.json"))) == 2
    assert not (run / "analysis" / "knn.json").exists()
    report(str(run))
    text = (run / "report.html").read_text()
    assert all(f'<th scope="row">kNN, k = 5 on {data}</th>' in text for data in digit_files)
    assert "Each class" in text and "It was not evaluated" not in text


def test_a_vit_is_shown_by_attention_and_a_resnet_by_gradients(runs, pages) -> None:
    assert kept(runs["fine-seed0"])["looks"]["kind"] == "attention"
    assert kept(runs["resnet"])["looks"] == kept(runs["resnet"])["looks"] | {
        "kind": "gradient",
        "of": "answer",
    }


def test_pictures_are_made_once_for_weights_and_data(own_run: Path) -> None:
    report(str(own_run))
    before = (own_run / "analysis" / "page.json").stat().st_mtime_ns
    report(str(own_run))
    assert (own_run / "analysis" / "page.json").stat().st_mtime_ns == before
    inputs = read_json(own_run / "inputs.json")
    changed = kept(own_run) | {"made_of": {"weights": "others"}}
    (own_run / "analysis" / "page.json").write_text(json.dumps(changed))
    report(str(own_run))
    assert kept(own_run)["made_of"]["inputs"] == inputs


def test_the_page_stands_from_what_is_kept_where_the_images_have_moved(own_run: Path) -> None:
    report(str(own_run))
    whole = (own_run / "report.html").read_text()
    move_data(own_run)
    report(str(own_run))
    assert (own_run / "report.html").read_text().count("<img") == whole.count("<img") > 20


def test_a_run_that_cannot_be_written_to_has_a_page_elsewhere(own_run: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(own_run / "analysis")
    (own_run / "analysis").write_text("in the way")
    report(str(own_run), out=tmp_path / "page.html")
    assert "<img" in (tmp_path / "page.html").read_text()
    assert "the pictures were not kept, the next page makes them again" in capsys.readouterr().out


def test_without_images_their_sections_say_so_and_the_rest_stands(own_run: Path) -> None:
    move_data(own_run)
    report(str(own_run))
    text = (own_run / "report.html").read_text()
    assert text.count("Not shown here, as the images are not at hand: gone/train.beton") >= 4
    assert "Each class" in text and "<b>" in text and "<img" not in text
    assert not (own_run / "analysis" / "page.json").exists()  # so that it is made once they are back


def test_images_of_another_content_are_not_taken_for_the_runs_own(own_run: Path) -> None:
    (own_run / "inputs.json").write_text(
        json.dumps({"data.train": "sha256:other", "data.test": "sha256:other"})
    )
    report(str(own_run))
    assert "holds other images than those the run was started with" in (own_run / "report.html").read_text()


def move_data(run: Path) -> None:
    """The settings name files that are not there."""
    settings = run / "settings.yaml"
    text = re.sub(r"(train|test): /\S+/(\w+\.beton)", r"\1: gone/\2", settings.read_text())
    assert "gone/train.beton" in text
    settings.write_text(text)


def test_a_run_without_an_analysis_whose_images_moved_is_refused_in_a_line(own_run: Path, capsys) -> None:
    shutil.rmtree(own_run / "analysis")
    move_data(own_run)
    said = refusal(capsys, str(own_run))
    assert f"{own_run} has no analysis, and none can be made: gone/train.beton" in said
    assert "Call from the folder" in said and "vitds eval" in said


def test_a_run_that_is_not_finished_is_refused(own_run: Path, capsys) -> None:
    (own_run / "summary.json").unlink()
    assert "has no analysis yet, as it is not finished" in refusal(capsys, str(own_run))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "RUN is missing"),
        (("no-such-run",), "no-such-run is no run directory: it has no settings.yaml"),
        (("{run}", "{run}"), "is given 2 times"),
        (("{run}", "{other}"), "--out is missing"),
        (("{run}", "--out", "no/such/folder/page.html"), "there is no folder no/such/folder"),
    ],
)
def test_words_that_make_no_page_are_refused(runs, capsys, words, said) -> None:
    named = {"run": runs["fine-seed0"], "other": runs["pre"]}
    assert said.replace("`", "") in refusal(capsys, *(word.format(**named) for word in words)).replace(
        "`", ""
    )


def test_a_training_writes_its_page_at_the_end_on_rank_0_alone(rank_pool, tmp_path: Path) -> None:
    """Of the embedded digits, which all ranks together would build."""
    run = tmp_path / "run"
    data, pool = ("digits", "digits"), rank_pool(2)
    pool.run(small_run_path, str(run), data, epochs=1, batch__global_images=448, log__page="true")
    assert pool.output.count(f"{run}/report.html: ") == 1 and (run / "report.html").exists()


def test_a_page_that_fails_fails_no_run(rank_pool, digit_files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "report.html").mkdir(parents=True)
    rank_pool(1).run(small_run_path, str(run), digit_files, epochs=1, log__page="true")
    assert Run(run).is_finished
    assert re.search(r"report.html was not made \(.*\); the run is complete without it", rank_pool(1).output)
