"""`vitds export …`: the weights of a run for timm, transformers or onnxruntime."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Literal

from vitds.data.beton import BetonFile, labelled
from vitds.data.digits import NAME as DIGITS
from vitds.errors import ResourceError, RunError
from vitds.jobs.data_files import open_file
from vitds.terminal import say
from vitds.use.export import new_folder, sameness
from vitds.use.model import Model, open_model

Kind = Literal["timm", "hf", "onnx"]


def export(kind: Kind, run: str, *, out: str, int8: bool = False) -> Path:
    """Write a folder with a run's weights for another library, compared with the run, and a model card.

    Args:
        kind: timm, hf (transformers) or onnx.
        run: a run directory or one of its checkpoints.
        out: the folder to make.
        int8: of onnx: also a model with 8-bit weights.
    Returns: the folder.
    Raises: RunError if the run cannot be read; ShapeError for an architecture that the library lacks;
        ResourceError if the library is not installed; UsageError if something is at `out` already.
    """
    if not os.path.exists(os.path.expanduser(run)):
        raise RunError(f"{run} does not exist; name a run directory or one of its checkpoints")
    module = _exporter(kind)
    with new_folder(out) as folder:
        model = open_model(run, device="cpu")
        if kind == "onnx":
            test_file = _test_file(model) if int8 else None
            lines = module.export_onnx(model, folder, int8=int8, test_file=test_file)
        else:
            found = getattr(module, f"export_{kind}")(model, folder)
            lines = [f"its numbers differ from the run's {sameness(found)}"]
    for line in lines:
        say(f"{out}: {line}")
    say(f"{out}/README.md says how to use it")
    return Path(out)


def _exporter(kind: Kind):
    """The module of an export, whose libraries are installed only for it."""
    try:
        return importlib.import_module(f"vitds.use.export_{kind}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("vitds"):
            raise
        raise ResourceError(f'export {kind} needs {error.name}: pip install "vitds[export]"') from error


def _test_file(model: Model) -> BetonFile | None:
    """The labelled images of the run's test file, if it is still there."""
    name = model.settings.data.test
    if name is None or not (name == DIGITS or Path(name).exists()):
        return None
    return labelled(open_file(name, "--test", "test"))
