"""The work of launch/pack_offline.sh, which has checked the words.

The packed wheels do not depend on the Python that packs: vitds's kernels are called with ctypes, FFCV comes
without its compiled part, and all others are fetched for the machine they are for.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TURBOJPEG = ROOT / ".venv" / "native" / "lib" / "libturbojpeg.so.0"
WITH_TORCH = ("torch", "torchvision")
SOURCE_ONLY = ("deepspeed",)  # published without a wheel, but pure Python
MB = 1e6

# Only FFCV needs it, to write JPEGs and to resize, which vitds leaves to others: 57 MB stay out of the pack.
OPENCV = "opencv-python-headless"
# What replaces FFCV's compiled part, which is linked to OpenCV too.
LIBFFCV = '''"""FFCV's compiled part was left out of this pack of vitds, whose training does not call it."""

read = resize_crop = imdecode = memcpy = ctypes_resize = None
'''

Versions = dict[str, str | None]


def main(out: str, python: str, there: str, max_mb: str, *data: str) -> None:
    python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    names = needed(python, versions_there(Path(there) if there else None, python))
    with tempfile.TemporaryDirectory(prefix="vitds-pack-") as folder:
        pack = Path(folder) / "pack"
        (pack / "wheels").mkdir(parents=True)
        (pack / "python_version").write_text(python + "\n")
        shutil.copy(ROOT / "launch" / "install_offline.sh", pack / "install.sh")
        copy_data(pack / "data", data)
        check_size(pack, int(max_mb))  # data that alone are too much, before anything is fetched
        fetch(names, python, pack / "wheels")
        write_ffcv(pack / "wheels")
        build_vitds(Path(folder) / "source", pack / "wheels")
        check_size(pack, int(max_mb))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(pack, out)
    size = size_of(pack_files(Path(out))) / MB
    print(f"{out}: {size:.1f} MB for Python {python}. There: bash {out}/install.sh")


def fail(text: str) -> None:
    sys.exit(f"pack: {text}")


# What is needed -------------------------------------------------------------------------------------------


def requirements_of(name: str, python: str) -> list[Requirement]:
    """What an installed package requires under another Python; nothing of one that is not installed here."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    facts = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    return [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate(facts)]


def versions_there(listed: Path | None, python: str) -> Versions:
    """The packages of the machine: torch's and torchvision's own, and those listed; None where no version is
    said.
    """
    there: Versions = {}
    coming = [Requirement(name) for name in WITH_TORCH]
    while coming:
        name = canonicalize_name(coming.pop().name)
        if name not in there:
            there[name] = None
            coming += requirements_of(name, python)
    for line in listed.read_text().splitlines() if listed else ():
        if found := re.match(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:==\s*([^\s;]+)|@.*)?\s*(?:[;#].*)?$", line):
            there[canonicalize_name(found[1])] = found[2]
        elif line.strip() and not line.lstrip().startswith(("#", "-")):
            fail(f"--there {listed}: {line.strip()!r} is no line of `pip freeze`")
    return there


def needed(python: str, there: Versions) -> list[str]:
    """NAME==VERSION of each package that the machine lacks, as constraints.txt has it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    facts = {"python_version": python}
    pins = {
        canonicalize_name(pin.name): f"{pin.name}{pin.specifier}"
        for pin in map(Requirement, (line for line in lines if line and not line.startswith("#")))
        if pin.marker is None or pin.marker.evaluate(facts)
    }
    found: set[str] = set()
    coming = requirements_of("vitds", python)
    while coming:
        requirement = coming.pop()
        name = canonicalize_name(requirement.name)
        if name == OPENCV:
            continue
        suits = name in there and (there[name] is None or requirement.specifier.contains(there[name], True))
        if name in WITH_TORCH and not suits:
            fail(f"that machine's {name} is {there[name]}, and vitds needs {requirement.specifier}")
        if not suits and name not in found:
            found.add(name)
            coming += requirements_of(name, python)
    return sorted(pins.get(name, name) for name in found)


# The pieces -----------------------------------------------------------------------------------------------


def copy_data(folder: Path, files: tuple[str, ...]) -> None:
    for file in files:
        folder.mkdir(exist_ok=True)
        for part in (file, f"{file}.json") if file.endswith(".beton") else (file,):
            shutil.copy(part, folder)


def fetch(names: list[str], python: str, wheels: Path) -> None:
    """The wheels of these packages for Linux, this processor and that Python."""
    for name in names:
        if name.partition("==")[0] in SOURCE_ONLY:
            pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), name)
    names = [name for name in names if name.partition("==")[0] not in SOURCE_ONLY]
    machine = platform.machine()
    # The oldest first: what runs with an old C library runs with a new one.
    kinds = [f"manylinux2014_{machine}", *(f"manylinux_2_{minor}_{machine}" for minor in range(5, 36))]
    words = [word for kind in kinds for word in ("--platform", kind)]
    words += ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:", "--no-deps"]
    if names:
        pip("download", *words, "--dest", str(wheels), *names)


def pip(*words: str) -> None:
    """Raises: SystemExit with one line that says what could not be had."""
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    if re.search(r"NameResolution|NewConnection|ProxyError|SSLError|[Tt]imed out", done.stderr):
        fail("no network: the package server could not be reached; the pack brings wheels that are not here")
    if missing := re.search(r"No matching distribution found for (\S+)", done.stderr):
        fail(f"there is no wheel of {missing[1]} for that Python on Linux, {platform.machine()}")
    fail(f"pip could not bring a wheel: {done.stderr.strip().splitlines()[-1]}")


def write_ffcv(wheels: Path) -> None:
    """A wheel of FFCV's Python files as they are installed here, without its compiled part and OpenCV."""
    installed = metadata.distribution("ffcv")
    version = f"{installed.version}+pure"  # `vitds doctor` knows it by this
    name = f"ffcv-{version}"
    facts = ("Metadata-Version: 2.1", "Name: ffcv", f"Version: {version}", "License: Apache-2.0", "")
    files = {
        str(file): file.locate().read_text().replace("import cv2\n", "# changed by vitds's pack: no cv2\n")
        for file in installed.files or ()
        if file.parts[0] == "ffcv" and file.suffix == ".py"
    } | {
        "ffcv/libffcv.py": LIBFFCV,
        f"{name}.dist-info/METADATA": "\n".join(facts),
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}.dist-info/RECORD"
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(record, "".join(f"{path},,\n" for path in (*files, record)))


def build_vitds(source: Path, wheels: Path) -> None:
    """The wheel of vitds, from a copy of the sources with libjpeg-turbo beside the kernels."""
    no_builds = shutil.ignore_patterns("__pycache__", "*.so")
    for part in ("vitds", "ds_configs"):
        shutil.copytree(ROOT / part, source / part, ignore=no_builds, symlinks=True)
    for part in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    lines = (ROOT / "setup.cfg").read_text().splitlines(keepends=True)
    (source / "setup.cfg").write_text("".join(line for line in lines if OPENCV not in line))
    (source / ".venv").symlink_to(ROOT / ".venv")
    shutil.copy(TURBOJPEG, source / "vitds" / "kernels")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source))


# Size -----------------------------------------------------------------------------------------------------


def pack_files(pack: Path) -> list[Path]:
    return [file for file in pack.rglob("*") if file.is_file()]


def size_of(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def check_size(pack: Path, max_mb: int) -> None:
    files = sorted(pack_files(pack), key=lambda file: -file.stat().st_size)
    if size_of(files) > max_mb * MB:
        largest = ", ".join(f"{file.name.split('-')[0]} {file.stat().st_size / MB:.0f}" for file in files[:8])
        fail(
            f"{size_of(files) / MB:.0f} MB, and --max_mb is {max_mb}; the largest pieces in MB: {largest}. "
            "Name what that machine has (--there FILE), pack less data, or allow more"
        )


main(*sys.argv[1:])
