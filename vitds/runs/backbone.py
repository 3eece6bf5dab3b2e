"""Saving and loading a backbone's weights: what matched, what was resized, what was dropped.

Foreign files run no code.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vitds.errors import DataError, NumericsError, ShapeError
from vitds.methods import method_class
from vitds.models.resize import resized
from vitds.runs.checkpoint import STATES, CheckpointReader, verify_checkpoint
from vitds.runs.directory import Run, write_atomic
from vitds.runs.names import choose_backbone, flat_names

LEAST_MATCH = 0.5  # of the model's parameters; below it the file is of another model
LARGEST = 1e6  # of a weight; trained ones stay within hundreds


@dataclass(frozen=True)
class Match:
    """What became of the file's entries and the model's parameters, by name."""

    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    not_found: list[str] = field(default_factory=list)
    taken_off: list[str] = field(default_factory=list)
    rivals: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors matched"]
        if self.taken_off:
            parts[0] += f" after {' and '.join(self.taken_off)} was taken off their names"
        if self.rivals:
            parts.append(
                f"{_some(self.rivals)} matches as well (running averages come first, MoCo's slow copy last)"
            )
        if self.resized:
            parts.append(f"{len(self.resized)} resized ({_some(self.resized)})")
        if self.left_out:
            parts.append(f"{len(self.left_out)} left out ({_some(self.left_out)})")
        if self.not_found:
            parts.append(f"{len(self.not_found)} of the model not found ({_some(self.not_found)})")
        return "; ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Safetensors whose bytes depend on names and numbers alone; written atomically."""
    write_atomic(path, save({name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}))


def save_class_head(run: Path, weights: dict[str, Tensor], classes: tuple[str, ...]) -> None:
    """RUN/head.safetensors: weight (C, D) and bias (C,), with the names of the classes."""
    write_atomic(run / "head.safetensors", save(weights, {"classes": json.dumps(classes)}))


def read_class_head(run: Path, classes: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The class head of a fine-tuned run if it is for these very classes, else None.

    So a second stage of fine-tuning, at 448 px, keeps it. Compared by the names: a count that agrees by
    chance is no reason to keep a head.
    Raises: DataError if the file is damaged.
    """
    path = run / "head.safetensors"
    if not path.exists():
        return None
    return load_file(path) if read_class_names(path) == classes else None


def read_class_names(head: Path) -> tuple[str, ...]:
    """The classes of a fine-tuned run, in label order, from its head.safetensors.

    Raises: DataError if the file is damaged.
    """
    try:
        with safe_open(head, "pt") as file:
            return tuple(map(str, json.loads(file.metadata()["classes"])))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{head} is no readable safetensors file of a class head: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name from a run directory, a checkpoint folder, a .safetensors or a .pth file.

    A .pth may hold dictionaries within dictionaries; their keys become parts of the names.

    Raises: DataError if nothing readable is there, or a .pth needs more than tensors (it is not unpickled).
    """
    if path.is_dir() and (path / "manifest.json").exists():
        return _of_checkpoint(path)
    file = path / "backbone.safetensors" if path.is_dir() else path
    if not file.is_file():
        hint = (
            "the run has not finished: go on with it first, or name one of its checkpoints"
            if path.is_dir()
            else "check the path"
        )
        raise DataError(f"{file} does not exist; {hint}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Flags stand beside the weights in the files of DeiT, DINO and MAE; a Namespace runs nothing when it
        # is made.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{file} is no readable safetensors file: {error}") from error
    except Exception as error:  # torch.load raises pickle's own errors for whatever weights_only refuses
        raise DataError(
            f"{file} holds more than plain tensors and is not loaded, for that would run its code: {error}"
        ) from error
    weights = flat_names(loaded) if isinstance(loaded, dict) else {}
    if not weights:
        raise DataError(f"{file} is no dictionary of tensors by name")
    return weights


def _of_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights of one of our checkpoints that its method evaluates, without the optimizer's state."""
    reader = CheckpointReader(verify_checkpoint(path))
    names = [name for name in reader.names() if name.rpartition(".")[2] not in STATES]
    run = Run(path.parent.parent)
    if (run.path / "settings.yaml").exists():
        prefix = method_class(run.settings.method).weights_prefix
        names = [name for name in names if name.startswith(prefix)]
    return {name: reader.get(name) for name in names}


def load_backbone(backbone: nn.Module, weights: dict[str, Tensor], source: str) -> Match:
    """Copy weights into a backbone by name.

    What belongs to a grid of patches is resized, heads and the like are left out. Prefixes and wrappers in
    the names are taken off; of several backbones in a file one is chosen (runs/names.py).

    Args:
        backbone: on any device.
        weights: by name, as `read_weights` gives them.
        source: what messages call them.
    Returns: what matched.
    Raises: ShapeError if fewer than half of the model's parameters are found, or a shape differs and cannot
        be resized. NumericsError if a weight is not finite, or absurdly large.
    """
    own = backbone.state_dict()
    parameters = {name for name, _ in backbone.named_parameters()}
    chosen = choose_backbone(weights, own)
    match = Match(
        left_out=chosen.rest,
        not_found=sorted(set(own) - set(chosen.weights)),
        taken_off=chosen.taken_off,
        rivals=chosen.rivals,
    )
    for name, value in sorted(chosen.weights.items()):
        _check_numbers(name, value, source, LARGEST if name in parameters else math.inf)
        if value.shape != own[name].shape:
            match.resized.append(f"{name} from {list(value.shape)} to {list(own[name].shape)}")
            try:
                value = resized(name, value, own[name])
            except ShapeError as error:
                raise ShapeError(f"{source}: {error}") from error
        own[name].copy_(value)
        match.matched.append(name)
    found = sum(own[name].numel() for name in match.matched if name in parameters)
    whole = sum(own[name].numel() for name in parameters)
    if found < LEAST_MATCH * whole:
        raise ShapeError(
            f"{source} matches {found:,} of the backbone's {whole:,} parameters ({match}); is it of another "
            "backbone.name or options?"
        )
    return match


def _check_numbers(name: str, value: Tensor, source: str, largest: float) -> None:
    """Raises: NumericsError that names the tensor and the value."""
    if not value.is_floating_point() or not value.numel():
        return
    low, high = (float(end) for end in value.float().aminmax())  # NaN wherever one is in it
    worst = high if math.isnan(high) else max(low, high, key=abs)
    if not abs(worst) <= largest:  # so NaN is refused too; buffers may hold infinite bounds (Gemma's ViT)
        raise NumericsError(
            f"{source}: {name} holds {worst:g}; weights that are not finite, or above {LARGEST:g}, come of a "
            "training that failed or a damaged file. Take other weights, or an earlier checkpoint"
        )
