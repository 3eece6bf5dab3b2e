"""`vitds bench loader`: the input pipeline beside what it replaces, on the same images, in one process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.nn.functional import interpolate

from vitds.augment.images import to_images
from vitds.bench.images import bench_images
from vitds.bench.reference import ReferenceSet
from vitds.bench.report import print_rows
from vitds.config.load import load_settings
from vitds.config.tree import Settings, ViewGroup, Views
from vitds.data.beton import BetonFile
from vitds.data.draws import draw_views
from vitds.data.ffcv_import import PipelineSpec, RandomResizedCropRGBImageDecoder, ffcv, imdecode
from vitds.data.loader import TrainLoader
from vitds.errors import UsageError

IMAGES = 512  # at most so many of the file are used
BATCH_IMAGES = 64
# A row is measured for at least so many passes over the images, and so long; the fastest pass counts.
PASSES = 3
SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One pipeline's speed.

    Attributes:
        name: of the pipeline.
        images_per_s: of all workers together.
        crops_per_s_core: of one of them.
        cpu_ms: processor time an image, all threads and processes.
        peak_mb: resident memory added to this process.
        ratio: of images_per_s to the reference's.
    """

    name: str
    images_per_s: float
    crops_per_s_core: float
    cpu_ms: float
    peak_mb: float
    ratio: float = 1.0


def bench_loader(
    data: str | None = None, recipe: str | None = None, workers: int = 1, as_json: bool = False
) -> list[Row]:
    """Measure the pipelines, the reference first, and print a table or one JSON object.

    Args:
        data: see bench_images.
        recipe: whose views are made; None: idmm_deit_tiny, for the embedded digits their own.
        workers: threads of our loader and of FFCV's, processes of the reference.
        as_json: the object in place of the table.
    Raises: UsageError if workers < 1. DataError, SettingsError as open_beton and load_settings.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers}: must be 1 or more")
    file = bench_images(data)
    recipe = recipe or ("idmm_digits" if file.manifest.sources == ("digits",) else "idmm_deit_tiny")
    file = first_images(file, min(IMAGES, file.images))
    settings = load_settings(recipe=recipe, command=None, flags={}, extra={"data": {"workers": workers}})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [
            measure(name, passes, file.images, settings) for name, passes in pipelines(file, settings).items()
        ]
    finally:
        torch.set_num_threads(threads)
    rows = [dataclasses.replace(row, ratio=round(row.images_per_s / rows[0].images_per_s, 2)) for row in rows]
    images = f"{file.images} images of {file.path}, {settings.views.count} views each"
    title = f"{images}, recipe {recipe}, workers {workers}"
    print_rows(title, [dataclasses.asdict(row) for row in rows], as_json=as_json)
    return rows


def first_images(file: BetonFile, count: int) -> BetonFile:
    """The file, as if it held its first `count` images only: whole batches of them."""
    count = count if count < BATCH_IMAGES else count // BATCH_IMAGES * BATCH_IMAGES
    tables = ("heights", "widths", "offsets", "sizes", "is_jpeg", "labels")
    return dataclasses.replace(file, images=count, **{name: getattr(file, name)[:count] for name in tables})


def pipelines(file: BetonFile, settings: Settings) -> dict[str, Callable[[], Iterator[None]]]:
    """By name, what makes an endless iterator over passes; a pass makes every view of every image once."""
    views = settings.views
    # Without the groups' own probabilities: these crops have no flip and no colour.
    boxes = tuple(ViewGroup(name=group.name, views=group.views, scale=group.scale) for group in views.groups)
    crops = Views(crop_px=views.crop_px, filter=views.filter, groups=boxes)
    plain = settings.model_copy(update={"views": crops})
    with_ffcv = {
        "ffcv_per_view": lambda: ffcv_per_view(file, settings),
        "torch_kernel": lambda: torch_kernel(file, settings),
    }
    return {
        "reference": lambda: reference(file, settings),
        **(with_ffcv if imdecode is not None else {}),  # a pack for offline machines is without it
        "crops": lambda: ours(file, plain),
        "complete_u8": lambda: ours(file, settings),
        "complete_f32": lambda: ours(file, settings, torch.float32),
        "complete_bf16": lambda: ours(file, settings, torch.bfloat16),
    }


def measure(name: str, make_passes: Callable[[], Iterator[None]], images: int, settings: Settings) -> Row:
    """The fastest of several passes, after one that is not counted (compilation, page faults, caches)."""
    memory_before = _reset_peak_mb()
    passes = make_passes()
    next(passes)
    walls, cpus, started = [], [], time.perf_counter()
    while len(walls) < PASSES or time.perf_counter() - started < SECONDS:
        wall, cpu = time.perf_counter(), _cpu_s()
        next(passes)
        walls.append(time.perf_counter() - wall)
        cpus.append(_cpu_s() - cpu)
    passes.close()
    rate = images / min(walls)
    return Row(
        name=name,
        images_per_s=round(rate, 1),
        crops_per_s_core=round(rate * settings.views.count / settings.data.workers, 1),
        cpu_ms=round(1000 * min(cpus) / images, 4),
        peak_mb=round(_peak_mb() - memory_before, 1),
    )


def reference(file: BetonFile, settings: Settings) -> Iterator[None]:
    """torchvision and PIL, complete, in `workers` processes of torch's DataLoader (one: in this process)."""
    workers = settings.data.workers
    loader = torch.utils.data.DataLoader(
        ReferenceSet(file, settings.views),
        BATCH_IMAGES,
        num_workers=workers if workers > 1 else 0,
        persistent_workers=workers > 1,
    )
    while True:
        for _ in loader:
            pass
        yield


