"""What the exports share: the folder, the numbers of the view, and the proof that nothing changed."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vitds.augment.images import normalise
from vitds.data.draws import centre_views
from vitds.errors import ResourceError, ShapeError, UsageError
from vitds.use.model import Model

TRIED_IMAGES = 4


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """A folder that stands at `out` once all of it is written; where that fails, nothing stays.

    Raises: UsageError if something is there already; ResourceError if no folder can be made there.
    """
    path = Path(out).expanduser().absolute()  # `.` has no name to write beside
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"`out={out}`: is there already and not empty; name a new folder")
    part = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ResourceError(f"`out={out}`: no folder can be made there ({error.strerror})") from error
    try:
        yield part
        for file in part.iterdir():  # some libraries write for the owner alone, whatever the umask says
            file.chmod(part.stat().st_mode & 0o666)
        if path.exists():
            path.rmdir()
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def short_side(crop_px: int) -> int:
    """The short side in pixels that evaluation scales a picture to, before it takes the central window."""
    return int(centre_views(crop_px, [crop_px], [crop_px])["resized_height"][0, 0])


def crop_share(crop_px: int) -> float:
    """The share of the short side that the central window takes, such that timm scales to the very pixel."""
    short = short_side(crop_px)
    exact = crop_px / short
    return exact if math.floor(crop_px / exact) == short else crop_px / (short + 0.5)


def trial_crops(model: Model) -> Float[Tensor, "B 3 S S"]:
    """A few normalised crops of noise, on the CPU, with which an export is compared."""
    side = model.settings.views.crop_px
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (TRIED_IMAGES, 3, side, side), generator=generator, dtype=torch.uint8)
    return normalise(pixels, model.settings.views)


def difference(
    model: Model, features: Tensor, logits: Tensor | None, crops: Float[Tensor, "B 3 S S"]
) -> float:
    """The largest difference of exported features and logits from the run's, over the largest of the run's.

    Args:
        model: on the CPU.
        features: of the export.
        logits: likewise; None where it gives none.
        crops: that both saw.
    Raises: ShapeError if the shapes differ.
    """
    with torch.inference_mode():
        own = model.backbone(crops)
        pairs = [(own, features)]
        if logits is not None:
            pairs.append((model.head(own), logits))
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ShapeError(f"the export gives {list(theirs.shape)}, the run {list(ours.shape)}")
    return max(float((ours - theirs).abs().max() / ours.abs().max()) for ours, theirs in pairs)


def sameness(found: float) -> str:
    """What to say of a difference."""
    return f"by at most {found:.0e} of the largest number" if found else "in nothing"


def require_same(found: float, allowed: float, what: str, instead: str) -> None:
    """Raises: ShapeError if an export's numbers are not the run's; says what would work."""
    if not found <= allowed:
        raise ShapeError(
            f"{what} gives other numbers than the run (by {found:.1e} of the largest, allowed are "
            f"{allowed:.0e}), so nothing was written; {instead}"
        )
