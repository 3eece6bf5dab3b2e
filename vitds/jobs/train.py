"""`vitds pretrain` and `vitds finetune`: the composition root of training. A newcomer starts reading here.

settings, data -> backbone -> method (module, loss) -> engine -> trainer -> weights -> evaluation ->
summary.json
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitds import dist
from vitds.config.deepspeed import DsConfig, load_ds_config
from vitds.config.flags import TrainFlags, as_arguments
from vitds.config.load import backbone_note, settings_of
from vitds.config.methods import Command
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.loader import TrainLoader
from vitds.engine import late
from vitds.engine.attention import use_attention
from vitds.engine.build import build_engine
from vitds.engine.draws import drawing_of
from vitds.engine.head_shard import HeadShard
from vitds.engine.loop import Trainer
from vitds.engine.memory import explains_out_of_memory, module_sizes
from vitds.engine.probes import Probes
from vitds.engine.process import leave_ranks_at_exit, noise_into
from vitds.engine.resolve import padding_note, resolve_settings
from vitds.engine.update import JointUpdate
from vitds.errors import RunError
from vitds.evaluate.files import own_features
from vitds.evaluate.norms import measure_norms
from vitds.jobs.data_files import hold_out, split_groups_note
from vitds.jobs.evaluate import knn_of_run, top1_of_run
from vitds.jobs.report import report_at_end
from vitds.jobs.session import Session, open_session
from vitds.methods import method_class
from vitds.methods.base import Method, SetSize
from vitds.models.build import build_backbone, patch_count
from vitds.models.stochastic import StochasticDraws
from vitds.report.curve import draw_curve
from vitds.runs.backbone import load_backbone, read_class_head, read_weights, save_class_head, save_weights
from vitds.runs.best import best_weights, chosen_epoch
from vitds.runs.checkpoint import CheckpointReader, Saved, newest_sound
from vitds.runs.directory import Run, disk_note, save_environment, save_settings, write_json
from vitds.runs.lock import RunLock
from vitds.runs.metrics import seconds_of
from vitds.schedule import LearningRate
from vitds.use.run import TrainedRun

_CHOSEN_BY_IT = {"last": "nothing is chosen by it", "best": "the epoch that does best on them is kept"}


def train(command: Command, flags: TrainFlags, **sections: Any) -> Run:
    """Train a run to its end, or go on with one that was stopped, and evaluate it.

    Args:
        command: decides which methods a recipe may name.
        flags: of the command line.
        sections: of the settings, as nested mappings.
    Returns: the finished run.
    Raises: VitdsError of the kind that vitds/errors.py lists.
    """
    given = settings_of(command, flags, sections)
    ds = load_ds_config(flags.ds_config)
    with open_session(command, flags, given) as session:
        if session.run.is_finished:
            session.say(f"{session.run.path} is finished; nothing to do")
            return session.run
        file, test_file = session.files
        if note := backbone_note(flags.recipe, command, session.settings):
            session.say(note)
        probe_file = test_file
        if share := session.settings.eval.hold_out:
            file, probe_file = hold_out(file, share, session.settings.seed)
            session.say(
                f"{probe_file.images:,} training images are held out and not trained on: accuracy along "
                f"training is measured on them, and {_CHOSEN_BY_IT[session.settings.eval.choose]}"
            )
            if note := split_groups_note(file):
                session.say(note)
        trainer, method = _trained(session, ds, file, probe_file)
        results = _evaluate(session, method, file, test_file)
        _finish(session, trainer, results)
        draw_curve(session.run)
        if session.settings.log.page:
            report_at_end(session.run, session.files)
        return session.run


def _trained(
    session: Session, ds: DsConfig, file: BetonFile, probe_file: BetonFile | None
) -> tuple[Trainer, Method]:
    """Build, resume, train, and write the trained weights; accuracy along training is of `probe_file`."""
    given = session.settings
    backbone = build_backbone(given.backbone, crop_px=given.views.crop_px, seed=given.seed)
    saved, problems = _found_checkpoint(session.run)
    class_head = _load_init(session, backbone, file) if saved is None else None
    rows = method_class(given.method).rows(SetSize(file.images, len(file.manifest.classes)))
    settings = resolve_settings(given, backbone, ds=ds, device=session.device, rows=rows, images=file.images)
    if dist.is_main():
        save_settings(session.run, settings)
        facts = {"ranks": dist.world_size(), "zero_stage": ds.zero_stage, "device": str(session.device)}
        save_environment(session.run, facts)
    log = session.run.path / "log.txt"
    sizes = module_sizes(backbone, settings)
    with explains_out_of_memory(sizes, settings, ds, rows, session.device):
        with noise_into(log):
            began = time.perf_counter()
            trainer = build_trainer(
                session.run,
                settings,
                ds,
                file,
                backbone,
                rows,
                session.device,
                lock=session.lock,
                probe_file=probe_file,
                class_head=class_head,
                saved=saved,
            )
            build_s = time.perf_counter() - began
        session.peers.when = lambda: f"after {trainer.progress.step} steps"
        for problem in problems:
            session.say(f"passed over a damaged checkpoint: {problem}")
        session.say(_headline(session, trainer, file, ds))
        if saved is None:
            _say_what_is_odd(session, settings, file, sizes.numbers + rows * sizes.width)
        with noise_into(log):
            weights = trainer.train(build_s=build_s, peers=session.peers)
    if settings.eval.choose == "best":
        weights = _weights_of_best_epoch(session, settings)
    method = trainer.method
    if dist.is_main():
        save_weights(session.run.backbone, _as_evaluated(session, settings, file, method.exported(weights)))
        if method.leaves_class_head:
            head = {
                name.removeprefix("head."): value
                for name, value in weights.items()
                if name.startswith("head.")
            }
            save_class_head(session.run.path, head, file.manifest.classes)
    dist.barrier()
    return trainer, method


def _found_checkpoint(run: Run) -> tuple[Saved | None, list[str]]:
    """The newest sound checkpoint, and what was wrong with newer ones; None of a run that has none yet.

    Raises: RunError if there are some and none can be read: to begin anew would remove them.
    """
    saved, problems = newest_sound(run.checkpoints)
    if saved is None and problems:
        raise RunError(
            f"none of the {len(problems)} checkpoints in {run.checkpoints} can be read, so nothing was "
            f"trained and all stay. The newest: {problems[0]}. Mend that, or remove the folder to start anew."
        )
    return saved, problems


def _as_evaluated(
    session: Session, settings: Settings, file: BetonFile, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A backbone's weights, with the statistics of its BatchNorm layers measured anew, if it has any."""
    if not any(name.endswith("running_mean") for name in weights):
        return weights
    backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=settings.seed)
    load_backbone(backbone, weights, "this run")
    measure_norms(settings, backbone.to(session.device), file, session.device)
    return weights | {name: value for name, value in backbone.state_dict().items() if name in weights}


