"""Probes: measured at the epochs asked for, the same for every number of ranks and kind of head, and without
effect on training."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import pytest

from tests.engine.training import small_run, untimed
from vitds.augment.images import normalise
from vitds.runs.metrics import read_metrics


def probed_run(run: str, data: tuple[str, str], **options) -> list[dict]:
    return read_metrics(small_run(run, data, eval__every_epochs=2, epochs=5, **options).metrics)


def test_probes_come_every_so_many_epochs_and_do_not_depend_on_ranks_or_head(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    one = rank_pool(1).run(probed_run, str(tmp_path / "one"), digit_files)[0]
    two = rank_pool(2).run(probed_run, str(tmp_path / "two"), digit_files, stage=3, head__kind="sharded")[0]
    names = {"probe/alignment", "probe/uniformity", "probe/rankme", "probe/rankme_centred"}
    names |= {"probe/instance_top1", "probe/knn5_top1"}
    probed = [line["step"] for line in one if names <= set(line)]
    assert probed == [5, 11] and all(
        not any(key.startswith("probe/") for key in line) for line in one if line["step"] not in probed
    )
    for step in probed:
        for name in names:
            assert one[step][name] == pytest.approx(two[step][name], rel=1e-3), name


def test_a_recipe_of_one_view_has_the_probes_that_need_no_second_one(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    one_view = {"views__groups": "[{name: view, views: 1, scale: [0.5, 1.0]}]"}
    probed = rank_pool(1).run(probed_run, str(tmp_path / "run"), digit_files, **one_view)[0][11]
    assert {"probe/uniformity", "probe/rankme", "probe/instance_top1"} <= set(probed)
    assert "probe/alignment" not in probed


def test_probes_change_nothing_of_the_training(rank_pool, digit_files, tmp_path: Path) -> None:
    rank_pool(1).run(probed_run, str(tmp_path / "probed"), digit_files, optimizer__lr_peak=1e-3)
    rank_pool(1).run(plain_run, str(tmp_path / "plain"), digit_files, optimizer__lr_peak=1e-3)
    assert (tmp_path / "probed" / "backbone.safetensors").read_bytes() == (
        tmp_path / "plain" / "backbone.safetensors"
    ).read_bytes()
    assert len(untimed(tmp_path / "probed")) == len(untimed(tmp_path / "plain")) == 15


def plain_run(run: str, data: tuple[str, str], **options) -> None:
    small_run(run, data, epochs=5, **options)


def slowly_probed(run: str, data: tuple[str, str]) -> int:
    """Steps of a run whose probes take longer than a step may, each of their batches less."""

    def slow(*arguments):
        time.sleep(0.1)
        return normalise(*arguments)

    with (
        mock.patch("vitds.engine.watchdog.HUNG_AFTER_S", 4.0),
        mock.patch("vitds.evaluate.features.normalise", slow),
    ):
        return len(probed_run(run, data, eval__batch_images=1))


def test_a_probe_may_take_longer_than_a_step_that_hangs(rank_pool, digit_files, tmp_path: Path) -> None:
    assert rank_pool(1).run(slowly_probed, str(tmp_path / "run"), digit_files) == [15]
