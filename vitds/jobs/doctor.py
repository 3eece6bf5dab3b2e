"""`vitds doctor`: what this machine and this installation can do, a line each, with its fix.

Packages are imported inside the checks, by name, so that a missing one is a line of the table and not a
traceback. DeepSpeed is not imported at all: it takes seconds, and its version and launcher are found without.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitds.kernels.library import find_library

SET_UP = "bash launch/setup_env.sh"
SET_UP_NATIVE = (
    f"{SET_UP}; without a checkout: apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++ "
    '(conda: opencv libjpeg-turbo pkg-config compilers), then pip install "vitds[ffcv]"'
)
SHOWN_VERSIONS = ("torch", "torchvision", "timm", "deepspeed", "ffcv", "numba", "numpy")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup")
GB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One line of the table; `fix` is empty where all is well."""

    name: str
    state: Literal["ok", "warning", "broken"]
    found: str
    fix: str = ""


def check_versions() -> Check:
    """Every package that vitds requires, FFCV included, is installed in a version that setup.cfg allows."""
    requirement_of = importlib.import_module("packaging.requirements").Requirement
    versions, wrong = [], []
    for text in importlib.metadata.requires("vitds") or []:
        requirement = requirement_of(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": "ffcv"}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.name in SHOWN_VERSIONS:
            versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, needed is {requirement.specifier}")
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    if wrong:
        return Check("versions", "broken", "; ".join(wrong), SET_UP)
    return Check("versions", "ok", ", ".join([python, *sorted(versions)]))


def check_cuda() -> Check:
    """The CUDA devices, each after a sum computed on it."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        if not NVIDIA_DRIVER.exists():
            return Check("CUDA", "ok", "no NVIDIA driver: training runs on the CPU")
        found = f"an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no device"
        fix = (
            "compare nvidia-smi's CUDA version with torch's: a newer driver, or a torch built for "
            "this one; is CUDA_VISIBLE_DEVICES set?"
        )
        return Check("CUDA", "broken", found, fix)
    devices = []
    for number in range(torch.cuda.device_count()):
        torch.ones(8, device=f"cuda:{number}").sum().item()
        device = torch.cuda.get_device_properties(number)
        devices.append(f"{device.name}, {device.total_memory / GB:.0f} GB")
    return Check("CUDA", "ok", f"CUDA {torch.version.cuda}: " + "; ".join(devices))


def check_bf16() -> Check:
    """Whether bfloat16 is computed by the hardware, by the time of a matrix product against float32."""
    torch = importlib.import_module("torch")
    on_gpu = torch.cuda.is_available()
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if on_gpu
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if not native:
        return Check(
            "native bf16", "ok", f"no: engine.precision auto takes {'fp16' if on_gpu else 'fp32'} here"
        )
    device = "cuda" if on_gpu else "cpu"
    ratio = _product_s(torch, torch.float32, device) / _product_s(torch, torch.bfloat16, device)
    found = f"yes: a product takes 1/{ratio:.1f} of its time in fp32"
    if ratio < 1:
        return Check(
            "native bf16",
            "warning",
            found,
            "engine.precision auto takes fp32 here; measure again when the machine is idle",
        )
    return Check("native bf16", "ok", found)


def _product_s(torch: Any, dtype: Any, device: str) -> float:
    """Seconds of a matrix product, the best of several, so that another process's work does not count."""
    matrix = torch.ones(1024, 1024, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def check_ffcv() -> Check:
    """FFCV's compiled part, loaded with the libraries that it needs."""
    package = importlib.util.find_spec("ffcv")
    if package is None or not package.submodule_search_locations:
        return Check("FFCV, compiled part", "broken", "ffcv is not installed", SET_UP_NATIVE)
    if importlib.metadata.version("ffcv").endswith("+pure"):  # launch/pack_offline.sh
        return Check("FFCV, compiled part", "ok", "not in a pack for offline machines; training needs none")
    return _check_library(
        "FFCV, compiled part", Path(package.submodule_search_locations[0]), "_libffcv", "imdecode"
    )


def check_kernels() -> Check:
    """The kernels of vitds, loaded with what they need: torch's OpenMP, libjpeg-turbo."""
    importlib.import_module("torch")
    folder = Path(__file__).parents[1] / "kernels"
    functions = {"_softmax": "vitds_softmax", "_mix": "vitds_write_images", "_pixels": "vitds_views"}
    checks = [
        _check_library("vitds kernels", folder, library, function) for library, function in functions.items()
    ]
    return next((check for check in checks if check.state == "broken"), checks[-1])


def _check_library(name: str, folder: Path, library: str, function: str) -> Check:
    path = find_library(folder, library)
    if path is None:
        return Check(name, "broken", f"no {library}*.so in {folder}", SET_UP_NATIVE)
    try:
        getattr(ctypes.CDLL(str(path)), function)
    except (OSError, AttributeError) as error:
        return Check(name, "broken", str(error), SET_UP_NATIVE)
    return Check(name, "ok", str(path))


def check_jpeg() -> Check:
    """libjpeg-turbo: the file that the kernels were linked to, after it made a decoder."""
    check_kernels()  # loads it, where it can be loaded
    mapped = [
        line.split(maxsplit=5)[5]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libturbojpeg" in line
    ]
    if not mapped:
        return Check("libjpeg-turbo", "broken", "not loaded, see the kernels' line", SET_UP_NATIVE)
    turbo = ctypes.CDLL(mapped[0])
    turbo.tjInitDecompress.restype = ctypes.c_void_p
    decoder = turbo.tjInitDecompress()
    if not decoder:
        return Check("libjpeg-turbo", "broken", f"{mapped[0]} makes no decoder", SET_UP_NATIVE)
    turbo.tjDestroy(ctypes.c_void_p(decoder))
    return Check("libjpeg-turbo", "ok", mapped[0])


def check_launcher() -> Check:
    """The `deepspeed` command that a shell would start is this environment's."""
    first, own = shutil.which("deepspeed"), Path(sys.executable).parent / "deepspeed"
    activate = f"source {own.parent}/activate"
    if first and Path(first).resolve() == own.resolve():
        return Check("launcher", "ok", first)
    if not own.exists():
        return Check("launcher", "broken", f"no deepspeed command beside {sys.executable}", SET_UP)
    if first:
        return Check(
            "launcher",
            "warning",
            f"{first}, which belongs to another environment, comes first on PATH",
            activate,
        )
    return Check("launcher", "warning", f"{own}, which is not on PATH", activate)


def check_cores() -> Check:
    """The cores that this process may use: by its affinity and its container's limit."""
    cores = _usable_cores()
    return Check("cores", "ok", f"{cores:g} of the machine's {os.cpu_count()}")


def _usable_cores() -> float:
    allowed = float(len(os.sched_getaffinity(0)))
    limit = CGROUP / "cpu.max"
    quota, period = limit.read_text().split() if limit.exists() else ("max", "100000")
    return allowed if quota == "max" else min(allowed, int(quota) / int(period))


def check_threads() -> Check:
    """torch's threads, which should not be more than the cores."""
    threads, cores = importlib.import_module("torch").get_num_threads(), _usable_cores()
    found = f"{threads} in torch, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"
    if threads > cores:
        return Check(
            "threads",
            "warning",
            f"{found}, for {cores:g} cores",
            f"export OMP_NUM_THREADS={max(1, int(cores))}",
        )
    return Check("threads", "ok", found)


def check_memory() -> Check:
    """The memory that is free, of the machine or of its container, whichever is less."""
    free = importlib.import_module("psutil").virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    found = f"{free / GB:.1f} GB free"
    if free < 3 * GB:
        return Check(
            "memory",
            "warning",
            found,
            "3 GB are needed for small sets; end other programs, or use fewer ranks and data.workers",
        )
    return Check("memory", "ok", found)


def check_disk() -> Check:
    """Free disk in this folder, where runs are written."""
    free = shutil.disk_usage(".").free
    found = f"{free / GB:.1f} GB free in {Path.cwd()}"
    if free < GB:
        return Check("disk", "broken", found, "free some, or write elsewhere: --run FOLDER")
    if free < 10 * GB:
        return Check(
            "disk",
            "warning",
            found,
            "checkpoints of large models need more; free some, or write elsewhere: --run FOLDER",
        )
    return Check("disk", "ok", found)


CHECKS: dict[str, Callable[[], Check]] = {
    "versions": check_versions,
    "CUDA": check_cuda,
    "native bf16": check_bf16,
    "FFCV, compiled part": check_ffcv,
    "vitds kernels": check_kernels,
    "libjpeg-turbo": check_jpeg,
    "launcher": check_launcher,
    "cores": check_cores,
    "threads": check_threads,
    "memory": check_memory,
    "disk": check_disk,
}


def run_checks() -> list[Check]:
    """Every check's line; one that cannot be carried out is a broken line."""
    checks = []
    for name, check in CHECKS.items():
        try:
            checks.append(check())
        except Exception as error:  # whatever is wrong with this machine, the other lines must come
            checks.append(Check(name, "broken", f"{type(error).__name__}: {error}", SET_UP))
    return checks


def doctor(as_json: bool = False) -> int:
    """Print the checks as a table, or as one JSON object with the keys `checks` and `broken`.

    Returns: the number of broken lines.
    """
    checks = run_checks()
    broken = sum(check.state == "broken" for check in checks)
    if as_json:
        print(json.dumps({"checks": [dataclasses.asdict(check) for check in checks], "broken": broken}))
        return broken
    table = Table(box=None, show_header=False)
    colours = {"ok": "green", "warning": "yellow", "broken": "bold red"}
    for check in checks:
        found = Text(
            check.found if check.state == "ok" else f"{check.found}\n-> {check.fix}", overflow="fold"
        )
        table.add_row(check.name, Text(check.state, colours[check.state]), found)
    Console().print(table)
    return broken
