"""The plan's bytes a step against those that two real ranks handed to collectives."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.comm.torch import TorchBackend
from torch import Tensor

from tests.plan.measured import SHALLOW, built_trainer
from tests.ranks import RankPool
from vitds import dist
from vitds.data.beton import open_beton
from vitds.engine.process import noise_into
from vitds.engine.signals import StopSignals
from vitds.plan.traffic import step_traffic

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


def sent_and_planned(data: str, stage: int, changes: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of DeepSpeed's collectives in the second step, by collective, and the plan's, by kind."""
    sent: Counter[str] = Counter()
    functions = {name: getattr(TorchBackend, name) for name in COLLECTIVES}

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
            own = min if "gather" in name else max  # of an output and an input, what this rank gives
            sent[name] += own(tensor.numel() * tensor.element_size() for tensor in tensors)
            return functions[name](*arguments, **options)

        return call

    folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
    with noise_into(folder / "log.txt"):
        trainer, case = built_trainer(open_beton(Path(data)), folder, stage, 60, changes, SHALLOW)
        batches = trainer.loader.batches(0, 2)
        trainer.update.engine.train()
        trainer._settle(trainer._launch(0, batches, None, StopSignals()))
        try:
            for name in COLLECTIVES:
                setattr(TorchBackend, name, counted(name))
            trainer._settle(trainer._launch(1, batches, None, StopSignals()))
        finally:
            for name, function in functions.items():
                setattr(TorchBackend, name, function)
            batches.close()
    return dict(sent), step_traffic(case)


@pytest.mark.parametrize(
    "stage, changes",
    [
        (0, {"batch.micro_images": 4}),
        (1, {"batch.micro_images": 2}),
        (2, {"batch.micro_images": 2}),
        (3, {"batch.micro_images": 2}),
    ],
    ids=str,
)
def test_traffic_is_what_two_ranks_send(
    rank_pool: Callable[[int], RankPool], digit_files: tuple[str, str], stage: int, changes: dict[str, Any]
) -> None:
    sent, planned = rank_pool(2).run(sent_and_planned, digit_files[0], stage, changes)[0]
    gathers = sent.pop("all_gather_into_tensor", 0)
    assert planned.pop("gradients reduced") == pytest.approx(sum(sent.values()), rel=0.02)
    # Stage 3 gathers parameters of fewer than 100,000 numbers once a step only, 4 % of this small model.
    assert sum(planned.values()) == pytest.approx(gathers, rel=0.05)
