"""A run, a checkpoint or a timm model opened for use: images of any kind in, classes or features out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vitds.config.tree import Settings
from vitds.data.beton import load_manifest, manifest_path
from vitds.data.images import LeftOut, Storing
from vitds.data.loader import EvalBatch
from vitds.data.workers import work_through
from vitds.errors import RunError
from vitds.evaluate import opened as evaluated
from vitds.evaluate.features import extract_features
from vitds.methods import method_class
from vitds.models.precision import AUTOCAST
from vitds.runs.directory import Run, read_json
from vitds.use.images import Images, NamedImage, find_images, name_of
from vitds.use.view import view_of

UNCHANGED = Storing("raw", None, 90)  # the pixels as they are


@dataclass(frozen=True)
class Answer:
    """What a model says of one image.

    Attributes:
        file: the image's name.
        row: features (D,) or logits (C,), float32; None where the image cannot be used.
        reason: why it cannot.
    """

    file: str
    row: Float[np.ndarray, " K"] | None
    reason: str = ""


@dataclass(frozen=True)
class Prediction:
    """The classes that an image most likely is of, the likeliest first.

    Attributes:
        file: the image's name.
        classes: their names; () where the image cannot be used.
        probabilities: of each, 0 to 1.
        reason: why the image cannot be used.
    """

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Model:
    """A model with all that its use needs.

    Attributes:
        name: as it was given.
        settings: of the run; of a timm model what its published weights want.
        source: the run directory or the checkpoint; None for a timm model.
        backbone: with its weights, in evaluation mode, on `device`.
        head: the class head, on `device`; None where there is none.
        classes: names in label order; () without class head.
        storing: how images are stored before their view is cut.
        notes: what a person should know about it, a line each.
        device: where it computes.
    """

    name: str
    settings: Settings
    source: Path | None
    backbone: nn.Module
    head: nn.Linear | None
    classes: tuple[str, ...]
    storing: Storing
    notes: tuple[str, ...]
    device: torch.device

    @property
    def run(self) -> Run | None:
        """The run that it is of; None for a timm model."""
        return None if self.source is None else Run(evaluated.run_of(self.source))

    def predict(self, images: Images, top: int = 3, workers: int = 1) -> list[Prediction]:
        """The likeliest classes of each image, in the order given.

        Args:
            images: paths of files, folders, archives and .beton files; pictures of Pillow; (H, W, 3) uint8.
            top: classes of each.
            workers: processes that decode; more than this one need a script's `if __name__ == "__main__":`.
        Raises: RunError without class head; DataError for a path that does not exist, or no picture.
        """
        with tempfile.TemporaryDirectory() as workspace:
            found, _ = find_images(images, Path(workspace))
            return list(self.predictions(found, top=top, workers=workers))

    def embed(self, images: Images, workers: int = 1) -> Float[np.ndarray, "M D"]:
        """Features, a row an image, in the order given; a row of NaN for an image that cannot be read.

        Args:
            images: as for predict.
            workers: likewise.
        Raises: DataError for a path that does not exist, or no picture.
        """
        with tempfile.TemporaryDirectory() as workspace:
            found, _ = find_images(images, Path(workspace))
            rows = [answer.row for answer in self.answers(found, workers=workers)]
        unknown = np.full(self.width, np.nan, np.float32)
        return np.array([unknown if row is None else row for row in rows], np.float32).reshape(-1, self.width)

    @property
    def width(self) -> int:
        """D, of a row of features."""
        side = self.settings.views.crop_px
        with torch.inference_mode():
            return self.backbone(torch.zeros(1, 3, side, side, device=self.device)).shape[1]

    def predictions(
        self,
        images: Sequence[NamedImage],
        *,
        top: int = 3,
        workers: int | None = None,
        show_progress: bool = False,
    ) -> Iterator[Prediction]:
        """As predict, of images that were found; few of them in memory.

        Args:
            workers: processes that decode; as for data.workers.work_through.
            show_progress: a bar on standard error, if that is a terminal.
        """
        self.require_head()
        for answer in self.answers(images, logits=True, workers=workers, show_progress=show_progress):
            yield _prediction(answer, self.classes, top)

    def require_head(self) -> None:
        """Raises: RunError if the model cannot classify (says what can)."""
        if self.head is None:
            raise _no_head(self.name, is_run=self.source is not None)

    def answers(
        self,
        images: Sequence[NamedImage],
        *,
        logits: bool = False,
        workers: int | None = None,
        show_progress: bool = False,
    ) -> Iterator[Answer]:
        """Features of images that were found, or logits of the class head, in order; few of them in memory.

        Raises: NumericsError if the model gives values that are not finite.
        """
        model = nn.Sequential(self.backbone, self.head) if logits else self.backbone
        view = partial(view_of, storing=self.storing, crop_px=self.settings.views.crop_px)
        waiting: list[tuple[NamedImage, UInt8[np.ndarray, "3 S S"] | LeftOut]] = []
        title = "classes" if logits else "features"
        for pair in work_through(view, images, workers=workers, title=title, show_progress=show_progress):
            waiting.append(pair)
            if len(waiting) == self.settings.eval.batch_images:
                yield from self._answered(model, waiting)
                waiting = []
        yield from self._answered(model, waiting)

    def _answered(
        self, model: nn.Module, batch: list[tuple[NamedImage, UInt8[np.ndarray, "3 S S"] | LeftOut]]
    ) -> Iterator[Answer]:
        views = [view for _, view in batch if not isinstance(view, LeftOut)]
        rows = iter(self._rows(model, torch.from_numpy(np.stack(views))).numpy() if views else ())
        for image, view in batch:
            if isinstance(view, LeftOut):
                yield Answer(image.name, None, name_of(view))
            else:
                yield Answer(image.name, next(rows))

    def _rows(self, model: nn.Module, crops: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B K"]:
        order = torch.arange(len(crops))
        views = self.settings.views
        return extract_features(
            model,
            [EvalBatch(crops, order, torch.full_like(order, -1))],
            mean=views.mean,
            std=views.std,
            device=self.device,
            autocast=AUTOCAST.get(self.settings.engine.precision),
        ).rows_MD


def open_model(
    name: str | Path, *, device: torch.device | str | None = None, needs_head: bool = False
) -> Model:
    """Open a run directory, one of its checkpoints, or a timm model with its published weights.

    Args:
        name: which; a timm model by its name.
        device: where it computes; None is a GPU where there is one.
        needs_head: refuse what cannot classify before any weights are read or fetched.
    Raises: RunError, DataError, ShapeError if it cannot be read; SettingsError for an unknown name (with near
        ones); ResourceError if published weights cannot be had.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = Path(name).expanduser()
    if needs_head:
        _check_head(str(name), path)
    opened = evaluated.open_model(str(path))
    settings, head, classes = opened.settings, None, ()
    if opened.run is not None and method_class(settings.method).leaves_class_head:
        names, head = evaluated.class_head(opened)
        head = head.to(device)
        classes = names or _names_in_data(settings, len(head.weight))
    storing, notes = (UNCHANGED, ()) if opened.run is None else _storing_of(opened.run.path, settings)
    backbone = opened.backbone.to(device).eval()
    return Model(str(name), settings, opened.source, backbone, head, classes, storing, notes, device)