def _weights_of_best_epoch(session: Session, settings: Settings) -> dict[str, Tensor]:
    dist.barrier()  # rank 0 has written the last epoch's, where it was the best
    best = chosen_epoch(session.run)
    session.say(
        f"the weights are those of epoch {best.epoch} of {settings.epochs}, the best on the images held out: "
        f"{best.top1:.1f} % of them right, which flatters, as the epoch was chosen by them"
    )
    return best_weights(session.run)


def _say_what_is_odd(session: Session, settings: Settings, file: BetonFile, weights: int) -> None:
    """What may be meant so, and most often is not: a line each, at the first start."""
    padding = padding_note(file.images, settings.batch.global_images, settings.batch.chunk_images)
    disk = disk_note(session.run.path, weights, settings.checkpoint.keep)
    for note in filter(None, (padding, disk)):
        session.say(note)


def _load_init(session: Session, backbone: nn.Module, file: BetonFile) -> dict[str, Tensor] | None:
    """Load weights to begin from; returns a class head for these very classes, if there is one."""
    source = session.settings.init
    if source is None:
        return None
    session.say(f"weights from {source}: {load_backbone(backbone, read_weights(Path(source)), source)}")
    if not method_class(session.settings.method).leaves_class_head:
        return None
    class_head = read_class_head(Path(source), file.manifest.classes)
    if class_head is not None and ("bias" in class_head) != (wants_bias := session.settings.head.bias):
        session.say(
            f"class head from {source}: left out, as it has {'no bias' if wants_bias else 'a bias'} and "
            f"head.bias is {str(wants_bias).lower()}; the classes are the same"
        )
        return None
    if class_head is not None:
        session.say(f"class head from {source}: the same {len(file.manifest.classes)} classes")
    return class_head


