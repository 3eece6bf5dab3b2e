"""Loading weights into a backbone: what matches, what is resized, what is left out, what is refused."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vitds.config.load import load_settings
from vitds.config.tree import Backbone
from vitds.errors import DataError, NumericsError, ShapeError
from vitds.models.build import build_backbone
from vitds.runs.backbone import (
    load_backbone,
    read_class_head,
    read_weights,
    save_class_head,
    save_weights,
)
from vitds.runs.checkpoint import write_checkpoint
from vitds.runs.directory import Run, save_settings

TINY = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vit(crop_px: int, seed: int = 0) -> nn.Module:
    return build_backbone(Backbone(options=TINY), crop_px=crop_px, seed=seed)


@pytest.mark.parametrize(("before", "after"), [(112, 224), (224, 448), (224, 112)])
def test_position_embeddings_are_resized_and_named(before: int, after: int) -> None:
    source, target = vit(before, seed=1), vit(after, seed=2)
    match = load_backbone(target, source.state_dict(), "a run")
    shapes = [f"[1, {(side // 16) ** 2 + 1}, 24]" for side in (before, after)]
    assert f"1 resized (pos_embed from {shapes[0]} to {shapes[1]})" in str(match)
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])


def test_everything_else_is_copied_and_the_instance_head_is_left_out() -> None:
    source, target = vit(32, seed=1), vit(32, seed=2)
    weights = {f"backbone.{name}": value for name, value in source.state_dict().items()} | {
        "head.weight": torch.zeros(2040, 24)
    }
    match = load_backbone(target, weights, "a run")
    assert match.left_out == ["head.weight"] and not match.not_found
    assert (
        str(match) == "30 tensors matched after backbone. was taken off their names; 1 left out (head.weight)"
    )
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ShapeError, match="resnet matches 0 of the backbone's .* parameters"):
        load_backbone(
            vit(32), build_backbone(Backbone(name="resnet18"), crop_px=32, seed=0).state_dict(), "resnet"
        )
    wide = build_backbone(Backbone(options=TINY | {"embed_dim": 48}), crop_px=32, seed=0)
    with pytest.raises(ShapeError, match="wide: .* has shape .*48.*, the backbone's has .*24"):
        load_backbone(vit(32), wide.state_dict(), "wide")


def test_the_bytes_of_saved_weights_depend_on_numbers_alone(tmp_path: Path) -> None:
    weights = vit(32).state_dict()
    save_weights(tmp_path / "a.safetensors", weights)
    save_weights(tmp_path / "b.safetensors", dict(reversed(list(weights.items()))))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert all(
        torch.equal(value, weights[name]) for name, value in load_file(tmp_path / "a.safetensors").items()
    )


def test_a_class_head_is_kept_for_the_same_classes_only(tmp_path: Path) -> None:
    assert read_class_head(tmp_path, ("cat", "dog")) is None
    save_class_head(tmp_path, {"weight": torch.ones(2, 24), "bias": torch.zeros(2)}, ("cat", "dog"))
    assert torch.equal(read_class_head(tmp_path, ("cat", "dog"))["weight"], torch.ones(2, 24))
    assert read_class_head(tmp_path, ("dog", "cat")) is None


class Planted:
    """A pickle that would write a file when loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("planted.txt"),))


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": Planted()}))
        with pytest.raises(DataError, match="more than plain tensors|no readable safetensors"):
            read_weights(tmp_path / name)
    torch.save({"model": Planted()}, tmp_path / "zipped.pth")
    with pytest.raises(DataError, match="more than plain tensors"):
        read_weights(tmp_path / "zipped.pth")
    assert not (tmp_path / "planted.txt").exists()


