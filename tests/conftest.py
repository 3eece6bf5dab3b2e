"""Fixtures for all tests; shapes and types of public signatures are checked at run time (jaxtyping), which a
run does not pay for.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import tests.own_cores  # noqa: F401 - before torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported anywhere

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image
from sklearn.datasets import load_digits

install_import_hook("vitds", "beartype.beartype")

# Started in the background (`bash tests/run.sh &`) the suite ignores Ctrl-C, and so would all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.interpreted import Interpreted, interpreter  # noqa: E402
from tests.ranks import RankPool  # noqa: E402
from vitds.data.build import build_beton  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the suite (pytest -n 2 --dist loadgroup). Files that use the pools of ranks go to
    one of them, for the pools take gigabytes; the other files stay whole, with what their tests share.
    """
    with_ranks = {item.path for item in items if "rank_pool" in getattr(item, "fixturenames", ())}
    for item in items:
        group = "ranks" if item.path in with_ranks else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    """A launcher's variables that a test leaves behind make every later test a rank of a group that never
    meets.
    """
    yield
    left = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    assert not left, f"the test left {left} in the environment"


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """DeepSpeed puts its own in its place for ZeRO-3, in the whole process: a bench that is called here
    leaves it behind.
    """
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """rank_pool(2) gives two real ranks, started at the first use."""
    pools: dict[int, RankPool] = {}

    def pool(ranks: int) -> RankPool:
        if ranks not in pools or not all(process.is_alive() for process in pools[ranks].processes):
            pools[ranks] = RankPool(ranks)
        return pools[ranks]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two small .beton files of real scanned digits with four classes: 52 training images, 20 test images."""
    return make_digit_files(tmp_path_factory.mktemp("digits"))


def make_digit_files(folder: Path) -> tuple[str, str]:
    """The same in a folder, for scripts."""
    digits = load_digits()
    for split, per_class, skip in (("train", 13, 0), ("test", 5, 13)):
        for label in range(4):
            (folder / split / f"digit {label}").mkdir(parents=True)
            for number, image in enumerate(digits.images[digits.target == label][skip : skip + per_class]):
                Image.fromarray((image * 15.9).astype(np.uint8)).resize((24, 20)).save(
                    folder / split / f"digit {label}" / f"{number}.png"
                )
        build_beton([folder / split], folder / f"{split}.beton", workers=1)
    return str(folder / "train.beton"), str(folder / "test.beton")


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreted]:
    """interpreted(function, argument) calls it where kernels for a GPU run on the CPU."""
    with interpreter() as call:
        yield call