def build_trainer(
    run: Run,
    settings: Settings,
    ds: DsConfig,
    file: BetonFile,
    backbone: nn.Module,
    rows: int,
    device: torch.device,
    *,
    lock: RunLock | None = None,
    probe_file: BetonFile | None = None,
    class_head: dict[str, Tensor] | None = None,
    saved: Saved | None = None,
) -> Trainer:
    """All parts of a training, put together; at the checkpoint `saved` if there is one.

    Args:
        run: the run directory.
        settings: resolved; no `auto` is left.
        ds: the user's DeepSpeed JSON.
        file: the training images.
        backbone: built whole.
        rows: of the method's classifier.
        device: that trains.
        lock: this process's hold on the run.
        probe_file: labelled images whose accuracy is measured along training.
        class_head: weights of a trained class head to begin with.
        saved: the checkpoint to go on from.
    Raises: SettingsError for what does not fit together; RunError if the checkpoint is of other data or
        another model.
    """
    _set_torch(settings)
    facts = {"rows": rows, "content_hash": file.manifest.content_hash}
    if saved is not None:
        _check_same_data(run, saved, file, facts)
    draws, loader = _draws_and_loader(settings, file, backbone, device)
    rate = LearningRate.of(settings, loader.steps_per_epoch)
    method = method_class(settings.method)(settings, backbone, rows)
    method.learn_labels(file.labels)
    if class_head is not None:
        method.module.head.load_state_dict(class_head)
    if saved is None:
        # Before the engine is built, which may spread the weights over the ranks.
        method.start_from(lambda indices: own_features(settings, backbone, file, indices, device), device)
    engine = build_engine(method, settings, ds, loader.accumulation, device)
    heads = [HeadShard(head, settings, device, rate) for head in method.outside]
    is_late = late.may_be_late(settings, method, zero_stage=ds.zero_stage, device=device)
    update = JointUpdate(engine, heads, settings.optimizer, is_late=is_late)
    probes = Probes(settings, file, probe_file, device) if settings.eval.every_epochs else None
    trainer = Trainer(run, settings, method, update, rate, loader, draws, probes, facts, lock)
    if saved is not None:
        trainer.resume(CheckpointReader(saved))
    return trainer


def _set_torch(settings: Settings) -> None:
    """Before anything is computed."""
    torch.use_deterministic_algorithms(settings.engine.deterministic)
    # Scratch memory that is filled with NaN first would cost a pass over it each step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    use_attention(settings.engine.attention)


def _draws_and_loader(
    settings: Settings, file: BetonFile, backbone: nn.Module, device: torch.device
) -> tuple[StochasticDraws, TrainLoader]:
    """The draws of the backbone's layers, and the loader that makes them beside its crops."""
    draws = StochasticDraws(
        backbone,
        seed=settings.seed,
        rows_per_chunk=settings.views.count * settings.batch.chunk_images,
        patches=patch_count(backbone),
    )
    loader = TrainLoader(
        file,
        settings,
        rank=dist.rank(),
        ranks=dist.world_size(),
        micro_images=settings.batch.micro_images,
        drawing=drawing_of(settings, method_class(settings.method), draws),
        device=device,
    )
    return draws, loader


def _check_same_data(run: Run, saved: Saved, file: BetonFile, facts: dict[str, Any]) -> None:
    """Raises: RunError if the training file is not the one that the checkpoint was trained on."""
    before = saved.manifest
    if (before["content_hash"], before["rows"]) != (facts["content_hash"], facts["rows"]):
        raise RunError(
            f"{run.path} was trained on {before['rows']} rows with content {before['content_hash'][:12]}, "
            f"{file.path} has "
            f"{facts['rows']} with {facts['content_hash'][:12]}. Pass --data with the run's own file, or "
            f"start a new run."
        )


def _headline(session: Session, trainer: Trainer, file: BetonFile, ds: DsConfig) -> str:
    settings = trainer.settings
    start = f"resumes after step {trainer.progress.step}" if trainer.progress.step else "starts"
    images = f"{file.images:,} images"
    if file.images < file.manifest.images:
        kind = "" if settings.eval.hold_out else "labelled "
        images = f"the {file.images:,} {kind}of {file.manifest.images:,} images"
    return (
        f"{session.run.path} {start}: {settings.method}, {settings.backbone.name} on {images}, "
        f"{trainer.method.about}, {trainer.total:,} steps of {settings.batch.global_images} images x "
        f"{settings.views.count} views at {settings.views.crop_px} px; {dist.world_size()} rank(s) x "
        f"{trainer.loader.accumulation} micro step(s), ZeRO {ds.zero_stage}, {settings.engine.precision}, "
        f"compile {settings.engine.compile}, attention {settings.engine.attention}, "
        f"{settings.data.workers} loader thread(s), {session.device}"
    )


