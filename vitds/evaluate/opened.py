"""A model by the name that a person gives it: a run, one of its checkpoints, or one of timm's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
from torch import Tensor, nn

from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.errors import DataError, ResourceError, RunError
from vitds.methods import method_class
from vitds.models.build import build_backbone
from vitds.models.create import check_name
from vitds.runs.backbone import load_backbone, read_class_names, read_weights
from vitds.runs.checkpoint import CheckpointReader, Saved
from vitds.runs.directory import Run, content_of_weights, no_run, read_json, write_atomic


@dataclass(frozen=True)
class OpenModel:
    """A backbone with its weights, and what belongs to it.

    Attributes:
        name: as the person gave it.
        settings: of the run; those of a timm model say how its authors evaluate it.
        backbone: on the host.
        source: the run directory or the checkpoint; None of a timm model.
        run: the run directory, also of a checkpoint; None of a timm model.
        weights: their content hash; None of a timm model.
    """

    name: str
    settings: Settings
    backbone: nn.Module
    source: Path | None = None
    run: Run | None = None
    weights: str | None = None

    @property
    def analysis(self) -> Path | None:
        """The folder for what evaluations find: RUN/analysis, of a checkpoint a folder of its own in it."""
        if self.run is None:
            return None
        folder = self.run.path / "analysis"
        return folder if self.source == self.run.path else folder / self.source.absolute().name

    def keep(self, files: dict[str, bytes]) -> list[str]:
        """Write files by name into `analysis`, which is there; returns why it could not be, if so."""
        try:
            self.analysis.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_atomic(self.analysis / name, content)
        except (OSError, ResourceError) as error:
            return [f"what was found is not kept in the run: {error}"]
        return []


def open_model(name: str) -> OpenModel:
    """Read settings and weights.

    Raises: RunError if there is no such run; DataError or ShapeError if its weights cannot be used;
        SettingsError for a name that timm does not know; ResourceError if its weights cannot be fetched.
    """
    path = Path(name)
    run = Run(run_of(path))
    if (run.path / "settings.yaml").exists():
        settings = run.settings
        backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=settings.seed)
        load_backbone(backbone, read_weights(path), name)
        return OpenModel(name, settings, backbone, path, run, content_of_weights(name))
    check_timm_name(name)
    try:
        backbone = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub client has errors of its own for each way in which a download fails
        raise ResourceError(
            f"the published weights of {name} cannot be had: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    published = backbone.pretrained_cfg
    views = {"crop_px": published["input_size"][1], "mean": published["mean"], "std": published["std"]}
    settings = Settings.model_validate({"views": views, "engine": {"precision": "fp32"}})
    return OpenModel(name, settings, backbone)


def run_of(path: Path) -> Path:
    """The run directory of a checkpoint; of all else the path itself."""
    return path.absolute().parent.parent if (path / "manifest.json").exists() else path


def check_timm_name(name: str) -> None:
    """Raises: RunError for the path of something that is no run; SettingsError for a name unknown to timm."""
    if Path(name).exists():
        raise no_run(name)
    if "/" in name:
        raise RunError(
            f"{name} does not exist; name a run directory, one of its checkpoints, or a timm model"
        )
    check_name(name)


def class_head(model: OpenModel) -> tuple[tuple[str, ...] | None, nn.Linear]:
    """Names of the classes, and the layer (C, D) that tells them apart, of a run or a checkpoint's own step.

    The names are None of a run that is not finished: its checkpoints do not hold them.
    Raises: RunError if there is no class head.
    """
    if model.run is None or not method_class(model.settings.method).leaves_class_head:
        raise RunError(
            f"{model.source or 'a plain timm model'} has no class head; top1 is for fine-tuned runs. Take "
            "knn or linear."
        )
    file = model.run.path / "head.safetensors"
    names = read_class_names(file) if file.exists() else None
    if model.source == model.run.path:
        return names, _linear(read_weights(file))
    reader = CheckpointReader(Saved(model.source, read_json(model.source / "manifest.json")))
    own = set(reader.names()) & {"head.weight", "head.bias"}
    return names, _linear({name.removeprefix("head."): reader.get(name) for name in own})


def instance_rows(checkpoint: Path, rows: int, *, has_bias: bool) -> dict[str, Tensor]:
    """`weight` (N, D), and `bias` (N,) where there is one, of the instance head, float32.

    Args:
        checkpoint: a sound one, whichever ranks wrote it.
        rows: N.
    Raises: RunError if the checkpoint does not hold them.
    """
    saved = Saved(checkpoint, read_json(checkpoint / "manifest.json"))
    reader, names = CheckpointReader(saved), ("weight", "bias") if has_bias else ("weight",)
    if saved.manifest.get("head_rows"):
        return {name: reader.rows(name, 0, rows).float() for name in names}
    if "head.weight" not in reader.names():
        raise RunError(f"{checkpoint} does not hold the rows of the instance head; take another checkpoint")
    return {name: reader.get(f"head.{name}").float() for name in names}


def _linear(weights: dict[str, Tensor]) -> nn.Linear:
    linear = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0], bias="bias" in weights)
    linear.load_state_dict(weights)
    return linear.eval()


def check_classes(model: OpenModel, classes: int, names: tuple[str, ...] | None, file: BetonFile) -> None:
    """Raises: DataError if a file's classes are not those of a run's class head.

    Args:
        model: with the head.
        classes: of the head.
        names: of the classes, where they are known.
        file: to be classified.
    """
    theirs = file.manifest.classes
    if names == theirs or (names is None and classes == len(theirs)):
        return
    ours = names or tuple(f"class {number}" for number in range(classes))
    place = next(i for i in range(len(ours) + 1) if ours[: i + 1] != theirs[: i + 1])
    first, second = (repr(names[place]) if place < len(names) else "nothing" for names in (ours, theirs))
    raise DataError(
        f"{file.path}: its {len(theirs)} classes are not the {len(ours)} of {model.source}: class {place} is "
        f"{second} there, {first} in the run. Build it with the classes of the file that the run was "
        "trained on (--classes_from)"
    )
