"""The command line: every word is checked before anything runs, a mistake is one line with its way out."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

import vitds
from vitds import cli, errors
from vitds.cli import COMMANDS, main
from vitds.config.load import dump_settings, load_settings
from vitds.errors import DataError, SettingsError, UsageError
from vitds.words import call_command, checked_words, help_text

ROOT = Path(__file__).parents[1]


def pack(
    run: str, *, data: str | None = None, epochs: int | None = None, kind: Literal["a", "b"] | None = None
) -> None:
    """Pack a run.

    Longer words.

    Args:
        run: the run
        data: a file whose description is so long that it goes on
            in a second line
        epochs: passes
    """
    CALLS.append((run, data, epochs, kind))


def gather(
    *sources: str, out: str, share: float = 0.5, strict: bool = False, set: tuple[str, ...] = ()
) -> None:
    """Gather sources.

    Args:
        share: share of each
    """
    CALLS.append((sources, out, share, strict, set))


CALLS: list[tuple] = []


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def call(function, *words) -> tuple:
    call_command(function, words, "vitds test")
    return CALLS.pop()


def refusal(function, *words) -> str:
    with pytest.raises(UsageError) as caught:
        call_command(function, words, "vitds test")
    assert CALLS == []
    return str(caught.value)


@pytest.fixture
def printed(capsys):
    """Run a command: (exit status, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        status = main(words)
        return status, *capsys.readouterr()

    return run


# words


def test_words_and_flags_reach_the_function_as_its_types():
    assert call(pack, "runs/a", "--epochs", "3", "--data=x.beton", "--kind", "b") == (
        "runs/a",
        "x.beton",
        3,
        "b",
    )
    assert call(gather, "--strict", "a", "--share=0.25", "b", "--out", "c") == (
        ("a", "b"),
        "c",
        0.25,
        True,
        (),
    )


def test_what_was_not_given_keeps_its_default():
    assert call(pack, "runs/a") == ("runs/a", None, None, None)


@pytest.mark.parametrize(
    "text", ["1e5", "007", "True", "None", "[1]", "{a: 1}", "'x'", "a,b", "1.50", "ümlaut", "a b"]
)
def test_text_is_never_read_as_a_number_or_a_list(text):
    assert call(pack, text, "--data", text)[:2] == (text, text)
    assert call(gather, text, text, "--out", text)[:2] == ((text, text), text)


def test_repeated_set_keeps_every_value_in_order():
    words = ["--set", "a.b=1", "s", "--set=c=[1, 2]", "--set", 'd="x"', "--out=o"]
    assert call(gather, *words)[4] == ("a.b=1", "c=[1, 2]", 'd="x"')


def test_switch_does_not_swallow_the_next_word():
    assert call(gather, "--out=o", "--strict", "a")[0] == ("a",)
    assert call(gather, "a", "--out=o", "--strict=false")[3] is False


def test_hyphens_serve_for_underscores_and_a_minus_for_a_number():
    assert checked_words(cli.data_build, ["x", "--out=o", "--test-fraction=0.2"], "") == [
        "x",
        "--out=o",
        "--test_fraction=0.2",
    ]
    assert call(pack, "r", "--epochs", "-1")[2] == -1


@pytest.mark.parametrize(
    "words, message",
    [
        (["r", "--epochz", "3"], "unknown flag --epochz; did you mean --epochs?"),
        (["r", "--zzzz=3"], "unknown flag --zzzz; one of: --data, --epochs, --kind"),
        (["r", "-e", "3"], "unknown flag -e; one of:"),
        (["r", "-"], "unknown flag -; one of:"),
        (["r", "--"], "unknown flag --; one of:"),
        (["r", "--epochs", "x"], "--epochs x: must be a whole number"),
        (["r", "--epochs", "1.5"], "--epochs 1.5: must be a whole number"),
        (["r", "--kind", "c"], "--kind c: must be one of a, b"),
        (["r", "--data"], "--data needs a value; a value that itself starts with -- is written --data=VALUE"),
        (["r", "--data", "--epochs=3"], "--data needs a value"),
        (["r", "--data=x", "--data=y"], "--data is given 2 times, x and y; leave one"),
        (["r", "s"], "unexpected word s; see vitds test --help"),
        (["r", "data=x"], "unexpected word data=x; did you mean --data?"),
        ([], "RUN is missing; see vitds test --help"),
    ],
)
def test_mistake_is_found_before_anything_runs(words, message):
    assert refusal(pack, *words).startswith(message)


def test_mistake_in_sources_switches_and_required_flags():
    assert refusal(gather, "a") == "--out is missing; see vitds test --help"
    assert refusal(gather, "--out=o") == "SOURCE is missing; see vitds test --help"
    assert refusal(gather, "a", "--out=o", "--share=half") == "--share half: must be a number"
    assert refusal(gather, "a", "--out=o", "--strict=maybe") == "--strict maybe: must be true or false"


def test_setting_without_its_flag_is_offered_with_it():
    assert (
        refusal(cli.pretrain, "optimizer.lr_peak=1")
        == "unexpected word optimizer.lr_peak=1; did you mean --set optimizer.lr_peak=1?"
    )


def test_command_without_flags_says_so():
    assert refusal(cli.recipes, "--all") == "unknown flag --all; this command has none"


# commands


@pytest.mark.parametrize(
    "words, message",
    [
        (["pretrian"], "vitds: pretrian: unknown command; did you mean pretrain?"),
        (["data", "biuld"], "vitds: data biuld: unknown command; did you mean build?"),
        (["recipes", "shwo", "x"], "vitds: recipes shwo: unknown command; did you mean show?"),
        (
            ["eval"],
            "vitds: eval needs one of top1, knn, linear, fewshot, retrieval, theory; see vitds eval --help",
        ),
        (["eval", "knn"], "vitds eval knn: RUN is missing; see vitds eval knn --help"),
        (["pretrain", "--epochz", "3"], "vitds pretrain: unknown flag --epochz; did you mean --epochs?"),
        (
            ["recipes", "show", "idmm_digit"],
            "vitds recipes show: recipe idmm_digit is unknown; did you mean idmm_digits?",
        ),
    ],
)
def test_mistake_is_one_line_on_standard_error_and_exit_2(printed, words, message):
    status, out, err = printed(*words)
    assert (status, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1


def failing(error: BaseException):
    def fail() -> None:
        """Fail."""
        raise error

    return fail


@pytest.mark.parametrize(
    "error, status, message",
    [
        (DataError("x.beton is no .beton"), 3, "vitds fail: x.beton is no .beton\n"),
        (KeyboardInterrupt(), 130, "vitds fail: interrupted\n"),
        (
            ZeroDivisionError("x"),
            1,
            "vitds fail: unexpected ZeroDivisionError: x. This is a fault of vitds; --debug shows where\n",
        ),
    ],
)
def test_failing_command_has_one_line_and_its_exit_status(printed, monkeypatch, error, status, message):
    monkeypatch.setitem(COMMANDS, "fail", failing(error))
    assert printed("fail") == (status, "", message)


def test_debug_shows_the_traceback(printed, monkeypatch):
    monkeypatch.setitem(COMMANDS, "fail", failing(DataError("x.beton is no .beton")))
    status, _, err = printed("fail", "--debug")
    assert status == 3 and "Traceback" in err and err.endswith("vitds fail: x.beton is no .beton\n")


def test_first_rank_of_a_node_speaks_for_all_about_words_and_settings(printed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setitem(COMMANDS, "fail", failing(DataError("image 7 is damaged")))
    assert printed("pretrain", "--epochz", "3") == (2, "", "")
    assert printed("fail") == (3, "", "vitds fail (rank 1): image 7 is damaged\n")


# help


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_overview_lists_every_command(printed, words):
    status, out, _ = printed(*words)
    assert status == 0
    assert [line.split("  ")[1] for line in out.splitlines() if line.startswith("  ")] == [
        f"vitds {name}" for name in COMMANDS
    ]


def test_help_may_come_first(printed):
    assert printed("--help", "pretrain") == printed("pretrain", "--help")
    assert printed("-h", "data", "build")[1].startswith("usage: vitds data build")


def test_the_docs_have_every_exit_code():
    table = (ROOT / "docs/running.md").read_text().partition("| code | meaning |")[2].partition("\n\n")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert listed == {error.exit_code for error in vars(errors).values() if isinstance(error, type)} | {
        0,
        130,
    }


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["pretrain", "--epochz", "3"], 2),
        (["pretrain", "--set", "epochs=0"], 2),
        (["data", "info", "absent.beton"], 3),
        (["eval", "knn", "absent/run"], 5),
        (["checkpoint", "list", "absent/run"], 5),
        (["chain", "absent.yaml"], 2),
    ],
)
def test_exit_codes_are_those_of_the_docs(printed, words: list[str], status: int):
    assert printed(*words)[0] == status