def _evaluate(
    session: Session, method: Method, file: BetonFile, test_file: BetonFile | None
) -> dict[str, Any]:
    """The result on the test file: accuracy of the class head, or of nearest neighbours."""
    if test_file is None:
        return {}
    if method.leaves_class_head:
        return top1_of_run(session.run, test_file, session.device)
    return {"knn": knn_of_run(session.run, file, test_file, session.device)}


def _finish(session: Session, trainer: Trainer, results: dict[str, Any]) -> None:
    """Write summary.json, whose presence says that the run is finished.

    Its seconds are those of the last start, and of the steps that it went on from, with their own starts.
    """
    seconds = time.perf_counter() - session.started
    settings = trainer.settings
    damaged = sorted({image for part in dist.gather_objects(list(trainer.loader.damaged)) for image in part})
    facts: dict[str, Any] = {
        "method": settings.method,
        "steps": trainer.total,
        "epochs": settings.epochs,
        "skipped": trainer.progress.skipped,
    }
    if settings.eval.choose == "best":
        facts["chosen"] = asdict(chosen_epoch(session.run))
    if damaged:
        facts["damaged_images"] = damaged
        session.say(
            f"{len(damaged)} images could not be decoded and were left out: {damaged[:8]}; log.txt says why"
        )
    saving_s = trainer.clock.total_s
    if dist.is_main():
        earlier = seconds_of(session.run.metrics, trainer.began_at)
        times = {"seconds": round(earlier + seconds, 1), "saving_seconds": round(saving_s, 2)}
        write_json(session.run.path / "summary.json", facts | results | times)
    session.say(f"saving checkpoints took {saving_s:.2f} of {seconds:.1f} s ({saving_s / seconds:.1%})")
    for k, score in results.get("knn", {}).items():
        session.say(f"kNN, k = {k}: {_figures(score)}")
    if "top1" in results:
        session.say(f"test {_figures(results)}")
    dist.barrier()
    leave_ranks_at_exit()


def _figures(score: dict[str, Any]) -> str:
    """An accuracy as the last line says it."""
    low, high = score["top1_interval"]
    return (
        f"top-1 {score['top1']:.1f} % ({low:.1f} to {high:.1f}), top-5 {score['top5']:.1f} %, balanced "
        f"{score['balanced_accuracy']:.1f} %, macro-F1 {score['macro_f1']:.1f} %; always the most frequent "
        f"class: {score['majority']:.1f} %"
    )


# The Python functions
# ---------------------------------------------------------------------------------------------


def _as_function(command: Command, about: str) -> Callable[..., TrainedRun]:
    """`vitds.pretrain(data=..., views={...})`: flags and sections of settings as keywords."""
    names = [field.name for field in fields(TrainFlags)]

    def function(**words: Any) -> TrainedRun:
        flags = {name: words.pop(name) for name in names if name in words}
        flags |= {name: str(value) for name, value in flags.items() if isinstance(value, Path)}
        if isinstance(flags.get("data"), list | tuple):
            flags["data"] = tuple(map(str, flags["data"]))
        given = flags.get("set", ())
        flags["set"] = (given,) if isinstance(given, str) else tuple(given)
        with as_arguments():
            return TrainedRun(train(command, TrainFlags(**flags), **words).path)

    function.__name__ = function.__qualname__ = command
    function.__doc__ = f"{about}\n\n{inspect.cleandoc(TrainFlags.__doc__).partition(chr(10))[2].strip()}"
    own = inspect.signature(TrainFlags).parameters.values()
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    sections = inspect.Parameter("settings", inspect.Parameter.VAR_KEYWORD)
    function.__signature__ = inspect.Signature([*keywords, sections])
    return function


pretrain = _as_function(
    "pretrain", "Pretrain a backbone; `settings` are sections, as nested mappings. Returns the run."
)
finetune = _as_function(
    "finetune", "Train a backbone on labelled images; `settings` as for pretrain. Returns the run."
)
