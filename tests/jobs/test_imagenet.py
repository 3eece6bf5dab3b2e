"""The way that launch/slurm_imagenet.sh takes, without Slurm and small: a tree in ImageNet's layout, two
ranks, down to an accuracy.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.data.small_files import picture
from vitds.cli import main

PHOTOGRAPHS = Path(__file__).parents[2].parent / "shared/data/imagenette-224"
SYNSETS = 3
RECIPE = """
views: {crop_px: 32, groups: [{name: all, views: 1, scale: [0.3, 1.0]}]}
backbone: {name: vit_tiny_patch16_224, options: {patch_size: 16, embed_dim: 24, depth: 2, num_heads: 3}}
batch: {global_images: 12, chunk_images: 3}
engine: {precision: fp32, compile: off}
eval: {knn_k: [5]}
log: {tensorboard: false}
"""


def extract_some(archive: Path, folder: Path, per_class: int) -> None:
    taken: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            synset = Path(member.name).parent.name
            if (
                member.isfile()
                and (synset in taken or len(taken) < SYNSETS)
                and taken.get(synset, 0) < per_class
            ):
                taken[synset] = taken.get(synset, 0) + 1
                (folder / synset).mkdir(parents=True, exist_ok=True)
                (folder / synset / f"{taken[synset]:03}.JPEG").write_bytes(tar.extractfile(member).read())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """files/train/SYNSET/*.JPEG and files/val/SYNSET/*.JPEG: ImageNet's photographs where they are, else made
    ones. And two recipes.
    """
    root = tmp_path_factory.mktemp("imagenet")
    for split, archive, per_class in (("train", "train.tar", 12), ("val", "test.tar", 5)):
        if (PHOTOGRAPHS / archive).exists():
            extract_some(PHOTOGRAPHS / archive, root / "files" / split, per_class)
            continue
        for number in range(SYNSETS * per_class):
            folder = root / "files" / split / f"n0144000{number % SYNSETS}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(number, 60, 80)).save(folder / f"{number}.JPEG", "jpeg")
    (root / "pre.yaml").write_text(f"method: idmm\nhead: {{kind: sharded}}{RECIPE}")
    (root / "fine.yaml").write_text(f"method: supervised{RECIPE}")
    return root


def call(pool, *words: str) -> str:
    """A command on all ranks of the pool; what it printed."""
    assert set(pool.run(main, [str(word) for word in words])) == {0}, pool.output
    return pool.output


def test_imagenet_from_its_tree_to_an_accuracy_and_on_from_a_subset(rank_pool, tree: Path) -> None:
    one, two = rank_pool(1), rank_pool(2)
    train, test, subset = (tree / f"{name}.beton" for name in ("in-train", "in-test", "subset"))
    call(one, "data", "build", tree / "files", "--out", train, "--split", "train")
    call(one, "data", "build", tree / "files", "--out", test, "--split", "val", "--classes_from", train)
    data = ("--data", train, "--test", test, "--ds_config", "zero2", "--epochs", "2")

    call(two, "pretrain", "--recipe", tree / "pre.yaml", *data, "--run", tree / "pre")
    checkpoint = max((tree / "pre/checkpoints").iterdir())
    assert {"head-0-of-2.safetensors", "head-1-of-2.safetensors"} <= {
        file.name for file in checkpoint.iterdir()
    }
    said = call(
        two, "finetune", "--recipe", tree / "fine.yaml", *data, "--init", tree / "pre", "--run", tree / "fine"
    )
    assert f"weights from {tree / 'pre'}" in said
    top1 = json.loads((tree / "fine/summary.json").read_text())["top1"]
    assert json.loads(call(one, "eval", "top1", tree / "fine", "--json"))["top1"] == top1

    # Small data helps ImageNet: the backbone comes from a run on a part of it, the training is on all.
    one_synset = min((tree / "files/train").iterdir())
    call(one, "data", "build", one_synset, "--out", subset)
    call(
        two,
        "pretrain",
        "--recipe",
        tree / "pre.yaml",
        "--data",
        subset,
        "--epochs",
        "1",
        "--run",
        tree / "pre-small",
    )
    said = call(
        two,
        "finetune",
        "--recipe",
        tree / "fine.yaml",
        *data,
        "--init",
        tree / "pre-small",
        "--run",
        tree / "fine-small",
    )
    assert (
        f"weights from {tree / 'pre-small'}" in said
        and json.loads((tree / "fine-small/summary.json").read_text())["steps"] == 6
    )
