"""A run that learned nothing says so: skipped steps at its end are an error, and no checkpoint is written
between them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.training import small_run
from vitds.config.load import load_settings
from vitds.errors import NumericsError, SettingsError
from vitds.runs.checkpoint import list_checkpoints
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics


def numerics_error(run: str, data: tuple[str, str], **options: object) -> str:
    with pytest.raises(NumericsError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


@pytest.mark.parametrize("head", ["dense", "sharded"])
def test_a_short_run_that_ends_amid_skipped_steps_is_an_error_and_keeps_only_what_was_sound(
    rank_pool, digit_files, tmp_path: Path, head: str
) -> None:
    run = tmp_path / "run"
    options = {
        "optimizer__lr_peak": 1e30,
        "checkpoint__every_steps": 1,
        "checkpoint__keep": 9,
        "head__kind": head,
    }
    said = rank_pool(1).run(numerics_error, str(run), digit_files, epochs=3, **options)[0]
    lines = read_metrics(run / "metrics.jsonl")
    first = next(line["step"] for line in lines if line["skipped"])
    assert f"was not finite in {lines[-1]['skipped']} of 9 steps, most of the last ones among them" in said
    assert "lower optimizer.lr_peak or set optimizer.clip_norm" in said
    assert [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")][
        -1
    ] <= first
    assert not Run(run).is_finished and not (run / "backbone.safetensors").exists()


def test_a_loss_that_is_not_finite_is_null_in_the_metrics(rank_pool, digit_files, tmp_path: Path) -> None:
    options = {"optimizer__lr_peak": 1e30, "epochs": 3}
    rank_pool(1).run(numerics_error, str(tmp_path / "run"), digit_files, **options)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"loss": null' in text and "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize("value", ["[0, 1, 1]", "[-1, 1, 1]"])
def test_a_deviation_that_can_only_give_nan_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"views.std.0: must be greater than 0, got (0|-1)"):
        load_settings(recipe=None, command="pretrain", assignments=[f"views.std={value}"], flags={})
