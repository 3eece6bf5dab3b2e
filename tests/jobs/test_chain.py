"""`vitds chain`: stages in order, finished ones skipped, a failed one ends the chain with its status."""

from __future__ import annotations

import signal
import sys
from datetime import datetime
from pathlib import Path

import pytest

from vitds.cli import main
from vitds.config.flags import TrainFlags
from vitds.config.load import load_settings
from vitds.errors import UsageError
from vitds.jobs.chain import Stage, check_stages, check_training, run_stages
from vitds.jobs.quickstart import quickstart
from vitds.runs.directory import Run, save_settings

# A command that finishes its run as a training does, and notes that it ran.
DONE = """
import pathlib, sys
run = pathlib.Path(sys.argv[2])
run.mkdir()
(run / "summary.json").write_text("{}")
with open("ran", "a") as ran:
    ran.write(run.name)
"""


def stages_file(folder: Path, *commands: tuple[str, str]) -> str:
    lines = [f"- {{run: {run}, command: '{command}'}}" for run, command in commands]
    (folder / "stages.yaml").write_text("\n".join(lines) + "\n")
    return str(folder / "stages.yaml")


def python(folder: Path, name: str, code: str) -> str:
    (folder / name).write_text(code)
    return f"{sys.executable} {folder / name}"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_stages_run_in_order_and_a_finished_one_is_skipped(tmp_path: Path, capsys) -> None:
    done = python(tmp_path, "done.py", DONE)
    file = stages_file(tmp_path, ("a", done), ("b", done))
    assert main(["chain", file]) == 0 and (tmp_path / "ran").read_text() == "ab"
    assert main(["chain", file]) == 0 and (tmp_path / "ran").read_text() == "ab"
    assert "stage 2/2: b is finished, skipped" in capsys.readouterr().out


def test_a_finished_training_of_other_words_is_not_taken_for_the_one_that_is_asked_for(
    tmp_path: Path, capsys
) -> None:
    run = Run(tmp_path / "a")
    run.path.mkdir()
    save_settings(run, load_settings(recipe="idmm_digits", command="pretrain", flags={"data": "digits"}))
    (run.path / "summary.json").write_text("{}")
    (run.path / "metrics.jsonl").write_text('{"step": 0}\n')
    words = "vitds pretrain --recipe idmm_digits --data digits"
    assert main(["chain", stages_file(tmp_path, ("a", words))]) == 0
    done = python(tmp_path, "done.py", DONE)
    for more, said in (("--seed 1", "seed was 0, now 1"), ("--epochs 3", "epochs was 64, now 3")):
        assert main(["chain", stages_file(tmp_path, ("b", done), ("a", f"{words} {more}"))]) == 5
        error = capsys.readouterr().err
        assert f"stage 2 (a), before anything ran: a was started with other settings: {said}" in error
    assert not (tmp_path / "b").exists()


def test_a_quickstart_of_another_seed_is_not_printed_as_this_ones(tmp_path: Path) -> None:
    run = Run(tmp_path / "q/pretrain")
    run.path.mkdir(parents=True)
    save_settings(run, load_settings(recipe="idmm_digits", command="pretrain", flags={"data": "digits"}))
    (run.path / "summary.json").write_text("{}")
    with pytest.raises(UsageError, match=r"`seed=1`: q/pretrain was made with seed 0; give that, or another"):
        quickstart(run="q", seed=1)


def test_stages_of_known_work_say_after_each_when_all_will_be_done(tmp_path: Path, capsys) -> None:
    command = tuple(python(tmp_path, "done.py", DONE).split())
    began = datetime.now()
    run_stages([Stage(Path(name), command, work) for name, work in (("a", 1.0), ("b", 1e7), ("c", 0.0))])
    first, *more = [line for line in capsys.readouterr().out.splitlines() if line.startswith("about")]
    minutes, ends = first.removeprefix("about ").split(" minutes for the 2 stages that are left, until ")
    promised = datetime.strptime(ends, "%Y-%m-%d %H:%M") - began
    assert abs(promised.total_seconds() / 60 - int(minutes.replace(",", ""))) < 2
    assert int(minutes.replace(",", "")) > 100 and more[0].startswith("about 0 minutes for the last stage")


def test_a_failed_stage_ends_the_chain_with_its_status(tmp_path: Path, capsys) -> None:
    done, fails = python(tmp_path, "done.py", DONE), python(tmp_path, "fails.py", "raise SystemExit(75)")
    assert main(["chain", stages_file(tmp_path, ("a", done), ("b", fails), ("c", done))]) == 75
    assert "stage 2 (b) ended with status 75; its message stands above\n" in capsys.readouterr().err
    assert (tmp_path / "ran").read_text() == "a"


def test_a_stage_that_leaves_its_run_unfinished_fails(tmp_path: Path, capsys) -> None:
    assert main(["chain", stages_file(tmp_path, ("a", python(tmp_path, "idle.py", "pass")))]) == 1
    assert "stage 1 (a) ended with status 0" in capsys.readouterr().err