def test_groups_help_lists_its_commands_only(printed):
    status, out, _ = printed("data", "--help")
    assert status == 0 and "vitds data build" in out and "pretrain" not in out


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_help_explains_every_word_and_flag(printed, name):
    status, out, _ = printed(*name.split(), "--help")
    assert status == 0 and out.startswith(f"usage: vitds {name}")
    assert max(map(len, out.splitlines())) <= 140
    documented = inspect.getdoc(COMMANDS[name])
    for parameter in inspect.signature(COMMANDS[name]).parameters:
        assert f"    {parameter}: " in documented


def test_help_shows_usage_kinds_defaults_and_long_descriptions():
    assert help_text(pack, "vitds pack").splitlines() == [
        "usage: vitds pack RUN [flags]",
        "",
        "Pack a run.",
        "",
        "Longer words.",
        "",
        "words:",
        "  RUN  the run",
        "",
        "flags:",
        "  --data TEXT  a file whose description is so long that it goes on in a second line",
        "  --epochs N   passes",
        "  --kind a|b",
        "  --debug      show the traceback of an error",
        "  --help       show this text",
    ]
    assert "usage: vitds gather SOURCE [SOURCE ...] [flags]" in help_text(gather, "vitds gather")
    assert "--share X        share of each (default 0.5)" in help_text(gather, "vitds gather")


