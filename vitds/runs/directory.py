"""The run directory and its small files; docs/running.md lists them all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vitds import dist
from vitds.config.load import differences, dump_settings, read_settings
from vitds.config.tree import Settings
from vitds.data.beton import Manifest
from vitds.data.joined import joined_hash
from vitds.data.manifest import load_manifest, manifest_path
from vitds.errors import ResourceError, RunError

STATES_BYTES = 12  # of a weight in a checkpoint: itself and two moments, in float32


@dataclass(frozen=True)
class Run:
    """A run directory, as a job returns it."""

    path: Path

    @property
    def settings(self) -> Settings:
        """The settings as resolved at the first start."""
        return read_settings(self.path / "settings.yaml")

    @property
    def summary(self) -> dict[str, Any]:
        """What the finished run reports: steps, losses, seconds, evaluation."""
        return read_json(self.path / "summary.json")

    @property
    def has_begun(self) -> bool:
        """Whether anything was trained: a line of metrics, or a checkpoint."""
        has_line = self.metrics.exists() and self.metrics.stat().st_size > 0
        return has_line or any(self.checkpoints.glob("step-*"))

    @property
    def is_finished(self) -> bool:
        """True once summary.json stands: it is the last file that a run writes."""
        return (self.path / "summary.json").exists()

    @property
    def backbone(self) -> Path:
        """The trained backbone's weights."""
        return self.path / "backbone.safetensors"

    @property
    def best(self) -> Path:
        """The weights of the best epoch so far, where the run chooses one."""
        return self.path / "best.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, one folder a step."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"


def no_run(name: str) -> RunError:
    """What to raise for the path of something that is no run; names the runs that lie in it, as in a fit's.

    Args:
        name: of the path, as it was given.
    """
    inside = sorted(str(path.parent) for path in Path(name).expanduser().glob("*/settings.yaml"))
    hint = f"; did you mean {' or '.join(inside[-3:])}?" if inside else ""
    return RunError(f"{name} is no run directory: it has no settings.yaml{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: RunError if the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; is {path.parent} a finished run?") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} does not hold a JSON object")
    return value


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename: the file is there whole or not at all.

    Raises: ResourceError if the disk is full, or does not take it for another reason.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ResourceError(why_unwritten(path, error)) from error


def why_unwritten(path: Path, error: Exception) -> str:
    """What a person has to know of an error met in writing a file."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"no space left on the disk of {path.parent}; free some and start the same command again"
    return f"{path} cannot be written: {error}"


def disk_note(path: Path, weights: int, keep: int) -> str | None:
    """A line for the person if the disk will not hold a run's checkpoints.

    Args:
        path: the run directory.
        weights: how many numbers the backbone and the head have.
        keep: checkpoints that stay; one more is there while it is written.
    """
    needed = STATES_BYTES * weights * (keep + 1)
    free = shutil.disk_usage(path).free
    if free >= needed:
        return None
    return (
        f"the disk of {path} has {free / 1e6:,.0f} MB free, and {keep} checkpoints with one being written "
        f"take about {needed / 1e6:,.0f} MB: free some, write elsewhere (--run) or lower checkpoint.keep"
    )


def sync_folder(path: Path) -> None:
    """The folder's entries to the disk: without it a name can be lost whose content was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """An indented JSON object, written atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def given_settings(run: Run, given: Settings, contents: Mapping[str, str]) -> Settings:
    """The settings a run goes on with: the saved ones where it was started before, else the given.

    A file may have another path than before, if its content is the same.

    Args:
        run: the run directory.
        given: what the person asks for.
        contents: by data.train and data.test, the content hash of the given file.
    Raises: RunError naming every key, with both values, that differs and may not.
    """
    path = run.path / "settings.yaml"
    if not path.exists() or not run.has_begun:
        return given  # nothing was trained yet: a start that failed may be corrected
    saved = read_settings(path)
    known = known_inputs(run, saved)
    listed = []
    for key, before, now in differences(saved, given):
        content = contents.get(key) or (content_of_weights(given.init) if key == "init" else None)
        if content is None or content != known.get(key):
            what = f" ({content[:19]} in place of {known[key][:19]})" if content and key in known else ""
            listed.append(f"{key} was {before!r}, now {now!r}{what}")
    if listed:
        raise RunError(
            f"{run.path} was started with other settings: {'; '.join(listed)}. Give the run's own values to "
            f"go on, or start a new run (another --run, with --init {run.path} to begin from its weights)."
        )
    # These may differ: they change no number.
    kept = {name: getattr(given, name) for name in ("checkpoint", "eval", "log", "data", "init")}
    changed = {name: getattr(given.data, name) for name in ("train", "test", "workers")}
    if given.data.workers == "auto":
        del changed["workers"]
    kept["data"] = saved.data.model_copy(update=changed)
    if given.batch.micro_images != "auto":
        kept["batch"] = saved.batch.model_copy(update={"micro_images": given.batch.micro_images})
    elif saved.batch.micro_images != "auto" and saved.batch.global_images % (
        saved.batch.micro_images * dist.world_size()
    ):
        # Another number of ranks: the saved one does not divide.
        kept["batch"] = saved.batch.model_copy(update={"micro_images": "auto"})
    return saved.model_copy(update=kept)