def ffcv_per_view(file: BetonFile, settings: Settings) -> Iterator[None]:
    """FFCV as it comes: a pipeline a view, crops only, each of which decodes the image again."""
    size = (settings.views.crop_px,) * 2
    scales = [group.scale for group in settings.views.groups for _ in range(group.views)]
    outputs = {
        f"view{number}": PipelineSpec("image", decoder=RandomResizedCropRGBImageDecoder(size, scale=scale))
        for number, scale in enumerate(scales)
    }
    loader = ffcv.Loader(
        str(file.path),
        batch_size=min(BATCH_IMAGES, file.images),
        num_workers=settings.data.workers,
        indices=np.arange(file.images),
        drop_last=False,
        pipelines={**outputs, "image": None, "index": None, "label": None},
    )
    while True:
        for _ in loader:
            pass
        yield


def torch_kernel(file: BetonFile, settings: Settings) -> Iterator[None]:
    """FFCV's decoder once an image, then torch's own uint8 antialiased kernel: crops only."""
    views = settings.views
    mapped = np.memmap(file.path, np.uint8, "c")  # copied on writing: torch warns of memory that is read-only
    out = torch.empty(BATCH_IMAGES, views.count, 3, views.crop_px, views.crop_px, dtype=torch.uint8)

    def cut(image: int, epoch: int) -> None:
        """All crops of one image of a batch, into their place."""
        height, width = int(file.heights[image]), int(file.widths[image])
        pixels = mapped[file.offsets[image] : file.offsets[image] + file.sizes[image]]
        if file.is_jpeg[image]:
            stored, pixels = pixels, np.empty(3 * height * width, np.uint8)
            imdecode(stored, pixels, height, width, height, width)
        picture = torch.from_numpy(pixels.reshape(height, width, 3)).permute(2, 0, 1)[None]
        specs = draw_views(
            views, [height], [width], seed=settings.seed, epoch=epoch, images=np.array([image])
        )
        boxes = specs[0][["top", "left", "height", "width"]].tolist()
        for view, (top, left, box_height, box_width) in enumerate(boxes):
            box = picture[:, :, top : top + box_height, left : left + box_width]
            resized = interpolate(box, out.shape[-2:], mode=views.filter, antialias=True)
            out[image % BATCH_IMAGES, view] = resized[0]

    with ThreadPoolExecutor(settings.data.workers) as pool:
        epoch = 0
        while True:
            list(pool.map(cut, range(file.images), [epoch] * file.images))
            epoch += 1
            yield


def ours(file: BetonFile, settings: Settings, dtype: torch.dtype | None = None) -> Iterator[None]:
    """TrainLoader. With a dtype also the normalisation, which in training is the training device's work."""
    batch_images = min(BATCH_IMAGES, file.images)
    batch = settings.batch.model_copy(update={"global_images": batch_images, "chunk_images": batch_images})
    settings = settings.model_copy(update={"batch": batch})
    loader = TrainLoader(file, settings, rank=0, ranks=1, micro_images=batch_images)
    for number, made in enumerate(loader.batches(0, 2**40), start=1):
        if dtype is not None:
            for crops in made.crops:  # an image at a time: it stays in the processor's cache
                to_images(crops[None], settings.views, None, chunk_images=1, dtype=dtype)
        if number % loader.steps_per_epoch == 0:
            yield


def _cpu_s() -> float:
    of_children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in of_children)


def _status_mb(key: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def _reset_peak_mb() -> float:
    """Resident memory now, in MB; the kernel's high-water mark begins anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def _peak_mb() -> float:
    return _status_mb("VmHWM")
