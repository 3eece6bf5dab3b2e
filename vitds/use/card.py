"""The model card beside exported weights: what they were made of, how, how good they are, how to use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitds import __version__
from vitds.config.load import dump_settings
from vitds.config.methods import METHODS
from vitds.runs.directory import Run, read_json, write_atomic
from vitds.use.model import Model

NAMES_SHOWN = 20
OF_A_CHECKPOINT = (
    "These are the weights of the checkpoint {}. The run's figures are of its end: there are none."
)
CARD = """\
---
license: unknown
library_name: {library}
pipeline_tag: {task}
tags: [vitds]
---

# {backbone}, trained by `{method}`

Exported by vitds {version} from the run `{run}`. Input: {side} x {side} pixels, mean {mean}, deviation {std}.

## Use

In this folder, on a photograph of yours:

```python
{usage}
```

{notes}

## Data

{data}

## Recipe

{recipe}

## Results

{results}

## Licence

Not decided. Put one in place of `unknown` in the first lines. The weights come from the images named above,
and from the weights that the recipe names as `init`, if it does.
"""


def write_card(folder: Path, model: Model, *, library: str, usage: str, notes: list[str]) -> None:
    """README.md and recipe.yaml, the run's settings, in a folder of exported weights.

    Under another name than in the run, as settings.yaml makes a folder a run.

    Args:
        folder: of the weights.
        model: of a run.
        library: which reads the weights, as Hugging Face calls it.
        usage: Python that runs in the folder beside a photo.jpg; its last three lines do the work.
        notes: what else a person should know of these weights, a line each.
    """
    settings, run = model.settings, model.run
    text = CARD.format(
        task="image-classification" if model.head is not None else "image-feature-extraction",
        library=library,
        backbone=settings.backbone.name,
        method=settings.method,
        version=__version__,
        run=run.path.name,
        side=settings.views.crop_px,
        mean=list(settings.views.mean),
        std=list(settings.views.std),
        usage=usage.strip(),
        notes="\n".join(f"- {note}" for note in notes),
        data=_data(run, model),
        recipe=_recipe(model),
        results=_results(run) if model.source == run.path else OF_A_CHECKPOINT.format(model.source.name),
    )
    write_atomic(folder / "README.md", text.encode())
    write_atomic(folder / "recipe.yaml", dump_settings(settings).encode())


def command_of(model: Model) -> str:
    """The command that trains the run of a model once more, beside its recipe.yaml."""
    return f"vitds {METHODS[model.settings.method].command} --recipe recipe.yaml --run runs/again"


def _data(run: Run, model: Model) -> str:
    facts, contents = _known(run, "data.json"), _known(run, "inputs.json")
    lines = [f"Trained on `{model.settings.data.train_text}`"]
    if facts:
        side = f"at most {facts['side_px']} px on the short side" if facts["side_px"] else "in their own size"
        lines[0] += f": {facts['images']:,} images, stored as {facts['storage']}, {side}"
    if "data.train" in contents:
        lines.append(f"The content's hash: `{contents['data.train']}`")
    if model.classes:
        more = len(model.classes) - NAMES_SHOWN
        named = ", ".join(model.classes[:NAMES_SHOWN]) + f" and {more} more" * (more > 0)
        lines.append(f"{len(model.classes)} classes: {named}")
    return "".join(f"{line}.\n" for line in lines).strip()


def _recipe(model: Model) -> str:
    settings = model.settings
    facts = _known(model.run, "environment.json")
    begin = f"from the weights of `{settings.init}`" if settings.init else "from random weights"
    text = (
        f"{settings.epochs} epochs {begin}, {settings.batch.global_images} images a step, rate "
        f"{settings.optimizer.lr_peak:g}, {settings.engine.precision}, seed {settings.seed}. `recipe.yaml` "
        f"has every setting. The command that trains it once more:\n\n    {command_of(model)}"
    )
    if facts:
        versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("vitds", "torch", "timm"))
        text += (
            f"\n\nIt was trained on {facts['ranks']} rank(s) with ZeRO {facts['zero_stage']} ({versions})."
        )
    return text


def _results(run: Run) -> str:
    if not run.is_finished:
        return "The run is not finished: there are none yet."
    summary = run.summary
    scores = {"class head": summary} if "top1" in summary else {}
    scores |= {f"nearest neighbours, k = {k}": score for k, score in summary.get("knn", {}).items()}
    if not scores:
        return "It was trained without a test file: there are none."
    rows = "".join(f"\n| {name} | {_figures(score)} |" for name, score in scores.items())
    head = "| | top-1 | 95 % | top-5 | balanced | macro-F1 |\n|---|---|---|---|---|---|"
    baseline = next(iter(scores.values()))["majority"]
    return (
        f"In percent, on `{run.settings.data.test}`, by the run itself. Always the most frequent class: "
        f"{baseline:.2f}.\n\n{head}{rows}"
    )


def _figures(score: dict[str, Any]) -> str:
    low, high = score["top1_interval"]
    others = [f"{score[name]:.2f}" for name in ("top5", "balanced_accuracy", "macro_f1")]
    return " | ".join([f"{score['top1']:.2f}", f"{low:.2f} to {high:.2f}", *others])


def _known(run: Run, name: str) -> dict[str, Any]:
    """A small file of the run; nothing where it has none, as runs of earlier versions."""
    return read_json(run.path / name) if (run.path / name).exists() else {}
