"""`vitds bench augment`: each kernel beside PIL, torchvision v2 and, where it is installed, kornia.

The kernel that makes the network's input stands beside torch's operations. All get the same crops and the
same parameter.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from vitds.augment.images import factors, to_images, write_by_torch
from vitds.augment.mix import draw_mixing
from vitds.bench.images import bench_images
from vitds.bench.report import print_rows
from vitds.config.tree import Mix, ViewGroup, Views
from vitds.data.beton import BetonFile
from vitds.data.draws import draw_views
from vitds.data.images import decode_stored
from vitds.kernels.views import COLOUR_OPS, POLICY_OPS, RAW, VIEW_SPEC, cut_views

try:
    import kornia.enhance as ke
    import kornia.filters as kf
    import kornia.geometry.transform as kg
except ImportError:  # not a dependency: its column is left out
    ke = None

CROPS = 64
CROP_PX = 112
# Each operation is run so often, and so long, at least; the fastest run counts.
REPEATS = 5
SECONDS = 0.3
# What is compared: pixels beyond an edge, and the parameters of the operations.
GREY = (128, 128, 128)
SIGMA = 1.0
SHEAR = 0.15
SHIFT = 0.2
DEGREES = 15.0
_SIZE = (CROP_PX, CROP_PX)
_AFFINE, _BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC
_TAPS = 2 * math.ceil(3 * SIGMA) + 1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One operation four times.

    Attributes:
        spec: fields of VIEW_SPEC.
        pil: of one picture.
        torchvision: of uint8 (B, 3, S, S).
        kornia: of float32 (B, 3, S, S).
    """

    spec: dict[str, Any]
    pil: Callable[[Image.Image], Image.Image]
    torchvision: Callable[[Tensor], Tensor]
    kornia: Callable[[Tensor], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """Milliseconds a crop.

    Attributes:
        name: of the operation.
        ms: ours.
        pil_ms: PIL's, where it has the operation.
        torchvision_ms: torchvision's; of the network's input torch's.
        kornia_ms: kornia's, where it has the operation and is installed.
        ratio: how many times as fast as PIL ours is.
        ratio_torchvision: how many times as fast as torchvision.
    """

    name: str
    ms: float
    pil_ms: float | None
    torchvision_ms: float
    kornia_ms: float | None
    ratio: float | None
    ratio_torchvision: float


def _colour(name: str, value: float) -> dict[str, Any]:
    return {"colour_order": (COLOUR_OPS.index(name), 0, 0, 0), name: value}


def _policy(name: str, value: float = 0.0) -> dict[str, Any]:
    return {"policy_op": (POLICY_OPS.index(name), 0), "policy_value": (value, 0), "cutout_centre": (0.5, 0.5)}


def _affine(
    picture: Image.Image, *matrix: float | int, resample: int = Image.Resampling.NEAREST
) -> Image.Image:
    return picture.transform(_SIZE, _AFFINE, matrix, resample, fillcolor=GREY)


def _move(
    crops: Tensor,
    *,
    shift: tuple[int, int] = (0, 0),
    shear: tuple[float, float] = (0.0, 0.0),
    mode: str = "nearest",
) -> Tensor:
    angles = [math.degrees(math.atan(part)) for part in shear]
    return F.affine(
        crops, 0.0, list(shift), 1.0, angles, F.InterpolationMode(mode), [128.0], center=[0.0, 0.0]
    )


def _cutout(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.paste((125, 122, 113), (46, 46, 66, 66))
    return picture


_PIXELS = round(SHIFT * CROP_PX)
KERNELS = {
    "brightness": Kernel(
        _colour("brightness", 1.4),
        lambda p: ImageEnhance.Brightness(p).enhance(1.4),
        lambda x: F.adjust_brightness(x, 1.4),
        lambda x: ke.adjust_brightness_accumulative(x, 1.4),
    ),
    "contrast": Kernel(
        _colour("contrast", 1.4),
        lambda p: ImageEnhance.Contrast(p).enhance(1.4),
        lambda x: F.adjust_contrast(x, 1.4),
        lambda x: ke.adjust_contrast_with_mean_subtraction(x, 1.4),
    ),
    "saturation": Kernel(
        _colour("saturation", 1.4),
        lambda p: ImageEnhance.Color(p).enhance(1.4),
        lambda x: F.adjust_saturation(x, 1.4),
        lambda x: ke.adjust_saturation_with_gray_subtraction(x, 1.4),
    ),
    "hue": Kernel(
        _colour("hue", 0.1),
        lambda p: F.adjust_hue(p, 0.1),
        lambda x: F.adjust_hue(x, 0.1),
        lambda x: ke.adjust_hue(x, 0.2 * math.pi),
    ),
    "grey": Kernel({"grey": 1}, lambda p: F.rgb_to_grayscale(p, 3), lambda x: F.rgb_to_grayscale(x, 3)),
    "blur": Kernel(
        {"blur_sigma": SIGMA},
        lambda p: p.filter(ImageFilter.GaussianBlur(SIGMA)),
        lambda x: F.gaussian_blur(x, [_TAPS] * 2, [SIGMA] * 2),
        lambda x: kf.gaussian_blur2d(x, (_TAPS, _TAPS), (SIGMA, SIGMA)),
    ),
    "solarise": Kernel({"solarise": 1}, lambda p: ImageOps.solarize(p, 128), lambda x: F.solarize(x, 128)),
    "policy invert": Kernel(_policy("invert"), ImageOps.invert, F.invert, lambda x: ke.invert(x)),
    "policy cutout": Kernel(
        _policy("cutout", 20.0),
        _cutout,
        lambda x: F.erase(x, 46, 46, 20, 20, torch.tensor([125, 122, 113]).view(3, 1, 1).to(x.dtype)),
    ),
    "policy sharpness": Kernel(
        _policy("sharpness", 1.5),
        lambda p: ImageEnhance.Sharpness(p).enhance(1.5),
        lambda x: F.adjust_sharpness(x, 1.5),
        lambda x: ke.sharpness(x, 1.5),
    ),
    "policy autocontrast": Kernel(_policy("autocontrast"), ImageOps.autocontrast, F.autocontrast),
    "policy posterize": Kernel(
        _policy("posterize", 5.0),
        lambda p: ImageOps.posterize(p, 5),
        lambda x: F.posterize(x, 5),
        lambda x: ke.posterize(x, 5),
    ),
    "policy shear_x": Kernel(
        _policy("shear_x", SHEAR),
        lambda p: _affine(p, 1, SHEAR, 0, 0, 1, 0, resample=_BICUBIC),
        lambda x: _move(x, shear=(SHEAR, 0.0), mode="bilinear"),
    ),
    "policy shear_y": Kernel(
        _policy("shear_y", SHEAR),
        lambda p: _affine(p, 1, 0, 0, SHEAR, 1, 0, resample=_BICUBIC),
        lambda x: _move(x, shear=(0.0, SHEAR), mode="bilinear"),
    ),
    "policy translate_x": Kernel(
        _policy("translate_x", SHIFT),
        lambda p: _affine(p, 1, 0, _PIXELS, 0, 1, 0),
        lambda x: _move(x, shift=(-_PIXELS, 0)),
    ),
    "policy translate_y": Kernel(
        _policy("translate_y", SHIFT),
        lambda p: _affine(p, 1, 0, 0, 0, 1, _PIXELS),
        lambda x: _move(x, shift=(0, -_PIXELS)),
    ),
    "policy rotate": Kernel(
        _policy("rotate", DEGREES),
        lambda p: p.rotate(DEGREES, fillcolor=GREY),
        lambda x: F.rotate(x, DEGREES, fill=[128.0]),
        lambda x: kg.rotate(x, torch.full((len(x),), DEGREES)),
    ),
    "policy equalize": Kernel(_policy("equalize"), ImageOps.equalize, F.equalize, lambda x: ke.equalize(x)),
    "policy contrast": Kernel(
        _policy("contrast", 1.4),
        lambda p: ImageEnhance.Contrast(p).enhance(1.4),
        lambda x: F.adjust_contrast(x, 1.4),
    ),
    "policy colour": Kernel(
        _policy("colour", 1.4),
        lambda p: ImageEnhance.Color(p).enhance(1.4),
        lambda x: F.adjust_saturation(x, 1.4),
    ),
    "policy solarize": Kernel(
        _policy("solarize", 128.0),
        lambda p: ImageOps.solarize(p, 128),
        lambda x: F.solarize(x, 128),
        lambda x: ke.solarize(x, 0.5),
    ),
    "policy brightness": Kernel(
        _policy("brightness", 1.4),
        lambda p: ImageEnhance.Brightness(p).enhance(1.4),
        lambda x: F.adjust_brightness(x, 1.4),
    ),
}


def bench_augment(data: str | None = None, as_json: bool = False) -> list[Row]:
    """Time every kernel on one core and print a table or one JSON object.

    Args:
        data: see bench_images; the first of them give the crops.
        as_json: the object in place of the table.
    Raises: DataError if the file is not sound.
    """
    file = bench_images(data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [*_resampling(file), *_operations(file), *_inputs(file)]
    finally:
        torch.set_num_threads(threads)
    title = f"milliseconds a crop of {CROP_PX} px on one core, the fastest run; ratio: to PIL"
    print_rows(title, [dataclasses.asdict(row) for row in rows], as_json=as_json)
    return rows


def _pictures(file: BetonFile) -> list[NDArray[np.uint8]]:
    """CROPS decoded pictures (H, W, 3), the file's first, over again where it has fewer."""
    mapped = np.memmap(file.path, np.uint8, "r")
    chosen = [number % file.images for number in range(CROPS)]
    raw = [mapped[file.offsets[i] : file.offsets[i] + file.sizes[i]].tobytes() for i in chosen]
    shapes = [(bool(file.is_jpeg[i]), int(file.heights[i]), int(file.widths[i])) for i in chosen]
    return [decode_stored(data, *shape) for data, shape in zip(raw, shapes, strict=True)]


def _resampling(file: BetonFile) -> list[Row]:
    """Random boxes of the pretraining recipe's small scale, resized by each library's antialiased filters."""
    pictures, rows = _pictures(file), []
    sizes = np.array([picture.shape[:2] for picture in pictures], np.int32)
    for name, resample in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", _BICUBIC)):
        views = Views(
            crop_px=CROP_PX, filter=name, flip=0.0, groups=(ViewGroup(name="small", scale=(0.05, 0.4)),)
        )
        specs = draw_views(views, *sizes.T, seed=0, epoch=0, images=np.arange(CROPS))
        boxes = specs[["top", "left", "height", "width"]][:, 0].tolist()
        opened = [Image.fromarray(picture) for picture in pictures]
        planes = [torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in pictures]

        def pil(opened=opened, boxes=boxes, resample=resample):
            """Cut and resized at once."""
            for picture, (top, left, height, width) in zip(opened, boxes, strict=True):
                picture.resize(_SIZE, resample, (left, top, left + width, top + height))

        def torchvision(planes=planes, boxes=boxes, mode=name):
            """Cut, then resized as torchvision does it."""
            for picture, (top, left, height, width) in zip(planes, boxes, strict=True):
                interpolate(
                    picture[:, :, top : top + height, left : left + width], _SIZE, mode=mode, antialias=True
                )

        ours = _milliseconds(lambda specs=specs: cut_views(pictures, [RAW] * CROPS, sizes, specs, CROP_PX))
        rows.append(_row(f"resample {name}", ours, _milliseconds(pil), _milliseconds(torchvision), None))
    return rows


def _operations(file: BetonFile) -> list[Row]:
    """Each operation on the same CROPS crops of CROP_PX; ours without the time of a spec that only copies."""
    crops = [np.asarray(Image.fromarray(picture).resize(_SIZE, _BICUBIC)) for picture in _pictures(file)]
    opened = [Image.fromarray(crop) for crop in crops]
    planes = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    floats = planes.float() / 255
    rows = []
    without = _milliseconds(lambda: _cut(crops, {}))
    for name, kernel in KERNELS.items():
        ours = _milliseconds(lambda kernel=kernel: _cut(crops, kernel.spec)) - without
        pil = _milliseconds(lambda kernel=kernel: [kernel.pil(picture) for picture in opened])
        theirs = _milliseconds(lambda kernel=kernel: kernel.torchvision(planes))
        kornia = None
        if ke is not None and kernel.kornia:
            kornia = _milliseconds(lambda kernel=kernel: kernel.kornia(floats))
        rows.append(_row(name, ours, pil, theirs, kornia))
    return rows


def _inputs(file: BetonFile) -> list[Row]:
    """CROPS crops, one chunk, to the float32 input of a network: our kernel beside torch's operations."""
    crops = [np.asarray(Image.fromarray(picture).resize(_SIZE, _BICUBIC)) for picture in _pictures(file)]
    planes = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()[:, None]
    views, rows = Views(crop_px=CROP_PX), []
    for kind in ("none", "cutmix", "mixup"):
        is_real = np.ones(CROPS, bool)
        mixing = draw_mixing(is_real, 0, 0, 0, views, Mix(kind=kind), chunk_images=CROPS, seed=0)

        def ours(mixing=mixing):
            """In one pass."""
            to_images(planes, views, mixing, chunk_images=CROPS)

        def torchs(mixing=mixing):
            """In several."""
            images = torch.empty(CROPS, *planes.shape[2:])
            write_by_torch(planes, images, *factors(views), mixing, chunk_images=CROPS)

        rows.append(_row(f"input, mixing {kind}", _milliseconds(ours), None, _milliseconds(torchs), None))
    return rows


def _cut(crops: list[NDArray[np.uint8]], fields: dict[str, Any]) -> NDArray[np.uint8]:
    """The crops again, each through a spec that keeps its size and sets `fields`."""
    specs = np.zeros((CROPS, 1), VIEW_SPEC)
    for field in ("height", "width", "resized_height", "resized_width"):
        specs[field] = CROP_PX
    for field, value in {"brightness": 1, "contrast": 1, "saturation": 1, **fields}.items():
        specs[field] = value
    return cut_views(crops, [RAW] * CROPS, [_SIZE] * CROPS, specs, CROP_PX)[0]


def _milliseconds(call: Callable[[], object]) -> float:
    """Of the fastest call, a crop; the first is not counted."""
    call()
    times, started = [], time.perf_counter()
    while len(times) < REPEATS or time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return 1000 * min(times) / CROPS


def _row(name: str, ours: float, pil: float | None, torchvision: float, kornia: float | None) -> Row:
    ours = max(ours, 1e-4)  # below 0.1 microseconds the call's own noise is larger
    times = [None if value is None else round(value, 5) for value in (ours, pil, torchvision, kornia)]
    ratio = None if pil is None else round(pil / ours, 1)
    return Row(name, *times, ratio=ratio, ratio_torchvision=round(torchvision / ours, 1))
