"""Keep the result of an experiment for docs/results.md, and write the page again:

    python docs/results/add_experiment.py OUT NAME

OUT is the folder of a finished `vitds ablate`, `compare` or `transfer`. Its JSON is stored in
docs/results/experiments/NAME.json without the paths of the machine. page.md.jinja says where its table
stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

from docs.results.render import EXPERIMENTS, PAGE, page

KINDS = ("ablation", "comparison", "transfer")


def without_paths(value: Any) -> Any:
    """Every absolute path by its last part, in texts too: `--data /x/my.beton` becomes `--data my.beton`."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and "/" in value:
        return " ".join(
            word.rpartition("/")[2] if word.startswith("/") else word for word in value.split(" ")
        )
    return value


def main(argv: list[str] | None = None, folder: Path = EXPERIMENTS) -> None:
    """See the file."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("out", type=Path)
    words.add_argument("name")
    given = words.parse_args(argv)
    found = [given.out / f"{kind}.json" for kind in KINDS if (given.out / f"{kind}.json").is_file()]
    if len(found) != 1:
        sys.exit(f"{given.out} is no finished experiment: it has none of {', '.join(KINDS)} as .json")
    path = folder / f"{given.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(without_paths(json.loads(found[0].read_text("utf-8"))), indent=1) + "\n", "utf-8"
    )
    PAGE.write_text(page(), "utf-8")
    print(f"{path}\n{PAGE}")


if __name__ == "__main__":
    main()