def _check_head(name: str, path: Path) -> None:
    """Raises: RunError for what has no class head, before weights are read; else as open_model."""
    run = Run(evaluated.run_of(path))
    is_run = (run.path / "settings.yaml").exists()
    if not is_run:
        evaluated.check_timm_name(str(path))
    if not is_run or not method_class(run.settings.method).leaves_class_head:
        raise _no_head(name, is_run=is_run)


def _no_head(name: str, is_run: bool) -> RunError:
    what, init = (
        ("was trained without labels and", f" --init {name}") if is_run else ("is a plain timm model and", "")
    )
    return RunError(
        f"{name} {what} has no class head, so it cannot name classes. Fine-tune first (vitds finetune{init} "
        "--data LABELLED.beton), or take `vitds embed` for features, `vitds similar` for the nearest images"
    )


def _names_in_data(settings: Settings, count: int) -> tuple[str, ...]:
    """Of a run that is not finished: the classes of its training file, or numbers where that is gone."""
    there = [name for name in settings.data.train_files if manifest_path(Path(name)).exists()]
    names = next((known for name in there if (known := load_manifest(name).classes)), ())
    return names if len(names) == count else tuple(f"class {number}" for number in range(count))


def _storing_of(run: Path, settings: Settings) -> tuple[Storing, tuple[str, ...]]:
    """How the run's training images were stored, and a note where nothing says so any more."""
    if (run / "data.json").exists():
        facts = read_json(run / "data.json")
        try:
            return Storing(facts["storage"], facts["side_px"], facts["quality"]), ()
        except KeyError as error:
            raise RunError(
                f"{run / 'data.json'} lacks {error}; remove it: the training file's manifest says it too"
            ) from None
    for name in settings.data.train_files:  # several store alike
        if not manifest_path(Path(name)).exists():
            continue
        manifest = load_manifest(name)
        return Storing(manifest.storage, manifest.side_px, manifest.quality), ()
    note = (
        f"{run} is from before runs kept how their images were stored, and its training file "
        f"{settings.data.train_text} is not there: images are taken as they are, so numbers can "
        "differ a little from those of its evaluation"
    )
    return UNCHANGED, (note,)


def _prediction(answer: Answer, classes: tuple[str, ...], top: int) -> Prediction:
    if answer.row is None:
        return Prediction(answer.file, (), (), answer.reason)
    chances = torch.from_numpy(answer.row).double().softmax(0)
    best = chances.topk(min(top, len(classes)))
    return Prediction(
        answer.file, tuple(classes[i] for i in best.indices.tolist()), tuple(best.values.tolist())
    )