def test_plain_pth_files_of_common_forms_are_read(tmp_path: Path) -> None:
    weights = vit(32, seed=1).state_dict()
    for form in (
        weights,
        {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        {"model": weights},
    ):
        torch.save(form, tmp_path / "weights.pth")
        target = vit(32, seed=2)
        assert not load_backbone(target, read_weights(tmp_path / "weights.pth"), "file").not_found


def test_missing_and_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.safetensors does not exist; check the path"):
        read_weights(tmp_path / "gone.safetensors")
    with pytest.raises(DataError, match="backbone.safetensors does not exist; the run has not finished"):
        read_weights(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="is no dictionary of tensors by name"):
        read_weights(tmp_path / "list.pth")


def prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda w: prefixed("_orig_mod.", w), "_orig_mod."),
        (
            lambda w: {"state_dict": prefixed("module._orig_mod.backbone.", w)},
            "_orig_mod. and state_dict.module.backbone.",
        ),
        (lambda w: {"module": prefixed("model.encoder.net.", w), "lr": 0.1}, "module.model.encoder.net."),
        (
            lambda w: {
                name.replace("blocks.", "blocks._fsdp_wrapped_module."): value for name, value in w.items()
            },
            "_fsdp_wrapped_module.",
        ),
        (
            lambda w: {"state_dict": prefixed("teacher.", w), "args": argparse.Namespace(lr=1)},
            "state_dict.teacher.",
        ),
        (lambda w: prefixed("a.name.nobody.has.thought.of.", w), "a.name.nobody.has.thought.of."),
    ],
)
def test_what_wrappers_leave_in_names_is_taken_off_and_said(tmp_path: Path, form, said: str) -> None:
    source, target = vit(32, seed=1), vit(32, seed=2)
    torch.save(form(source.state_dict()), tmp_path / "weights.pth")
    match = load_backbone(target, read_weights(tmp_path / "weights.pth"), "file")
    assert str(match).startswith(f"30 tensors matched after {said} was taken off their names")
    assert torch.equal(target.pos_embed, source.pos_embed)


def test_names_of_a_compiled_model_match() -> None:
    source, target = vit(32, seed=1), vit(32, seed=2)
    assert not load_backbone(target, torch.compile(source).state_dict(), "compiled").not_found


@pytest.mark.parametrize(
    ("taken", "passed_over"),
    [
        ("teacher.backbone.", "student.module.backbone."),  # DINO, iBOT
        ("model_ema.", "model."),  # timm
        ("state_dict.module.base_encoder.", "state_dict.module.momentum_encoder."),  # MoCo v3
        ("target_encoder.", "encoder."),  # I-JEPA
    ],
)
def test_of_two_backbones_in_a_file_the_authors_is_taken_and_both_are_said(
    taken: str, passed_over: str
) -> None:
    right, wrong, target = vit(32, seed=1), vit(32, seed=2), vit(32, seed=3)
    weights = prefixed(passed_over, wrong.state_dict()) | prefixed(taken, right.state_dict())
    match = load_backbone(target, weights, "file")
    assert torch.equal(target.pos_embed, right.pos_embed)
    assert f"after {taken} was taken off their names; {passed_over} matches as well" in str(match)


def test_the_backbone_of_the_models_shape_is_taken_before_a_better_one() -> None:
    """A small student beside a large teacher, with the same names."""
    large = build_backbone(Backbone(options=TINY | {"embed_dim": 48}), crop_px=32, seed=1)
    small, target = vit(32, seed=2), vit(32, seed=3)
    weights = prefixed("teacher.", large.state_dict()) | prefixed("student.", small.state_dict())
    match = load_backbone(target, weights, "file")
    assert torch.equal(target.pos_embed, small.pos_embed) and not match.rivals


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "nan"), (float("-inf"), "-inf"), (-3e7, "-3e[+]07")]
)
def test_weights_that_are_not_finite_or_absurd_are_refused(value: float, said: str) -> None:
    weights = vit(32, seed=1).state_dict()
    weights["blocks.1.mlp.fc1.weight"][3, 5] = value
    with pytest.raises(NumericsError, match=f"^file: blocks.1.mlp.fc1.weight holds {said}; weights that are"):
        load_backbone(vit(32), weights, "file")


def test_bounds_in_buffers_may_be_infinite_but_not_nan() -> None:
    weights = nn.BatchNorm1d(3).state_dict()
    weights["running_var"][:] = float("inf")
    assert not load_backbone(nn.BatchNorm1d(3), weights, "file").not_found
    weights["running_mean"][1] = float("nan")
    with pytest.raises(NumericsError, match="running_mean holds nan"):
        load_backbone(nn.BatchNorm1d(3), weights, "file")


@pytest.mark.parametrize(
    ("recipe", "prefix"), [("mocov3_digits", "backbone."), ("dino_digits", "teacher.backbone.")]
)
def test_of_our_checkpoints_the_backbone_that_the_method_evaluates_is_taken(
    tmp_path: Path, recipe: str, prefix: str
) -> None:
    """MoCo's student, and DINO's teacher, though the other's weights lie beside it."""
    student, teacher = vit(32, seed=1).state_dict(), vit(32, seed=2).state_dict()
    module = prefixed("backbone.", student) | prefixed("teacher.backbone.", teacher)
    path = write_checkpoint(tmp_path / "checkpoints", 7, {"model": module}, {}, keep=1)
    save_settings(Run(tmp_path), load_settings(recipe=recipe, command=None, flags={}))
    weights = read_weights(path)
    assert set(weights) == set(prefixed(prefix, student))
    assert torch.equal(weights[f"{prefix}pos_embed"], module[f"{prefix}pos_embed"])
