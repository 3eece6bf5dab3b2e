"""Each line of `vitds doctor` against this machine, and against a machine with the one thing wrong that the
line is for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitds.jobs import doctor as module
from vitds.jobs.doctor import CHECKS, Check, doctor, run_checks

OWN_BIN = Path(sys.executable).parent


def line(name: str) -> Check:
    return CHECKS[name]()


def test_every_line_of_this_installation_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{OWN_BIN}:{os.environ['PATH']}")
    checks = run_checks()
    assert [check.name for check in checks] == list(CHECKS)
    assert [check for check in checks if check.state == "broken"] == []


def test_every_line_that_is_not_ok_names_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = run_checks()
    assert all(check.fix for check in checks if check.state != "ok")
    assert not any(check.fix for check in checks if check.state == "ok")


def test_missing_torch_breaks_its_lines_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # import then fails as for a package that is not there
    states = {check.name: check.state for check in run_checks()}
    assert [name for name in ("CUDA", "native bf16", "threads") if states[name] == "broken"] == [
        "CUDA",
        "native bf16",
        "threads",
    ]
    assert states["FFCV, compiled part"] == states["cores"] == "ok"


def test_version_out_of_range_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fire-0.1.dist-info").mkdir()
    (tmp_path / "fire-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fire\nVersion: 0.1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert line("versions") == Check(
        "versions", "broken", "fire is 0.1, needed is >=0.7", "bash launch/setup_env.sh"
    )


def test_missing_ffcv_names_the_way_without_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    check = line("FFCV, compiled part")
    assert (check.state, check.found) == ("broken", "ffcv is not installed")
    assert 'pip install "vitds[ffcv]"' in check.fix and "libturbojpeg0-dev" in check.fix


@pytest.mark.parametrize(
    ("file", "expected"), [("_libffcv.so", "_libffcv.so: file too short"), ("other.so", "no _libffcv*.so in")]
)
def test_damaged_or_absent_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, expected: str
) -> None:
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "__init__.py").touch()
    (tmp_path / "ffcv" / file).write_bytes(b"\x7fELF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    check = line("FFCV, compiled part")
    assert check.state == "broken" and expected in check.found


def test_driver_without_a_usable_device_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine's CUDA device works")
    monkeypatch.setattr(module, "NVIDIA_DRIVER", tmp_path)
    assert "sees no device" in line("CUDA").found and line("CUDA").state == "broken"


def test_bf16_says_whether_the_hardware_has_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("the expected value below is the processor's")
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert line("native bf16").found.startswith(
        "yes: a product takes" if native else "no: engine.precision auto takes fp32"
    )


def test_launcher_of_this_environment_first_on_path_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{OWN_BIN}:{os.environ['PATH']}")
    assert line("launcher") == Check("launcher", "ok", str(OWN_BIN / "deepspeed"))


def test_launcher_off_path_or_behind_another_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert line("launcher") == Check(
        "launcher", "warning", f"{OWN_BIN}/deepspeed, which is not on PATH", f"source {OWN_BIN}/activate"
    )
    (tmp_path / "deepspeed").touch(mode=0o755)
    assert f"{tmp_path}/deepspeed, which belongs to another environment" in line("launcher").found


def test_missing_launcher_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert line("launcher").found == f"no deepspeed command beside {tmp_path}/python"


def test_more_threads_than_cores_is_a_warning() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads((os.cpu_count() or 1) + 1)
    try:
        check = line("threads")
    finally:
        torch.set_num_threads(threads)
    assert check.state == "warning" and check.fix.startswith("export OMP_NUM_THREADS=")


def test_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (
        ("cpu.max", "50000 100000"),
        ("memory.max", f"{3 << 30}"),
        ("memory.current", f"{1 << 30}"),
    ):
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    assert line("cores").found == f"0.5 of the machine's {os.cpu_count()}"
    assert (line("memory").state, line("memory").found) == ("warning", "2.0 GB free")


@pytest.mark.parametrize(("free_gb", "state"), [(0.5, "broken"), (5, "warning"), (50, "ok")])
def test_little_free_disk_is_said(monkeypatch: pytest.MonkeyPatch, free_gb: float, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free_gb * (1 << 30))))
    assert line("disk").state == state and line("disk").found.startswith(f"{free_gb:.1f} GB free")


def test_table_shows_brackets_and_fixes_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setitem(sys.modules, "ffcv", None)
    assert doctor() == 1
    assert (
        "-> bash launch/setup_env.sh; without a checkout" in (text := capsys.readouterr().out)
        and '"vitds[ffcv]"' in text
    )


def test_json_is_all_of_standard_output_and_deepspeed_is_not_imported() -> None:
    code = (
        "import sys; from vitds.jobs.doctor import doctor; "
        "sys.exit(doctor(as_json=True) + 90 * ('deepspeed' in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    report = json.loads(run.stdout)
    assert run.returncode == report["broken"] == sum(check["state"] == "broken" for check in report["checks"])
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
