"""The losses of the quickstart recipe's first twenty steps, stored: a change of the numbers has to be meant.

Equal on the environment that they were stored on, to rounding elsewhere. `python -m
tests.engine.test_stored_curve` stores them anew.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.engine.training import signal_after_lines
from vitds.errors import Stopped
from vitds.jobs.train import pretrain
from vitds.kernels import softmax
from vitds.runs.metrics import read_metrics

STORED = Path(__file__).parents[1] / "assets" / "idmm_digits_losses.json"
STEPS = 20


def arithmetic() -> str:
    """A hash of what torch itself computes with the recipe's shapes: processors of one name round
    differently."""
    generator = torch.Generator().manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(96, 3, 384, dropout=0.0, activation="gelu", batch_first=True)
    patches, head = torch.nn.Conv2d(3, 96, 4, 4), torch.nn.Linear(96, 896)
    parameters = [parameter for part in (patches, block, head) for parameter in part.parameters()]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    images = torch.randn(288, 3, 12, 12, generator=generator)
    digest = hashlib.sha256()
    for kept in (9, 5, 4):
        tokens = patches(images).flatten(2).transpose(1, 2)[:, :kept]
        head(block(tokens).mean(1)).logsumexp(1).mean().backward()
    for parameter in parameters:
        digest.update(parameter.grad.numpy().tobytes())
    return digest.hexdigest()[:16]


def processor() -> str:
    """What the first processor says of itself."""
    names = ("cpu family", "model", "model name", "stepping", "cache size")
    lines = [
        line.partition(":") for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    ]
    return ", ".join(f"{name.strip()} {value.strip()}" for name, _, value in lines if name.strip() in names)


def compiler() -> str:
    """What made the head's kernel, as it says itself: another one may sum in another order."""
    library = Path(softmax.library()._name).read_bytes()
    return ", ".join(
        sorted(
            {found.decode() for found in re.findall(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", library)}
        )
    )


def first_losses(run: str) -> tuple[dict[str, Any], list[float]]:
    """This environment, and the losses; the run is stopped by a signal once it has them."""
    signal_after_lines(Path(run), STEPS)
    try:
        pretrain(run=run, ds_config="zero0", set=["log.tensorboard=false", "log.page=false"])
    except Stopped:
        pass
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "compiler": compiler()}
    environment |= {"processor": processor(), "arithmetic": arithmetic()}
    return environment, [line["loss"] for line in read_metrics(Path(run) / "metrics.jsonl")[:STEPS]]


def test_the_first_losses_are_the_stored_ones(rank_pool, tmp_path: Path) -> None:
    environment, losses = rank_pool(1).run(first_losses, str(tmp_path / "run"))[0]
    stored = json.loads(STORED.read_text())
    if environment == stored["environment"]:
        assert losses == stored["losses"]
    np.testing.assert_allclose(losses, stored["losses"], rtol=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        environment, losses = first_losses(f"{folder}/run")
    STORED.write_text(json.dumps({"environment": environment, "losses": losses}, indent=1) + "\n")
