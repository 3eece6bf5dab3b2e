"""`vitds export`: in timm, transformers and onnxruntime the weights give the run's numbers.

What does not fit is refused, and every card's three lines run.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor

from tests.data.images import jpeg, rotated_jpeg
from vitds.cli import main
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile, open_beton
from vitds.data.draws import centre_views
from vitds.errors import RunError, UsageError
from vitds.evaluate.files import file_features
from vitds.jobs.evaluate import evaluate
from vitds.jobs.export import _test_file, export
from vitds.jobs.runs import list_runs
from vitds.models.build import build_backbone
from vitds.runs.backbone import save_class_head, save_weights
from vitds.runs.directory import Run, save_settings
from vitds.use.export import crop_share, new_folder, short_side
from vitds.use.model import Model, open_model

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
CLASSES = ("cat", "dog", 'a "class", named oddly', "мышь")


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that fails."""
    assert main([str(word) for word in words]) != 0
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


def made_run(folder: Path, name: str, crop_px: int, head: bool = True, **options: Any) -> Path:
    """A run directory of a backbone with random weights, as training leaves it."""
    folder.mkdir()
    settings = Settings.model_validate(
        {
            "method": "supervised" if head else "idmm",
            "views": {"crop_px": crop_px, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)},
            "backbone": {"name": name, "options": options, "drop_path": 0.0},
            "engine": {"precision": "fp32"},
            "data": {"train": "gone.beton"},
        }
    )
    backbone = build_backbone(settings.backbone, crop_px=crop_px, seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in backbone.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    save_settings(Run(folder), settings)
    save_weights(folder / "backbone.safetensors", backbone.state_dict())
    if head:
        weight = torch.randn(len(CLASSES), backbone.facts.width, generator=generator)
        save_class_head(folder, {"weight": weight, "bias": torch.arange(4.0)}, CLASSES)
    return folder


def rows_of(model: Model, file: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised crops of a .beton's images, and what the run says of them: features and logits."""
    beton = open_beton(file)
    crops = file_features(model.settings, torch.nn.Flatten(), beton, torch.device("cpu")).rows_MD
    side = model.settings.views.crop_px
    features = file_features(model.settings, model.backbone, beton, torch.device("cpu")).rows_MD
    with torch.inference_mode():
        logits = features if model.head is None else model.head(features)
    return crops.view(-1, 3, side, side), features, logits


def assert_close(found: Tensor, expected: Tensor, share: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the lines of a card in its folder; returns the names they make."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    code = CODE.search((folder / "README.md").read_text())[1]
    assert len(code.strip().partition("\n\n")[2].splitlines()) <= 4
    (folder / "photo.jpg").write_bytes(rotated_jpeg(3, 6))  # as phones write them
    with torch.no_grad():
        exec(code, names)
    turned = Image.open(folder / "photo.jpg").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(names["photo"]), np.asarray(turned))
    return names


@pytest.fixture(scope="module")
def exported(used_runs, tmp_path_factory):
    """exported(kind, method): the folder, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, method: str) -> Path:
        for library in {"hf": ["transformers"], "onnx": ["onnx", "onnxruntime", "onnxscript"]}.get(kind, []):
            pytest.importorskip(library)
        if (kind, method) not in made:
            folder = tmp_path_factory.mktemp("exported") / kind
            int8 = (kind, method) == ("onnx", "supervised")
            made[kind, method] = export(kind, used_runs[method], out=str(folder), int8=int8)
        return made[kind, method]

    return get


@pytest.mark.parametrize("method", ["supervised", "idmm"])
def test_timm_loads_the_folder_with_the_runs_numbers(exported, used_runs, method: str, digit_files) -> None:
    run = open_model(used_runs[method])
    model = timm.create_model(f"local-dir:{exported('timm', method)}", pretrained=True).eval()
    crops, features, logits = rows_of(run, digit_files[1])
    with torch.inference_mode():
        assert_close(model.forward_head(model.forward_features(crops), pre_logits=True), features, 1e-5)
        assert_close(model(crops), logits, 1e-5)


def test_timm_knows_side_mean_interpolation_crop_and_classes(exported, fine: Model) -> None:
    model = timm.create_model(f"local-dir:{exported('timm', 'supervised')}", pretrained=True)
    found = timm.data.resolve_model_data_config(model)
    views = fine.settings.views
    assert found["input_size"] == (3, 16, 16)
    assert (tuple(found["mean"]), tuple(found["std"])) == (views.mean, views.std)
    assert (found["interpolation"], found["crop_mode"]) == ("bicubic", "center")
    assert tuple(model.pretrained_cfg["label_names"]) == fine.classes and model.num_classes == 4
    assert (
        "license"
        not in json.loads((exported("timm", "supervised") / "config.json").read_text())["pretrained_cfg"]
    )


@pytest.mark.parametrize("crop_px", [12, 16, 24, 32, 64, 96, 112, 150, 192, 224, 299, 384, 448, 518])
def test_timm_scales_to_the_short_side_of_evaluation(crop_px: int) -> None:
    view = centre_views(crop_px, [300], [300])
    assert short_side(crop_px) == view["resized_height"][0, 0]
    transform = timm.data.create_transform(
        (3, crop_px, crop_px), crop_pct=crop_share(crop_px), is_training=False
    )
    assert transform.transforms[0].size == short_side(crop_px)


@pytest.mark.parametrize("method", ["supervised", "idmm"])
def test_transformers_loads_the_folder_with_the_runs_numbers(
    exported, used_runs, method: str, digit_files
) -> None:
    folder = exported("hf", method)
    import transformers

    run = open_model(used_runs[method])
    crops, features, logits = rows_of(run, digit_files[1])
    vit = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert_close(vit(crops).last_hidden_state[:, 0], features, 1e-5)
        if method == "supervised":
            model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
            assert_close(model(crops).logits, logits, 1e-5)
            assert tuple(model.config.id2label.values()) == run.classes


def test_the_image_processor_makes_nearly_the_pixels_of_evaluation(
    exported, fine: Model, tmp_path: Path
) -> None:
    folder = exported("hf", "supervised")
    import transformers

    (tmp_path / "x.png").write_bytes(jpeg(3, 60, 44))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(
        Image.open(tmp_path / "x.png").convert("RGB"), return_tensors="pt"
    )["pixel_values"]
    from vitds.augment.images import normalise
    from vitds.data.trees import SourceImage
    from vitds.use.view import view_of

    view = view_of(SourceImage("x", "", None, str(tmp_path / "x.png")), fine.storing, 16)
    own = normalise(torch.from_numpy(view)[None], fine.settings.views)
    assert pixels.shape == own.shape and float((pixels - own).abs().mean()) < 0.03


@pytest.mark.parametrize("method", ["supervised", "idmm"])
def test_onnxruntime_computes_the_runs_numbers_for_any_number_of_images(
    exported, used_runs, method: str, digit_files
) -> None:
    folder = exported("onnx", method)
    import onnxruntime

    run = open_model(used_runs[method])
    crops, features, logits = rows_of(run, digit_files[1])
    views = run.settings.views
    pixels = (
        (crops * torch.tensor(views.std).view(3, 1, 1) + torch.tensor(views.mean).view(3, 1, 1)) * 255
    ).round()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for images in (1, 3, 20):
        found = session.run(None, {"pixels": pixels[:images].to(torch.uint8).numpy()})
        assert_close(torch.from_numpy(found[0]), features[:images], 1e-4)
        if method == "supervised":
            assert_close(torch.from_numpy(found[1]), logits[:images], 1e-4)
    assert len(found) == (2 if method == "supervised" else 1)


def test_int8_is_smaller_and_its_accuracy_is_measured(used_runs, exported, fine: Model) -> None:
    folder = exported("onnx", "supervised")
    line = re.search(
        r"model_int8.onnx: ([\d.]+) MB in place of ([\d.]+) MB; "
        r"top-1 on \S+ ([\d.]+) %, ([\d.]+) % with float weights",
        (folder / "README.md").read_text(),
    )
    assert float(line[1]) < float(line[2])
    assert float(line[4]) == pytest.approx(evaluate("top1", used_runs["supervised"])["top1"], abs=0.01)
    assert abs(float(line[3]) - float(line[4])) <= 15
    assert sorted(path.name for path in folder.iterdir()) == (
        ["README.md", "config.json", "model.onnx", "model_int8.onnx", "recipe.yaml"]
    )
    assert json.loads((folder / "config.json").read_text()) == {"side_px": 16, "classes": list(fine.classes)}


@pytest.mark.parametrize("method", ["supervised", "idmm"])
@pytest.mark.parametrize("kind", ["timm", "hf", "onnx"])
def test_the_three_lines_of_a_card_run_and_say_what_the_run_says(
    exported, used_runs, kind: str, method: str, tmp_path: Path, monkeypatch
) -> None:
    folder = shutil.copytree(exported(kind, method), tmp_path / "moved")
    names = use(folder, monkeypatch)
    run = open_model(used_runs[method])
    if method == "idmm":
        # The pixels of another library's resizing differ a little, and so do the features.
        found, expected = np.asarray(names["features"])[0], run.embed([folder / "photo.jpg"])[0]
        assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.99
        return
    rows = (
        names["probabilities"] if "probabilities" in names else torch.from_numpy(names["logits"]).softmax(1)
    )
    (expected,) = run.predict([folder / "photo.jpg"], top=1)
    assert float(rows[0].max()) == pytest.approx(expected.probabilities[0], abs=0.05)


def test_a_card_says_what_the_weights_are_made_of(exported, used_runs, digit_files) -> None:
    folder = exported("timm", "supervised")
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "unknown" and front["library_name"] == "timm"
    assert front["pipeline_tag"] == "image-classification"
    summary = Run(Path(used_runs["supervised"])).summary
    for part in (
        "vit_tiny_patch16_224, trained by `supervised`",
        f"Trained on `{digit_files[0]}`: 52 images, stored as raw, in their own size.",
        json.loads((Path(used_runs["supervised"]) / "inputs.json").read_text())["data.train"],
        "4 classes: digit 0, digit 1, digit 2, digit 3.",
        "1 epochs from random weights",
        f"| class head | {summary['top1']:.2f} | "
        f"{summary['top1_interval'][0]:.2f} to {summary['top1_interval'][1]:.2f} | ",
        f"on `{digit_files[1]}`, by the run itself",
        "trained on 1 rank(s) with ZeRO 0",
    ):
        assert part in text
    pretrained = (exported("timm", "idmm") / "README.md").read_text()
    assert "image-feature-extraction" in pretrained and "| nearest neighbours, k = 5 |" in pretrained


def test_the_command_of_a_card_trains_the_same_run(exported, used_runs) -> None:
    folder = exported("timm", "supervised")
    command = re.search(r"^    (vitds .*)$", (folder / "README.md").read_text(), re.MULTILINE)[1]
    assert command == "vitds finetune --recipe recipe.yaml --run runs/again"
    settings = load_settings(recipe=str(folder / "recipe.yaml"), command="finetune", flags={})
    assert settings == Run(Path(used_runs["supervised"])).settings
    with pytest.raises(RunError, match="holds no run directory"):  # the export is none
        list_runs(str(folder))


@pytest.mark.parametrize(
    ("name", "crop_px", "options"),
    [
        (
            "vit_tiny_patch16_224",
            24,
            {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "global_pool": "avg"},
        ),
        ("resnet18d", 32, {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]}),
    ],
    ids=["mean of tokens", "deep stem"],
)
def test_what_transformers_lacks_goes_to_timm_and_onnx(
    exported, name: str, crop_px: int, options: dict, tmp_path: Path, capsys, monkeypatch
) -> None:
    exported("onnx", "supervised")
    run = made_run(tmp_path / "run", name, crop_px, **options)
    for kind in ("timm", "onnx"):
        folder = export(kind, str(run), out=str(tmp_path / kind), int8=kind == "onnx")
        found = use(folder, monkeypatch)
        assert len(np.asarray(found.get("probabilities", found.get("logits")))[0]) == 4
        said = capsys.readouterr().out
    assert "its accuracy was not measured, as the run's test file is not there" in said
    before, after = ((folder / file).stat().st_size for file in ("model.onnx", "model_int8.onnx"))
    assert after < 0.7 * before
    text = refusal(capsys, "export", "hf", run, "--out", tmp_path / "hf")
    assert name in text and "`vitds export timm` and `vitds export onnx` take it" in text
    if "global_pool" in options:
        assert "pools its tokens by 'avg', and transformers' ViT has the class token alone" in text
    else:
        assert "transformers' ResNet differs in conv1.0.weight" in text
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob("*writing*"))


@pytest.mark.parametrize("head", [True, False], ids=["classes", "features"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers_has_the_resnets_numbers(
    name: str, head: bool, tmp_path: Path, digit_files, monkeypatch
) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"layers": [1, 2, 1, 1], "channels": [8, 8, 16, 24]}
    run = open_model(str(made_run(tmp_path / "run", name, 32, head, **small)))
    folder = Path(export("hf", str(tmp_path / "run"), out=str(tmp_path / "hf")))
    crops, features, logits = rows_of(run, digit_files[1])
    with torch.inference_mode():
        if head:
            model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
            assert_close(model(crops).logits, logits, 1e-5)
            assert tuple(model.config.id2label.values()) == CLASSES
        else:
            model = transformers.AutoModel.from_pretrained(folder).eval()
            assert_close(model(crops).pooler_output.flatten(1), features, 1e-5)
    assert len(use(folder, monkeypatch)["probabilities" if head else "features"][0]) == logits.shape[1]


REFUSED_BY_HF = {
    "layer scale": ({"init_values": 0.1}, "transformers' ViT differs in 0.ls1.gamma"),
    "registers": ({"reg_tokens": 4}, "transformers' ViT differs in reg_token"),
    "norms of queries": ({"qk_norm": True}, "transformers' ViT differs in 0.attn.k_norm.bias"),
    "another activation": ({"act_layer": "relu"}, "gives other numbers than the run"),
}


@pytest.mark.parametrize("case", REFUSED_BY_HF)
def test_a_vit_that_transformers_computes_otherwise_is_refused(case: str, tmp_path: Path, capsys) -> None:
    options, text = REFUSED_BY_HF[case]
    small = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    run = made_run(tmp_path / "run", "vit_tiny_patch16_224", 16, **small, **options)
    assert text in refusal(capsys, "export", "hf", run, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_classifiers_of_a_distilled_model_are_refused_by_timm(tmp_path: Path, capsys) -> None:
    run = made_run(
        tmp_path / "run",
        "deit_tiny_distilled_patch16_224",
        16,
        patch_size=8,
        embed_dim=24,
        depth=1,
        num_heads=3,
    )
    text = refusal(capsys, "export", "timm", run, "--out", tmp_path / "out")
    assert "deit_tiny_distilled_patch16_224 classifies in timm by more than one linear layer" in text
    assert "`vitds export onnx` takes it" in text


def test_a_model_that_timm_alone_lacks_is_refused_before_anything_is_written(tmp_path: Path, capsys) -> None:
    run = made_run(tmp_path / "run", "t2t_vit_7", 16, depth=1)
    text = refusal(capsys, "export", "timm", run, "--out", tmp_path / "out")
    assert "timm alone has no t2t_vit_7, it comes with vitds; `vitds export onnx` takes it" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_onnx_takes_a_t2t_vit(name: str, tmp_path: Path, capsys) -> None:
    """The export compares onnxruntime's numbers with the run's."""
    for library in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    run = made_run(tmp_path / "run", name, 32, depth=1)
    folder = export("onnx", str(run), out=str(tmp_path / "out"))
    assert (folder / "model.onnx").exists()
    assert "model.onnx: its numbers differ from the run's by at most" in capsys.readouterr().out


def test_an_export_takes_a_checkpoint(used_runs, tmp_path: Path) -> None:
    newest = max((Path(used_runs["supervised"]) / "checkpoints").glob("step-*"))
    folder = export("timm", str(newest), out=str(tmp_path / "out"))
    whole = export("timm", used_runs["supervised"], out=str(tmp_path / "whole"))
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    card = (folder / "README.md").read_text()
    assert f"These are the weights of the checkpoint {newest.name}." in card and "| class head |" not in card


def test_int8_is_judged_by_the_labelled_images_of_the_test_file(
    fine: Model, tmp_path: Path, digit_files
) -> None:
    def found(test: str) -> BetonFile | None:
        return _test_file(replace(fine, settings=Settings.model_validate({"data": {"test": test}})))

    images = sorted((Path(digit_files[1]).parent / "test").glob("*/*.png"))[:6]
    with open(tmp_path / "labels.csv", "w") as table:
        table.write("file,label\n")
        for number, image in enumerate(images):
            shutil.copy(image, tmp_path / f"{number}.png")
            table.write(f"{number}.png,{'ab'[number % 2] if number < 4 else ''}\n")
    built, words = tmp_path / "some.beton", ["--labels", str(tmp_path / "labels.csv"), "--workers", "1"]
    assert main(["data", "build", str(tmp_path), "--out", str(built), *words]) == 0
    assert open_beton(built).images == 6 and found(str(built)).labels.tolist() == [0, 0, 1, 1]
    assert found("digits").images == 901 and found("gone.beton") is None


def test_the_folder_that_one_stands_in_can_be_filled(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    with new_folder(".") as part:
        (part / "weights").touch()
    assert [path.name for path in tmp_path.glob("*/*")] == ["weights"]


def test_a_folder_that_holds_something_is_left_alone(used_runs, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").write_text("mine")
    text = refusal(capsys, "export", "timm", used_runs["idmm"], "--out", tmp_path)
    assert f"--out {tmp_path}: is there already and not empty; name a new folder" in text
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(UsageError, match="is there already"):
        export("timm", used_runs["idmm"], out=str(tmp_path / "mine"))


def test_a_place_where_no_folder_can_be_made_is_refused(used_runs, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(capsys, "export", "timm", used_runs["idmm"], "--out", tmp_path / "file" / "out")
    assert "no folder can be made there (Not a directory)" in text


@pytest.mark.parametrize("kind", ["timm", "hf", "onnx"])
def test_what_is_no_run_is_named(kind: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers")
    for name in (str(tmp_path / "gone"), "vit_tiny_patch16_224"):
        text = refusal(capsys, "export", kind, name, "--out", tmp_path / "out")
        assert f"{name} does not exist; name a run directory or one of its checkpoints" in text


@pytest.mark.parametrize(("kind", "library"), [("hf", "transformers"), ("onnx", "onnxruntime")])
def test_a_library_that_is_missing_is_named_with_the_command_that_brings_it(
    kind: str, library: str, used_runs, tmp_path: Path, capsys, monkeypatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(f"vitds.use.export_{kind}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # as Python sees a package that is not installed
    text = refusal(capsys, "export", kind, used_runs["idmm"], "--out", tmp_path / "out")
    assert f'export {kind} needs {library}: pip install "vitds[export]"' in text


def test_exported_files_obey_the_umask(used_runs, tmp_path: Path) -> None:
    folder = export("timm", used_runs["idmm"], out=str(tmp_path / "out"))
    (tmp_path / "file").write_text("")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode}