SAVES = """
import os, pathlib, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: (pathlib.Path("told").write_text(str(int(number))), sys.exit(75)))
os.kill(os.getppid(), {number})
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),  # a Ctrl-C does not end a stage before it has saved
    ],
)
def test_a_signal_to_the_chain_reaches_the_stage_which_saves(tmp_path: Path, number: int, told: int) -> None:
    before = signal.getsignal(number)
    saves = SAVES.format(number=int(number))
    assert main(["chain", stages_file(tmp_path, ("a", python(tmp_path, "saves.py", saves)))]) == 75
    assert (tmp_path / "told").read_text() == str(int(told))
    assert signal.getsignal(number) == before


def test_a_stage_that_a_signal_ends_has_the_status_that_a_shell_says(tmp_path: Path) -> None:
    ends = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"
    assert main(["chain", stages_file(tmp_path, ("a", python(tmp_path, "ends.py", ends)))]) == 138


def test_a_log_is_named_where_there_is_one(tmp_path: Path, capsys) -> None:
    logs = "import pathlib, sys; pathlib.Path('a').mkdir(); pathlib.Path('a/log.txt').touch(); sys.exit(3)"
    assert main(["chain", stages_file(tmp_path, ("a", python(tmp_path, "logs.py", logs)))]) == 3
    assert "ended with status 3; its message stands above, more in a/log.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("vitds pretrain --epochz 3", 2, "unknown flag --epochz; did you mean --epochs?"),
        ("vitds pretrian", 2, "pretrian: unknown command; did you mean pretrain?"),
        ("vitds eval knn a", 2, "vitds eval knn makes no run directory. A stage is `vitds pretrain` or"),
        ("vitds data info x.beton", 2, "vitds data info makes no run directory"),
        ("vitds pretrain --run b", 2, "--run is given 2 times"),
        ("vitds pretrain --set epochs=0", 2, "epochs: must be greater than or equal to 1"),
        ("vitds pretrain --recipe idmm_digit", 2, "recipe idmm_digit is unknown"),
        ("vitds pretrain --recipe absent.yaml", 2, "recipe absent.yaml: no such file"),
        ("vitds pretrain --ds_config zero9", 2, "ds_config zero9 is unknown"),
        ("vitds finetune --init c", 3, "init c is not there"),
        ("vitds pretrain --data absent.beton", 3, "data.train absent.beton is not there, seen from "),
        ("python3 -m vitds pretrain --epochz 3", 2, "unknown flag --epochz"),
        ("env vitds finetune --recipe idmm_digits", 2, "recipe idmm_digits is for `vitds pretrain`"),
        ("bash launch/pretrain.py --epochz 3", 2, "unknown flag --epochz"),
        ("no-such-program pretrain", 2, "there is no program no-such-program"),
    ],
)
def test_every_stage_is_checked_before_the_first_runs(
    tmp_path: Path, capsys, command: str, status: int, said: str
) -> None:
    done = python(tmp_path, "done.py", DONE)
    assert main(["chain", stages_file(tmp_path, ("a", done), ("b", command))]) == status
    error = capsys.readouterr().err
    assert error.startswith("vitds chain: stage 2 (b)") and said in error
    assert not (tmp_path / "ran").exists()


def test_a_stage_may_begin_from_the_run_of_an_earlier_one(tmp_path: Path) -> None:
    stages = [
        Stage(tmp_path / "a", ("vitds", "pretrain")),
        Stage(tmp_path / "b", ("vitds", "finetune", "--init", "a")),
    ]
    checked = []
    check_stages(stages, lambda words, made: checked.append((words[-1], list(made))))
    assert checked == [(str(tmp_path / "a"), []), (str(tmp_path / "b"), [tmp_path / "a"])]
    for init in ("a", "a/checkpoints/step-00000002"):
        check_training("finetune", TrainFlags(init=init), [Path("a")])


def test_two_stages_of_one_run_are_refused(tmp_path: Path, capsys) -> None:
    done = python(tmp_path, "done.py", DONE)
    assert main(["chain", stages_file(tmp_path, ("a", done), ("b", done), ("a", done))]) == 2
    assert "stages 1 and 3 have one run, a; give two" in capsys.readouterr().err


def test_a_run_below_home_is_written_with_its_sign(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    done = python(tmp_path, "done.py", DONE)
    assert main(["chain", stages_file(tmp_path, ("'~/a'", done))]) == 0
    assert (tmp_path / "home/a/summary.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "absent.yaml: must be a list of stages, each with the keys run and command"),
        (
            "- {run: a, command: ''}",
            "absent.yaml: stage 1 must have just the keys run and command, both text",
        ),
        ("- {run: a, command: 'x \"y'}", "absent.yaml: stage 1: No closing quotation in the command 'x \"y'"),
        (None, "absent.yaml does not exist; chain takes a YAML list of {run: DIRECTORY, command: COMMAND}"),
        ("run: a", "absent.yaml: must be a list of stages, each with the keys run and command"),
        (
            "- {run: a, comand: b}",
            "absent.yaml: stage 1 must have just the keys run and command, both text; got {'run': 'a', "
            "'comand': ",
        ),
    ],
)
def test_a_file_that_lists_no_stages_is_refused(tmp_path: Path, capsys, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "absent.yaml").write_text(text)
    assert main(["chain", "absent.yaml"]) == 2
    assert said in capsys.readouterr().err
