"""launch/pack_offline.sh and the install.sh it packs: a machine that has torch, and no network.

The machine is an environment of its own beside the suite's, in a network namespace without a network where
one may be made. It has all that the suite has but vitds and FFCV, so nothing has to be fetched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.engine.training import SMALL

ROOT = Path(__file__).parents[1]
PACK = ROOT / "launch" / "pack_offline.sh"
NO_NETWORK = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
STEP = """
import json, sys
from vitds.cli import main
from vitds.jobs.doctor import run_checks
print(json.dumps([[check.name, check.state, check.found] for check in run_checks()]))
sys.exit(main(sys.argv[1:]))
"""


def run(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": path, "PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", **variables}
    command = [str(word) for word in words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)


def without_network(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    try:
        may = subprocess.run([*NO_NETWORK[:2], "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        may = False
    return run(*(NO_NETWORK if may else ()), *words, cwd=cwd, **variables)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the machine has in `there.txt`, as pip freeze writes it, and a picture."""
    folder = tmp_path_factory.mktemp("machine")
    versions = {each.name.lower(): each.version for each in metadata.distributions()}
    lines = [f"{name}=={version}" for name, version in versions.items() if name not in ("vitds", "ffcv")]
    (folder / "there.txt").write_text("# all but two\n" + "\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def pack(machine: Path) -> Path:
    (machine / "photos.tar").write_bytes(b"tar" * 100)
    words = ("--out", "pack", "--there", "there.txt", "--with-data", "photos.tar", "--max_mb", "10")
    done = run("bash", PACK, *words, cwd=machine)
    assert done.returncode == 0, done.stdout + done.stderr
    return machine / "pack"


def test_a_pack_has_wheels_for_any_python_and_the_data(pack: Path) -> None:
    ffcv, vitds = sorted(pack.glob("wheels/*"))
    assert "-py3-none-any" in ffcv.name and "-py3-none-linux_" in vitds.name
    assert (pack / "data" / "photos.tar").read_bytes() == b"tar" * 100
    assert "vitds/kernels/libturbojpeg.so.0" in zipfile.ZipFile(vitds).namelist()
    files = {name: zipfile.ZipFile(ffcv).read(name) for name in zipfile.ZipFile(ffcv).namelist()}
    assert not any(name.endswith(".so") or b"\nimport cv2" in text for name, text in files.items())


def test_it_installs_without_a_network_and_trains(
    pack: Path, machine: Path, digit_files: tuple[str, str]
) -> None:
    installed = without_network("bash", pack / "install.sh", "--venv", "env", cwd=machine)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    settings = {**SMALL, "log.tensorboard": "false"}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    words += ["--recipe", "idmm_digits", "--data", digit_files[0], "--epochs", "1", "--run", "run"]
    # The suite's FFCV suits and stays; the packed one is put before it.
    (ffcv,) = pack.glob("wheels/ffcv-*")
    variables = {"PYTHONPATH": str(ffcv), "OMP_NUM_THREADS": "1", "PATH": f"env/bin:{os.environ['PATH']}"}
    python = machine / "env" / "bin" / "python3"
    done = without_network(python, "-c", STEP, "pretrain", *words, cwd=machine, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {name: (state, found) for name, state, found in json.loads(done.stdout.splitlines()[0])}
    # DeepSpeed's command is the suite's own.
    assert [name for name, (state, _) in lines.items() if state == "broken"] == ["launcher"]
    assert lines["FFCV, compiled part"][1].startswith("not in a pack")
    assert all(lines[name][1].startswith(str(machine)) for name in ("vitds kernels", "libjpeg-turbo"))
    assert json.loads((machine / "run" / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say where to: --out FOLDER"),
        (["--out"], "--out needs a value"),
        (["--to", "x"], "unknown word --to; there are --out"),
        (["--out", "new", "--python", "3.9"], "--python 3.9: vitds runs on 3.10"),
        (["--out", "new", "--max_mb", "many"], "--max_mb many must be a whole number"),
        (["--out", "."], "--out . holds something else than a pack"),
        (["--out", "new", "--there", "gone"], "--there gone is no file"),
        (["--out", "new", "--with_data", "gone"], "--with_data gone is no file"),
        (["--out", "new", "--there", "odd.txt"], "--there odd.txt: 'no line' is no line of `pip freeze`"),
        (["--out", "new", "--there", "old.txt"], "that machine's torch is 2.1, and vitds needs >=2.9"),
        (
            ["--out", "new", "--there", "few.txt"],
            "there is no wheel of pyyaml==6.0.3 for that Python on Linux",
        ),
        (
            ["--out", "new", "--there", "there.txt", "--with_data", "large.tar", "--max_mb", "1"],
            "large.tar 2,",
        ),
    ],
)
def test_a_wrong_word_is_one_line(machine: Path, words: list[str], said: str) -> None:
    (machine / "odd.txt").write_text("no line\n")
    (machine / "old.txt").write_text("torch==2.1\n")
    there = (machine / "there.txt").read_text().splitlines()
    few = [line for line in there if not line.startswith("pyyaml")] + ["deepspeed==0.19.8"]
    (machine / "few.txt").write_text("\n".join(few))
    (machine / "large.tar").write_bytes(bytes(2_000_000))
    done = run("bash", PACK, *words, cwd=machine)
    assert done.returncode != 0 and not (machine / "new").exists()
    assert done.stderr.startswith("pack: ") and said in done.stderr and done.stderr.count("\n") == 1


def fake_pack(folder: Path, requires: str, python: str) -> Path:
    (folder / "wheels").mkdir(parents=True)
    (folder / "python_version").write_text(python)
    shutil.copy(ROOT / "launch" / "install_offline.sh", folder / "install.sh")
    with zipfile.ZipFile(folder / "wheels" / "vitds-0.1.0-py3-none-any.whl", "w") as wheel:
        facts = f"Metadata-Version: 2.1\nName: vitds\nVersion: 0.1.0\nRequires-Dist: {requires}\n"
        wheel.writestr("vitds-0.1.0.dist-info/METADATA", facts)
        kind = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("vitds-0.1.0.dist-info/WHEEL", kind)
        wheel.writestr("vitds-0.1.0.dist-info/RECORD", "")
    return folder


def test_what_cannot_be_installed_is_said(tmp_path: Path) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    lacking = fake_pack(tmp_path / "lacking", "no-such-package>=7", here)
    other = fake_pack(tmp_path / "other", "fire", "3.9")
    for words, said in (
        ([lacking / "install.sh", "--venv", "new"], "no-such-package>=7 is neither here nor in the pack"),
        ([other / "install.sh"], f"this pack is for Python 3.9, python3 here is {here}"),
        ([lacking / "install.sh", "--here"], "unexpected word --here"),
        ([lacking / "install.sh", "--venv", "."], "--venv . exists"),
    ):
        done = run("bash", *words, cwd=tmp_path)
        assert done.returncode == 2 and f"install: {said}" in done.stderr.splitlines()[-1]
