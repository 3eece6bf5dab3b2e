"""Loading weights into a backbone: what matches, what is resized, what is left out, what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vitds.config.tree import Backbone
from vitds.errors import DataError, ShapeError
from vitds.models.build import build_backbone
from vitds.runs.backbone import (
    load_backbone,
    read_class_head,
    read_weights,
    resize_position_embedding,
    save_class_head,
    save_weights,
)

TINY = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vit(crop_px: int, seed: int = 0) -> nn.Module:
    return build_backbone(Backbone(options=TINY), crop_px=crop_px, seed=seed)


@pytest.mark.parametrize(("before", "after"), [(112, 224), (224, 448), (224, 112)])
def test_position_embeddings_are_resized_from_7_to_14_to_28(before: int, after: int) -> None:
    source, target = vit(before, seed=1), vit(after, seed=2)
    match = load_backbone(target, source.state_dict(), "a run")
    assert target.pos_embed.shape[1] == (after // 16) ** 2 + 1
    assert f"pos_embed {before // 16}x{before // 16} to {after // 16}x{after // 16} resized" in str(match)
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
    grid = source.pos_embed[:, 1:].unflatten(1, (before // 16,) * 2).movedim(3, 1)
    expected = nn.functional.interpolate(grid, size=(after // 16,) * 2, mode="bicubic", align_corners=False)
    assert torch.allclose(target.pos_embed[:, 1:].unflatten(1, (after // 16,) * 2).movedim(3, 1), expected)


def test_everything_else_is_copied_and_the_instance_head_is_left_out() -> None:
    source, target = vit(32, seed=1), vit(32, seed=2)
    weights = {f"backbone.{name}": value for name, value in source.state_dict().items()} | {
        "head.weight": torch.zeros(2040, 24)
    }
    match = load_backbone(target, weights, "a run")
    assert match.left_out == ["head.weight"] and not match.not_found
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ShapeError, match="resnet matches 0 of the backbone's .* parameters"):
        load_backbone(
            vit(32), build_backbone(Backbone(name="resnet18"), crop_px=32, seed=0).state_dict(), "resnet"
        )
    wide = build_backbone(Backbone(options=TINY | {"embed_dim": 48}), crop_px=32, seed=0)
    with pytest.raises(ShapeError, match="wide: .* has shape .*48.*, the backbone's has .*24"):
        load_backbone(vit(32), wide.state_dict(), "wide")


def test_position_embeddings_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ShapeError, match="51 and 197 tokens are no square grids with one prefix"):
        resize_position_embedding(torch.zeros(1, 51, 8), 197)


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
