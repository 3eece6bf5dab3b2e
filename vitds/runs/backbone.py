"""Saving and loading a backbone's weights: what matched, what was resized, what was dropped. Foreign files run no code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vitds.errors import DataError, ShapeError
from vitds.runs.checkpoint import STATES, CheckpointReader, verify_checkpoint
from vitds.runs.directory import write_atomic

LEAST_MATCH = 0.5  # of the model's parameters; below it the file is of another model


@dataclass(frozen=True)
class Match:
    """What became of the file's entries and the model's parameters, by name."""

    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    not_found: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = [f"{len(self.matched)} tensors matched"]
        if self.resized:
            told.append(f"{', '.join(self.resized)} resized")
        if self.left_out:
            told.append(
                f"{len(self.left_out)} left out ({', '.join(self.left_out[:3])}{', ...' if len(self.left_out) > 3 else ''})"
            )
        if self.not_found:
            told.append(f"{len(self.not_found)} of the model not found ({', '.join(self.not_found[:3])})")
        return "; ".join(told)


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Safetensors whose bytes depend on names and numbers alone; written atomically."""
    write_atomic(path, save({name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}))


def save_class_head(run: Path, weights: dict[str, Tensor], classes: tuple[str, ...]) -> None:
    """RUN/head.safetensors: weight (C, D) and bias (C,), with the names of the classes."""
    write_atomic(run / "head.safetensors", save(weights, {"classes": json.dumps(classes)}))


def read_class_head(run: Path, classes: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The class head of a fine-tuned run if it is for these very classes, else None (METHOD 4.4: the 448 px stage keeps it).

    Compared by the names: a count that agrees by chance is no reason to keep a head.
    Raises: DataError if the file is damaged.
    """
    path = run / "head.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return load_file(path) if json.loads(file.metadata()["classes"]) == list(classes) else None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no readable safetensors file of a class head: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name from a run directory, a checkpoint folder, a .safetensors file, or a .pth file of plain tensors.

    Raises: DataError if nothing readable is there, or a .pth needs more than tensors (it is not unpickled).
    """
    if path.is_dir() and (path / "manifest.json").exists():
        reader = CheckpointReader(verify_checkpoint(path))
        return {name: reader.get(name) for name in reader.names() if name.rpartition(".")[2] not in STATES}
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
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{file} is no readable safetensors file: {error}") from error
    except Exception as error:  # torch.load raises pickle's own errors for whatever weights_only refuses
        raise DataError(
            f"{file} holds more than plain tensors and is not loaded, for that would run its code: {error}"
        ) from error
    weights = next(
        (loaded[key] for key in ("state_dict", "model") if isinstance(loaded, dict) and key in loaded), loaded
    )
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DataError(f"{file} is no dictionary of tensors by name")
    return weights


def load_backbone(backbone: nn.Module, weights: dict[str, Tensor], source: str) -> Match:
    """Copy weights into a backbone by name, resizing its position embedding; heads and other extras are left out.

    Prefixes `module.` and `backbone.` are taken off. Returns what matched.
    Raises: ShapeError if fewer than half of the model's parameters are found, or a shape differs.
    """
    weights = {
        name.removeprefix("module.").removeprefix("backbone."): value for name, value in weights.items()
    }
    own = backbone.state_dict()
    parameters = {name for name, _ in backbone.named_parameters()}
    match = Match(left_out=sorted(set(weights) - set(own)), not_found=sorted(set(own) - set(weights)))
    for name in sorted(set(own) & set(weights)):
        value = weights[name]
        if value.shape != own[name].shape:
            value = _fitted(name, value, own[name], source)
            match.resized.append(f"{name} {_grid(weights[name], own[name])}")
        own[name].copy_(value)
        match.matched.append(name)
    found = sum(own[name].numel() for name in match.matched if name in parameters)
    whole = sum(own[name].numel() for name in parameters)
    if found < LEAST_MATCH * whole:
        raise ShapeError(
            f"{source} matches {found:,} of the backbone's {whole:,} parameters ({match}); is it of another backbone.name or options?"
        )
    return match


def _fitted(name: str, value: Tensor, own: Tensor, source: str) -> Tensor:
    if not name.endswith("pos_embed") or value.dim() != 3 or value.shape[2] != own.shape[2]:
        raise ShapeError(
            f"{source}: {name} has shape {list(value.shape)}, the backbone's has {list(own.shape)}"
        )
    return resize_position_embedding(value, own.shape[1])


def _grid(before: Tensor, after: Tensor) -> str:
    return " to ".join(
        f"{math.isqrt(tensor.shape[1])}x{math.isqrt(tensor.shape[1])}" for tensor in (before, after)
    )


def resize_position_embedding(embedding: Float[Tensor, "1 T D"], tokens: int) -> Float[Tensor, "1 t D"]:
    """Class and register entries kept, the square grid resized bicubically (align_corners False; METHOD 4.4).

    Raises: ShapeError if the tokens, less the same prefix, are not squares on both sides.
    """
    for prefix in range(0, 9):
        old_side, new_side = math.isqrt(embedding.shape[1] - prefix), math.isqrt(tokens - prefix)
        if old_side**2 + prefix == embedding.shape[1] and new_side**2 + prefix == tokens:
            break
    else:
        raise ShapeError(
            f"position embeddings of {embedding.shape[1]} and {tokens} tokens are no square grids with one prefix"
        )
    grid = embedding[:, prefix:].reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(
        grid.float(), size=(new_side, new_side), mode="bicubic", align_corners=False
    )
    return torch.cat([embedding[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)], 1)
