"""What every training command does around the training: ranks, run directory, lock, data, saved settings, summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitds import dist
from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.engine.loop import Trainer, TrainModule
from vitds.engine.memory import backbone_sizes, out_of_memory_told
from vitds.engine.peers import Peers
from vitds.engine.process import leave_ranks_at_exit, noise_into, start_ranks
from vitds.engine.resolve import head_reason, resolve_settings
from vitds.models.build import build_backbone
from vitds.runs.backbone import load_backbone, read_class_head, read_weights, save_class_head, save_weights
from vitds.runs.directory import (
    Run,
    given_settings,
    next_run_path,
    save_environment,
    save_settings,
    write_json,
)
from vitds.runs.lock import RunLock


@dataclass
class Session:
    """One rank's part of a training command."""

    run: Run
    settings: Settings
    device: torch.device
    lock: RunLock | None
    started: float
    peers: Peers

    def say(self, text: str) -> None:
        """A line for the person, once."""
        if dist.is_main():
            print(text, flush=True)


@contextmanager
def open_session(run: str | None, recipe: str, given: Settings) -> Iterator[Session]:
    """Join the ranks, take the run directory, and go on with its saved settings if it was started before.

    Raises: RunLockedError if another process writes to it; RunError if it cannot be written or was started with other settings;
        ResourceError if another rank ends (names it and its cause).
    """
    started = time.perf_counter()
    device = start_ranks()
    path = Path(run) if run else dist.on_main(next_run_path, recipe)
    lock = dist.on_main(RunLock, path)
    try:
        with Peers(path / "log.txt").end_told() as peers:
            yield Session(
                Run(path),
                given_settings(Run(path), given),
                device,
                lock if dist.is_main() else None,
                started,
                peers,
            )
    finally:
        if dist.is_main():
            lock.release()


def train(session: Session, ds: DsConfig, file: BetonFile, test_file: BetonFile | None, rows: int) -> Trainer:
    """Build, resume, train, and write the trained weights.

    Raises: what the engine raises: SettingsError, RunError, ResourceError, NumericsError, Stopped.
    """
    run, settings, device = session.run, session.settings, session.device
    module = TrainModule(
        build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=settings.seed), None
    )
    class_head = None
    if settings.init is not None:
        source = settings.init
        session.say(
            f"weights from {source}: {load_backbone(module.backbone, read_weights(Path(source)), source)}"
        )
        class_head = (
            read_class_head(Path(source), file.manifest.classes) if settings.method == "supervised" else None
        )
        if class_head is not None:
            session.say(f"class head from {source}: the same {len(file.manifest.classes)} classes")
    settings = resolve_settings(
        settings, module.backbone, ds=ds, device=device, rows=rows, images=file.images
    )
    if dist.is_main():
        save_settings(run, settings)
        save_environment(
            run, {"ranks": dist.world_size(), "zero_stage": ds.zero_stage, "device": str(device)}
        )
    session.settings = settings
    with out_of_memory_told(backbone_sizes(module.backbone, settings), settings, ds, rows, device):
        with noise_into(run.path / "log.txt"):
            trainer = Trainer(
                run, settings, ds, file, module, rows, device, session.lock, test_file, class_head
            )
            problems = trainer.resume()
        session.peers.when = lambda: f"after {trainer.done} steps"
        for problem in problems:
            session.say(f"passed over a damaged checkpoint: {problem}")
        session.say(_headline(session, trainer, file, ds, rows))
        with noise_into(run.path / "log.txt"):
            weights = trainer.train()
    if dist.is_main():
        save_weights(run.backbone, _named(weights, "backbone."))
        if settings.method == "supervised":
            save_class_head(run.path, _named(weights, "head."), file.manifest.classes)
    dist.barrier()
    return trainer


def _named(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _headline(session: Session, trainer: Trainer, file: BetonFile, ds: DsConfig, rows: int) -> str:
    settings = trainer.settings
    start = f"resumes after step {trainer.done}" if trainer.done else "starts"
    why = (
        f" instances ({head_reason(settings, rows, trainer.width)})"
        if settings.method == "idmm"
        else " classes"
    )
    kind = f"{settings.head.kind} head of {rows:,}{why}"
    return (
        f"{session.run.path} {start}: {settings.backbone.name} on {file.images:,} images, {kind}, {trainer.total:,} steps of "
        f"{settings.batch.global_images} images x {settings.views.count} views at {settings.views.crop_px} px; "
        f"{dist.world_size()} rank(s) x {trainer.accumulation} micro step(s), ZeRO {ds.zero_stage}, {settings.engine.precision}, "
        f"compile {settings.engine.compile}, {session.device}"
    )


def finish(session: Session, trainer: Trainer, results: dict[str, Any]) -> None:
    """Write summary.json, whose presence says that the run is finished; its times are of the last start."""
    seconds = time.perf_counter() - session.started
    damaged = sorted({image for part in dist.gather_objects(list(trainer.loader.damaged)) for image in part})
    facts = {
        "method": session.settings.method,
        "steps": trainer.total,
        "epochs": session.settings.epochs,
        "skipped": trainer.skipped,
    }
    if damaged:
        facts["damaged_images"] = damaged
        session.say(
            f"{len(damaged)} images could not be decoded and were left out: {damaged[:8]}; log.txt says why"
        )
    if dist.is_main():
        times = {"seconds": round(seconds, 1), "saving_seconds": round(trainer.saving_s, 2)}
        write_json(session.run.path / "summary.json", facts | results | times)
        session.say(
            f"saving checkpoints took {trainer.saving_s:.2f} of {seconds:.1f} s ({trainer.saving_s / seconds:.1%})"
        )
    dist.barrier()
    leave_ranks_at_exit()
