"""Named checkpoints: tensors by parameter name in safetensors, for any ZeRO stage and world size.

RUN/checkpoints/step-00000042/
    manifest.json                   format, step, counters, each file's bytes and SHA-256, and its own SHA-256
    model-0-of-2.safetensors        NAME, NAME.exp_avg, NAME.exp_avg_sq (float32 masters and moments),
                                    NAME.average, buffers
    head-0-of-2.safetensors         the rows of a sharded head that rank 0 held, with their moments
Moved into place whole. No pickle; reading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitds import dist
from vitds.errors import ResourceError, RunError
from vitds.runs.directory import read_json, sync_folder, why_unwritten, write_json

FORMAT = 2
STATES = ("exp_avg", "exp_avg_sq", "average")  # what stands beside a parameter, as NAME.exp_avg


@dataclass(frozen=True)
class Saved:
    """One checkpoint folder and its manifest."""

    path: Path
    manifest: dict[str, Any]


def write_checkpoint(
    root: Path,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    keep: int,
    keep_every_steps: int = 0,
) -> Path:
    """Write this rank's parts; called by every rank.

    Args:
        root: RUN/checkpoints.
        step: steps done.
        parts: kind ("model", "head") -> tensors by name, this rank's own; contiguous, on any device.
        state: JSON-able counters, the same on all ranks; "head_rows" lists each rank's [first, last) where a
            head is sharded.
        keep: so many of the newest stay.
        keep_every_steps: those of every so many steps stay too; 0 keeps none.
    Raises: ResourceError on every rank if the disk is full on one; the checkpoints before stay.
    """
    # Built under a hidden name on the same file system, so that a rename can put it in place at once.
    final, beside = root / f"step-{step:08d}", root / f".writing-{step:08d}"
    failure = _make_folder(root, beside) if dist.is_main() else ""
    # The folder has to be there before any rank writes into it.
    dist.barrier()
    written, problem = _write_parts(beside, parts)
    results = dist.gather_objects((written, failure or problem))
    # All ranks know now whether all parts are on disk; only then is there a manifest.
    failures = [problem for _, problem in results if problem]
    if not failures and dist.is_main():
        files = {name: facts for part, _ in results for name, facts in part.items()}
        try:
            _put_in_place(beside, final, {"format": FORMAT, "step": step, **state, "files": files})
        except (OSError, ResourceError) as error:
            failures = [str(error)]
    # Rank 0's word for all: every rank raises, or none does.
    failures = dist.broadcast_object(failures)
    if failures:
        if dist.is_main():
            shutil.rmtree(beside, ignore_errors=True)
        raise ResourceError(
            f"the checkpoint of step {step} was not saved: {failures[0]}. The ones before are kept."
        )
    if dist.is_main():
        # Only now: until here a full disk leaves the earlier ones as they were.
        _remove_old(root, final, keep, keep_every_steps)
    return final


def _make_folder(root: Path, beside: Path) -> str:
    """Remove what a kill in the middle of a save left, and begin anew; returns why that failed, if so."""
    for unfinished in root.glob(".writing-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        return why_unwritten(beside, error)
    return ""


def _write_parts(beside: Path, parts: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Any], str]:
    """This rank's files; what the manifest says of each, and why one could not be written, if so."""
    written: dict[str, Any] = {}
    for kind, tensors in parts.items():
        # A file a rank and kind: nobody waits for another's bytes.
        path = beside / f"{kind}-{dist.rank()}-of-{dist.world_size()}.safetensors"
        try:
            path.touch()  # gets the mode of the umask; safetensors writes files that only their owner reads
            mode = path.stat().st_mode
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
            if path.stat().st_mode != mode:
                path.chmod(mode)
            # Hashed from the file and not from memory: as a reader will find it.
            written[path.name] = {"bytes": path.stat().st_size, "sha256": _hash_and_sync(path)}
        except (OSError, SafetensorError) as error:
            # Returned and not raised: the other ranks wait in a collective.
            return written, why_unwritten(path, error)
    return written, ""


