"""What a person meets before the first run: the set-up script's refusals, and what an installed package
carries.

The script itself is run for its whole length by tests/run.sh; here are the cases that end early, each in a
copy of the few files needed.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SCRIPTS = ("launch/setup_env.sh", "launch/quickstart.sh", "tests/run.sh", ".ci/run")
TOOLS = (
    "awk bash cat date df dirname env find flock grep head mkdir rm sh sha256sum tail touch".split()
)  # and no apt, compiler, Python

SetUp = Callable[..., str]


def requirements() -> dict[str, Requirement]:
    """All of setup.cfg's, by name."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    blocks = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
    return {each.name: each for each in map(Requirement, lines)}


def pins(python: str) -> dict[str, Requirement]:
    """constraints.txt for a Python version, by name."""
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    found = [
        each
        for each in map(Requirement, lines)
        if each.marker is None or each.marker.evaluate({"python_version": python})
    ]
    assert len(found) == len({each.name for each in found}), "two pins for one package"
    return {each.name: each for each in found}


@pytest.fixture
def set_up(tmp_path: Path) -> SetUp:
    """set_up(python=…, **stand_ins): runs the script in a bare system of few tools, returns what it said; it
    must have refused.

    The path has a blank. A stand-in is a shell command under a tool's name, for instance a df that shows a
    full disk.
    """

    def run(python: str | None = sys.executable, **stand_ins: str) -> str:
        project, tools = tmp_path / "a project", tmp_path / "tools"
        (project / "launch").mkdir(parents=True)
        tools.mkdir()
        shutil.copy(ROOT / "launch/setup_env.sh", project / "launch")
        shutil.copy(ROOT / "constraints.txt", project)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (tools / tool).symlink_to(found)
        for tool, command in stand_ins.items():
            (tools / tool).unlink(missing_ok=True)
            (tools / tool).write_text(f"#!/bin/sh\n{command}\n")
            (tools / tool).chmod(0o755)
        environment = {"PATH": str(tools), "CC": "gcc", "CXX": "g++"} | (
            {"VITDS_PYTHON": python} if python else {}
        )
        result = subprocess.run(
            [tools / "bash", project / "launch/setup_env.sh"],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 1, result.stdout + result.stderr
        assert not (project / ".venv" / "fingerprint").exists()
        return result.stderr

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stop_at_the_first_error(script: str) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text()
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_missing_compiler_is_refused_with_the_command_that_installs_it(set_up: SetUp) -> None:
    said = set_up()
    assert (
        "this system lacks gcc g++" in said
        and "conda create -n vitds -c conda-forge python=3.11 compilers opencv libjpeg-turbo" in said
    )


def test_unsupported_python_is_refused_with_its_version(set_up: SetUp, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    assert f"VITDS_PYTHON={old} is Python 3.9; vitds runs on 3.10 to 3.13." in set_up(str(old))


def test_python_that_does_not_run_is_refused(set_up: SetUp) -> None:
    assert "VITDS_PYTHON=nonsense is Python ? (it does not run)" in set_up("nonsense")


def test_system_without_python_is_told_what_to_install(set_up: SetUp) -> None:
    assert "this system lacks python3 python3-venv" in set_up(None, gcc="", **{"g++": ""})


def test_little_disk_is_refused_before_anything_is_made(set_up: SetUp) -> None:
    disk = "echo Filesystem; echo /dev/disk 90000000 0 5242880 95% /"
    assert "has 5 GB of free disk; the environment needs 10 GB" in set_up(gcc="", df=disk, **{"g++": ""})


def test_system_without_apt_and_opencv_is_told_the_conda_packages(set_up: SetUp) -> None:
    if any(Path(prefix, "include/turbojpeg.h").exists() for prefix in ("/usr", "/usr/local")):
        pytest.skip("this system has libjpeg-turbo's headers, which the script would take")
    said = set_up(gcc="", df="echo Filesystem; echo /dev/disk 1 0 99999999 1% /", **{"g++": ""})
    assert "no apt here" in said and "conda install -c conda-forge opencv libjpeg-turbo compilers" in said


@pytest.fixture
def finished(tmp_path: Path) -> Callable[[], bool]:
    """A project whose set-up has just ended, as the script sees it; says whether it still is up to date."""
    project = tmp_path / "a project"
    (project / "launch").mkdir(parents=True)
    script = (ROOT / "launch/setup_env.sh").read_text()
    (project / "launch/setup_env.sh").write_text(script.removesuffix('main "$@"\n') + '"$@"\n')
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for name in (
        *("setup.cfg", "setup.py", "pyproject.toml", "constraints.txt", ".venv/native/lib/libturbojpeg.so.0"),
        *(
            "vitds/kernels/pixels.c",
            "vitds/kernels/softmax.c",
            "vitds/kernels/mix.c",
            "vitds/kernels/_pixels.x.so",
            "vitds/kernels/_softmax.x.so",
            "vitds/kernels/_mix.x.so",
        ),
        f".venv/lib/{version}/site-packages/ffcv/_libffcv.x.so",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (project / ".venv/bin").mkdir()
    (project / ".venv/bin/python").symlink_to(sys.executable)

    def call(function: str) -> subprocess.CompletedProcess:
        words = ["bash", str(project / "launch/setup_env.sh"), function]
        return subprocess.run(words, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})

    (project / ".venv/fingerprint").write_text(call("fingerprint").stdout)
    return lambda: call("is_up_to_date").returncode == 0


@pytest.mark.parametrize(
    "built",
    [
        "vitds/kernels/_pixels.x.so",
        "vitds/kernels/_softmax.x.so",
        "vitds/kernels/_mix.x.so",
        ".venv/**/_libffcv.x.so",
        ".venv/native/lib/*.so.0",
    ],
)
def test_an_environment_without_a_part_that_was_built_is_not_up_to_date(
    finished: Callable[[], bool], tmp_path: Path, built: str
) -> None:
    assert finished()
    [file] = (tmp_path / "a project").glob(built)
    content = file.read_text()
    file.write_text(content[:-1])
    assert not finished()
    file.unlink()
    assert not finished()
    file.write_text(content)
    assert finished()


def test_a_word_for_the_set_up_is_refused() -> None:
    words = ["bash", str(ROOT / "launch/setup_env.sh"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("set-up: unexpected word --help.")


def test_unchanged_environment_is_left_alone() -> None:
    stamp = ROOT / ".venv" / "fingerprint"
    if not stamp.exists():
        pytest.skip("this environment was not made by launch/setup_env.sh")
    before = stamp.stat().st_mtime_ns
    said = subprocess.run(
        ["bash", ROOT / "launch/setup_env.sh"], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    assert said == f"environment: {ROOT / '.venv'} is up to date\n" and stamp.stat().st_mtime_ns == before


def test_commands_do_not_hold_the_name_of_the_folder() -> None:
    commands = [
        path
        for path in (ROOT / ".venv/bin").glob("*")
        if path.is_file() and not path.is_symlink() and "activate" not in path.name
    ]
    if not (ROOT / ".venv" / "fingerprint").exists():
        pytest.skip("this environment was not made by launch/setup_env.sh")
    assert {"vitds", "deepspeed", "pytest"} <= {path.name for path in commands}
    assert [path.name for path in commands if str(ROOT).encode() in path.read_bytes()[:300]] == []


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_within_its_range(python: str) -> None:
    pinned = pins(python)
    for name, requirement in requirements().items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), (
            f"{requirement} against {pinned[name]}"
        )


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "vitds").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_deepspeed_configurations_are_found_below_the_package() -> None:
    packaged = {path.name for path in (files("vitds") / "ds_configs").iterdir()}
    assert packaged == {path.name for path in (ROOT / "ds_configs").iterdir()} and "zero2.json" in packaged


def test_wheel_carries_recipes_configurations_and_the_compiled_kernels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("vitds", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    if (native := ROOT / ".venv" / "native").exists():
        (source / ".venv").mkdir()
        (source / ".venv" / "native").symlink_to(native)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vitds-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder, pattern in (("recipes", "*.yaml"), ("ds_configs", "*.json"), ("kernels", "*.c")):
        wanted = {f"vitds/{folder}/{path.name}" for path in (ROOT / "vitds" / folder).glob(pattern)}
        assert wanted and wanted <= set(names)
    for kernel in ("_pixels", "_softmax", "_mix"):
        assert [
            name for name in names if name.startswith(f"vitds/kernels/{kernel}") and name.endswith(".so")
        ] != []
    assert not any(name.startswith(("tests", "launch", "ds_configs")) for name in names)


def test_citation_names_the_paper() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Cao", "Yu", "Wu"]
    assert (paper["year"], paper["identifiers"][0]["value"]) == (2022, "arXiv:2201.10728")