# jobs


def jobs_called() -> list[tuple[str, str, int, list[str]]]:
    """(module, function, positional arguments, keywords) of every job that cli/ calls."""
    calls = []
    files = sorted(Path(cli.__file__).parent.glob("*.py"))
    for function in [node for file in files for node in ast.parse(file.read_text()).body]:
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
            continue
        origin = {
            name.name: node.module
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and node.module != "vitds.cli"
            for name in node.names
        }
        for node in ast.walk(function):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_call and node.func.id in origin and node.func.id != "as_flags":
                calls.append(
                    (
                        origin[node.func.id],
                        node.func.id,
                        len(node.args),
                        [keyword.arg for keyword in node.keywords],
                    )
                )
    return calls


def test_every_command_calls_a_job_that_exists_with_arguments_that_it_takes():
    calls = jobs_called()
    assert len(calls) == len(COMMANDS)
    for module, name, positional, keywords in calls:
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
        found = [node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert found, f"{module} has no function {name}"
        names = [argument.arg for argument in (*found[0].args, *found[0].kwonlyargs)]
        assert found[0].kwarg or set(keywords) <= set(names), (
            f"{module}.{name} takes {names}, cli gives {keywords}"
        )
        assert found[0].vararg or positional <= len(found[0].args)


def test_doctor_ends_with_an_error_where_something_is_broken(printed, monkeypatch):
    from vitds.jobs import doctor

    monkeypatch.setattr(doctor, "CHECKS", {"disk": doctor.check_disk})
    assert printed("doctor")[0] == 0
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    status, out, err = printed("doctor", "--json")
    assert (status, json.loads(out)["broken"]) == (6, 1)
    assert err == "vitds doctor: 1 broken, see above; each has its fix beside it\n"


def test_recipes_lists_each_with_one_line(printed):
    status, out, _ = printed("recipes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == sorted(
        path.stem for path in (ROOT / "vitds/recipes").glob("*.yaml")
    )
    assert max(map(len, out.splitlines())) <= 100


def test_shown_recipe_is_a_recipe_with_the_same_settings(printed, tmp_path):
    status, out, _ = printed("recipes", "show", "idmm_deit_tiny")
    (tmp_path / "mine.yaml").write_text(out)
    assert status == 0 and out == dump_settings(
        load_settings(recipe=str(tmp_path / "mine.yaml"), command="pretrain", flags={})
    )


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_launch_script_is_the_command_without_the_launchers_rank(name):
    script = [sys.executable, ROOT / "launch" / f"{name}.py", "--local_rank=0", "--epochz", "3"]
    done = subprocess.run(script, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"vitds {name}: unknown flag --epochz; did you mean --epochs?\n"


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "vitds", "pretrian"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "did you mean pretrain?" in done.stderr


# Python


def test_functions_of_the_package_are_the_jobs():
    import vitds.evaluate.knn  # packages of the functions' names
    import vitds.report.page  # noqa: F401
    from vitds.jobs import evaluate, report, train

    assert vitds.pretrain is train.pretrain
    assert vitds.finetune is train.finetune
    assert vitds.evaluate is evaluate.evaluate
    assert vitds.report is report.report


def test_python_is_spoken_to_of_arguments_and_the_command_line_of_flags(printed):
    with pytest.raises(SettingsError) as caught:
        vitds.pretrain(epochs=0, views={"flip": 2}, set=["seed=-1"])
    said = str(caught.value)
    for source in ("(from argument epochs)", "(from argument views)", "(from argument set seed=-1)"):
        assert source in said
    assert "(from --epochs)" in printed("pretrain", "--epochs", "0")[2]


def test_package_has_a_version_and_no_other_names():
    assert dir(vitds) == ["__version__", "evaluate", "finetune", "fit", "open_model", "pretrain", "report"]
    assert vitds.__version__ == "0.1.0" or vitds.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="module 'vitds' has no attribute 'train'"):
        vitds.train  # noqa: B018


def test_wrong_setting_from_the_command_line_stops_before_ranks_and_folders(printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = printed("pretrain", "--set", "epochs=0", "--set", "views.flip=2")
    assert (status, out) == (2, "") and list(tmp_path.iterdir()) == []
    assert err.splitlines()[0] == "vitds pretrain: 2 settings are wrong:"