def _put_in_place(beside: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with the hashes of all other files and its own, then rename the folder."""
    write_json(beside / "manifest.json", manifest | {"sha256": _hash_of(manifest)})
    # There may be one of this step that was found damaged; a rename does not replace a full folder.
    shutil.rmtree(final, ignore_errors=True)
    os.rename(beside, final)
    # The rename itself has to reach the disk before older checkpoints may go.
    sync_folder(final.parent)


def _remove_old(root: Path, newest: Path, keep: int, keep_every_steps: int) -> None:
    """Later ones than the one just written go too: the run went back behind them, for they were damaged."""
    whole = list_checkpoints(root)
    # By step and not by time of writing.
    until_now = [path for path in whole if _step_of(path) <= _step_of(newest)]
    kept = set(until_now[-keep:])
    if keep_every_steps:
        kept |= {path for path in until_now if _step_of(path) % keep_every_steps == 0}
    for path in whole:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def prune(root: Path, keep: int) -> tuple[list[Path], list[Path]]:
    """Remove all checkpoints but the newest sound ones, damaged ones too.

    Args:
        root: RUN/checkpoints.
        keep: how many sound ones stay.
    Returns: what stays, and what was removed, each newest first.
    Raises: RunError if none is sound; then all stay.
    """
    kept: list[Path] = []
    removed: list[Path] = []
    problem = ""
    for path in reversed(list_checkpoints(root)):
        try:
            if len(kept) < keep:
                # Verified before it counts, or one that is damaged could push out the last sound one.
                kept.append(verify_checkpoint(path).path)
                continue
        except RunError as error:
            problem = problem or str(error)
        # Damaged, or more than asked for.
        removed.append(path)
    if not kept:
        raise RunError(f"none of the checkpoints in {root} is sound, so all stay; the newest: {problem}")
    # Only when all were looked at: an interruption before this removes nothing.
    for path in removed:
        shutil.rmtree(path)
    return kept, removed


def _hash_and_sync(path: Path) -> str:
    with open(path, "rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )
        # On the disk before the manifest says that it is. (When verifying there is nothing to sync.)
        os.fsync(file.fileno())
    return digest


def _digest(file: Any) -> str:
    """For Python 3.10, which lacks hashlib.file_digest."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _hash_of(manifest: dict[str, Any]) -> str:
    # Keys sorted: the hash is of the content, not of the order in which it was put together.
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def list_checkpoints(root: Path) -> list[Path]:
    """The folders of whole checkpoints, oldest first."""
    return sorted(
        (path for path in root.glob("step-*") if path.is_dir() and path.name[5:].isdigit()), key=_step_of
    )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def verify_checkpoint(path: Path) -> Saved:
    """Read the manifest and hash every file.

    Raises: RunError that names the file and what is wrong with it.
    """
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise RunError(
            f"{path} has checkpoint format {manifest.get('format')!r}, this version of vitds reads {FORMAT}"
        )
    # Taken out first: the hash was made of the rest.
    if manifest.pop("sha256", None) != _hash_of(manifest):
        raise RunError(f"{path / 'manifest.json'} does not have the SHA-256 that it states: damaged")
    for name, facts in manifest["files"].items():
        file = path / Path(name).name  # a name that leads elsewhere is not followed
        if not file.is_file():
            raise RunError(f"{file} is missing")
        # The size first: it costs nothing, and says more than a wrong hash.
        if file.stat().st_size != facts["bytes"]:
            raise RunError(
                f"{file} has {file.stat().st_size} bytes, its manifest says {facts['bytes']}: truncated"
            )
        if _hash_and_sync(file) != facts["sha256"]:
            raise RunError(f"{file} does not have the SHA-256 of its manifest: damaged")
    return Saved(path, manifest)


def newest_sound(root: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with the newer ones.

    Hashed by rank 0 alone; all ranks get its answer.
    """
    found: Path | None = None
    problems: list[str] = []
    if dist.is_main():
        for path in reversed(list_checkpoints(root)):
            try:
                found = verify_checkpoint(path).path
                break
            except (RunError, OSError) as error:  # OSError: a disk that gives some of its blocks no more
                problems.append(str(error))
    # Ranks that went on from different checkpoints would train apart.
    found, problems = dist.broadcast_object((found, problems))
    return (None if found is None else Saved(found, read_json(found / "manifest.json"))), problems


class CheckpointReader:
    """Tensors of a verified checkpoint by name, read one at a time.

    Raises: RunError if a file is no safetensors file although its hash is the manifest's.
    """

    def __init__(self, saved: Saved) -> None:
        self.saved, self.files = saved, {}
        for name in sorted(saved.manifest["files"]):
            try:
                # Mapped and not read: a tensor comes from disk when it is asked for.
                self.files[name] = safe_open(saved.path / Path(name).name, "pt")
            except SafetensorError as error:
                raise RunError(
                    f"{saved.path / name} is no safetensors file ({error}); delete this checkpoint to use "
                    "another"
                ) from error
        # Name -> file, whichever rank wrote it. Files of a head are found by their rows instead.
        self.where = {
            key: name for name, file in self.files.items() if name.startswith("model-") for key in file.keys()
        }

    def get(self, name: str) -> Tensor:
        """A tensor of the model.

        Raises: RunError if the checkpoint has no such name: another backbone wrote it.
        """
        if name not in self.where:
            raise RunError(f"{self.saved.path} holds no {name!r}; was it written by another backbone?")
        return self.files[self.where[name]].get_tensor(name)

    def names(self) -> list[str]:
        """All names of the model's tensors."""
        return sorted(self.where)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last-1 of a sharded head's tensor, from whichever ranks wrote them.

        Raises: RunError if the checkpoint does not hold them all.
        """
        pieces, ranges = [], self.saved.manifest["head_rows"]
        for rank, (start, stop) in enumerate(ranges):
            # The part of [first, last) that this file has.
            low, high = max(first, start), min(last, stop)
            file = self.files.get(f"head-{rank}-of-{len(ranges)}.safetensors")
            if low < high and file is not None:
                # get_slice reads these rows only, however many the file has.
                pieces.append(file.get_slice(name)[low - start : high - start])
        # A gap in the manifest's ranges, or a file that is not listed.
        if sum(piece.shape[0] for piece in pieces) != last - first:
            raise RunError(
                f"{self.saved.path} does not hold rows {first}..{last - 1} of the instance head; it covers "
                f"{ranges}"
            )
        return torch.cat(pieces)
