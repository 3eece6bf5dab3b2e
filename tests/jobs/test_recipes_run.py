"""The paper's recipes at toy length on real photographs: 112 px, then 224, then 448, each from the one
before.

DeiT-Tiny's train here, the other backbones' are asked whether they could; tests/soak_recipes.py trains all.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from vitds.config.load import load_settings
from vitds.data.build import build_beton
from vitds.models.facts import model_facts
from vitds.models.resize import why_not_at
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenette-224" / "train.tar"
PAPERS_BACKBONES = ("deit_tiny", "deit_base", "pvt_v2_b0", "pvt_v2_b3", "t2t_vit_7", "t2t_vit_14")
TOY = (
    "batch.global_images=8",
    "batch.chunk_images=4",
    "engine.precision=fp32",
    "eval.knn_k=[5]",
    "log.tensorboard=false",
    "log.page=false",
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_photographs(tmp_path_factory.mktemp("photographs"))


def make_photographs(folder: Path) -> tuple[str, str]:
    """Sixteen photographs of two classes for training and eight for test: ImageNet's where they are, else
    parts of scikit-learn's two.
    """
    if PHOTOGRAPHS.exists():
        taken: dict[str, int] = {}
        with tarfile.open(PHOTOGRAPHS) as archive:
            for member in archive:
                name, _, file = member.name.partition("/")
                number = taken[name] = taken.get(name, -1) + 1
                if len(taken) <= 2 and member.isfile() and number < 12:
                    target = folder / ("train" if number < 8 else "test") / name / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(member).read())
    else:
        for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
            for number in range(12):
                target = folder / ("train" if number < 8 else "test") / name / f"{number}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                top, left = 15 * number, 30 * number
                Image.fromarray(np.asarray(image)[top : top + 240, left : left + 260]).save(
                    target, quality=95
                )
    for split in ("train", "test"):
        build_beton([folder / split], folder / f"{split}.beton", storage="jpg")
    return str(folder / "train.beton"), str(folder / "test.beton")


def toy_run(job: str, recipe: str, run: str, data: tuple[str, str], init: str | None = None) -> dict:
    """One epoch of a recipe, on the rank that is called."""
    from vitds.jobs.train import finetune, pretrain

    words = [*TOY, *(["head.kind=sharded"] if job == "pretrain" else [])]
    done: Run = (pretrain if job == "pretrain" else finetune)(
        recipe=recipe, data=data[0], test=data[1], run=run, init=init, epochs=1, ds_config="zero2", set=words
    )
    return done.summary


def test_pretraining_at_112_then_fine_tuning_at_224_and_448(rank_pool, photographs, tmp_path: Path) -> None:
    pool = rank_pool(2)
    first = pool.run(toy_run, "pretrain", "idmm_deit_tiny", str(tmp_path / "112"), photographs)[0]
    assert first["steps"] == 2 and 0 <= first["knn"]["5"]["top1"] <= 100
    assert abs(read_metrics(tmp_path / "112" / "metrics.jsonl")[0]["loss"] - 2 * np.log(16)) < 0.5
    second = pool.run(
        toy_run,
        "finetune",
        "finetune_deit_tiny_224",
        str(tmp_path / "224"),
        photographs,
        str(tmp_path / "112"),
    )[0]
    assert "pos_embed from [1, 50, 192] to [1, 197, 192]" in pool.output and 0 <= second["top1"] <= 100
    pool.run(
        toy_run,
        "finetune",
        "finetune_deit_tiny_448",
        str(tmp_path / "448"),
        photographs,
        str(tmp_path / "224"),
    )
    assert (
        "pos_embed from [1, 197, 192] to [1, 785, 192]" in pool.output and "the same 2 classes" in pool.output
    )


@pytest.mark.parametrize("key", PAPERS_BACKBONES)
def test_the_stages_of_each_backbone_of_the_paper_fit_on_each_other(key: str) -> None:
    first = load_settings(recipe=f"idmm_{key}", command="pretrain", flags={})
    second, third = (
        load_settings(recipe=f"finetune_{key}_{side}", command="finetune", flags={}) for side in (224, 448)
    )
    assert first.backbone == second.backbone == third.backbone
    assert model_facts(first.backbone, first.views.crop_px).parameters > 3e6
    assert why_not_at(first.backbone, first.views.crop_px, second.views.crop_px) == ""
    assert why_not_at(second.backbone, second.views.crop_px, third.views.crop_px) == ""
