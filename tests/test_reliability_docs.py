"""Each test that docs/reliability.md and docs/slurm.md name as a proof is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
TESTS = {name for source in SOURCES for name in re.findall(r"^def test_(\w+)", source, re.MULTILINE)}


@pytest.mark.parametrize("page", ["reliability.md", "slurm.md"])
def test_every_test_that_is_named_as_a_proof_is_there(page: str) -> None:
    words = re.findall(r"`([\w.…]+)`", (ROOT / "docs" / page).read_text("utf-8"))
    named = [word for word in words if word.strip(".…").count("_") > 3]
    assert len(named) > 5
    patterns = {word: re.escape(word).replace(r"\.\.\.", r"\w*").replace("…", r"\w*") for word in named}
    assert not [
        word for word, pattern in patterns.items() if not any(re.fullmatch(pattern, test) for test in TESTS)
    ]