def save_inputs(run: Run, settings: Settings, contents: Mapping[str, str]) -> None:
    """RUN/inputs.json at the first start: the content of each file, whatever its path.

    By it a resume knows a file that moved.

    Args:
        run: the run directory.
        settings: which name the weights to begin from.
        contents: by data.train and data.test, the files' content hashes.
    """
    if run.has_begun:
        return
    of_weights = content_of_weights(settings.init)
    write_json(run.path / "inputs.json", {**contents, **({"init": of_weights} if of_weights else {})})


def save_data_facts(run: Run, manifest: Manifest) -> None:
    """RUN/data.json: how the training images were stored, so that other images can be treated alike."""
    facts = {name: getattr(manifest, name) for name in ("storage", "side_px", "quality", "images")}
    write_json(run.path / "data.json", {**facts, "classes": len(manifest.classes)})


def known_inputs(run: Run, saved: Settings) -> dict[str, str]:
    """What `save_inputs` wrote; of a run from before it did, what its weights' path holds now."""
    path = run.path / "inputs.json"
    if path.exists():
        return {key: str(value) for key, value in read_json(path).items()}
    of_weights = content_of_weights(saved.init)
    return {"init": of_weights} if of_weights else {}


def contents_of(given: Settings) -> dict[str, str]:
    """The hash of what is in the files that settings name, by the setting, of those that are there."""
    named = {"data.train": given.data.train_files, "data.test": (given.data.test,) if given.data.test else ()}
    return {
        key: joined_hash([load_manifest(name).content_hash for name in names])
        for key, names in named.items()
        if names and all(manifest_path(Path(name)).exists() for name in names)
    }


def content_of_weights(source: str | None) -> str | None:
    """SHA-256 of the weights of a run directory, a checkpoint or a file; None where none are there."""
    if source is None:
        return None
    path = Path(source)
    # A checkpoint's manifest has the hashes of its files.
    for file in (path / "manifest.json", path / "backbone.safetensors", path):
        if file.is_file():
            digest = hashlib.sha256()
            with open(file, "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
            return f"sha256:{digest.hexdigest()}"
    return None


def save_settings(run: Run, settings: Settings) -> None:
    """RUN/settings.yaml, without a word of machine or time."""
    write_atomic(run.path / "settings.yaml", dump_settings(settings).encode())


def save_environment(run: Run, facts: dict[str, Any]) -> None:
    """RUN/environment.json: what bit-identity is promised for, and what the caller adds.

    Args:
        run: whose directory it is.
        facts: of the caller, as ranks, precision, stage.
    """
    packages = ("vitds", "torch", "torchvision", "timm", "deepspeed", "ffcv", "numpy", "numba")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    machine = {"python": sys.version.split()[0], "processor": platform.machine(), "cores": os.cpu_count()}
    machine["torch_threads"] = torch.get_num_threads()
    machine["vector_width"] = torch.backends.cpu.get_cpu_capability()
    machine["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    values = {"versions": versions, "commit": _commit(), "machine": machine, **facts}
    write_json(run.path / "environment.json", values)


def _commit() -> str | None:
    """The commit of the checkout that vitds runs from; None elsewhere.

    It ends in -dirty where files were changed.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    # Without the lock of git's index, which a checkout that cannot be written to has no place for.
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that git refuses as another user's
        return None
    return done.stdout.strip()
