"""BatchNorm's statistics, measured anew from training images."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.engine.training import small_run
from vitds.augment.images import normalise
from vitds.data.beton import open_beton
from vitds.data.loader import eval_batches
from vitds.evaluate.norms import measure_norms
from vitds.models.build import build_backbone
from vitds.runs.directory import Run
from vitds.use.run import TrainedRun

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(digit_files, tmp_path_factory) -> TrainedRun:
    """A fine-tuned ResNet."""
    return small_run(
        str(tmp_path_factory.mktemp("norms") / "run"), digit_files, method="supervised", backbone="resnet"
    )


def backbone_of(run: TrainedRun) -> nn.Module:
    settings = run.settings
    backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
    backbone.load_state_dict(load_file(Run(run.path).backbone))
    return backbone


def test_the_first_layers_statistics_are_those_of_all_images(run: TrainedRun, digit_files) -> None:
    settings, file = run.settings, open_beton(Path(digit_files[0]))
    backbone = backbone_of(run)
    measure_norms(settings, backbone, file, CPU)
    images = torch.cat(
        [
            normalise(batch.crops, settings.views)
            for batch in eval_batches(file, settings.views, batch_images=256)
        ]
    )
    with torch.no_grad():
        maps_NCSS = backbone.conv1(images)
    # The mean over batches, of which the last, smaller one is left out; the variance is within a batch.
    torch.testing.assert_close(backbone.bn1.running_mean, maps_NCSS.mean((0, 2, 3)), rtol=0.05, atol=0.01)
    torch.testing.assert_close(backbone.bn1.running_var, maps_NCSS.var((0, 2, 3)), rtol=0.1, atol=0.0)


def test_nothing_else_changes_and_a_second_measurement_finds_the_same(run: TrainedRun, digit_files) -> None:
    settings, file = run.settings, open_beton(Path(digit_files[0]))
    backbone = backbone_of(run).train()
    backbone.bn1.running_mean.fill_(7.0)
    weights = copy.deepcopy(dict(backbone.named_parameters()))
    measure_norms(settings, backbone, file, CPU)
    first = copy.deepcopy(backbone.state_dict())
    measure_norms(settings, backbone, file, CPU)
    assert all(torch.equal(value, first[name]) for name, value in backbone.state_dict().items())
    assert all(torch.equal(value, weights[name]) for name, value in backbone.named_parameters())
    assert backbone.bn1.momentum == 0.1
    assert not any(module.training for module in backbone.modules())


def test_a_runs_weights_have_them_and_its_checkpoint_those_of_training(run: TrainedRun, digit_files) -> None:
    backbone, exported = backbone_of(run), load_file(Run(run.path).backbone)
    measure_norms(run.settings, backbone, open_beton(Path(digit_files[0])), CPU)
    torch.testing.assert_close(dict(backbone.state_dict()), exported, rtol=1e-5, atol=1e-6)
    (newest,) = sorted(Run(run.path).checkpoints.iterdir())[-1:]
    trained = load_file(next(newest.glob("model-*.safetensors")))
    assert not torch.equal(trained["backbone.bn1.running_mean"], exported["bn1.running_mean"])
    assert torch.equal(trained["backbone.conv1.weight"], exported["conv1.weight"])


def test_a_backbone_without_batchnorm_is_left_alone(digit_files, run: TrainedRun) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    measure_norms(run.settings, plain, open_beton(Path(digit_files[0])), CPU)
    assert plain.training


def test_they_do_not_depend_on_the_images_of_a_pass_in_evaluation(digit_files, run: TrainedRun) -> None:
    found = []
    for images in (1, 5, 256):
        evaluation = run.settings.eval.model_copy(update={"batch_images": images})
        backbone = backbone_of(run)
        measure_norms(
            run.settings.model_copy(update={"eval": evaluation}),
            backbone,
            open_beton(Path(digit_files[0])),
            CPU,
        )
        found.append(backbone.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]) and torch.equal(value, found[2][name])


def test_of_one_image_alone_nothing_is_measured(run: TrainedRun, digit_files) -> None:
    backbone = backbone_of(run)
    before = copy.deepcopy(backbone.state_dict())
    measure_norms(run.settings, backbone, open_beton(Path(digit_files[0])).take(np.array([3])), CPU)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
