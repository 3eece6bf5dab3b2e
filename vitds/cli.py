"""The command line: a function a command, called by Fire after `words.py` has checked every word.

A command exists by standing in COMMANDS. Its function is the flags (keyword-only), the words (positional) and the help (docstring);
the job behind it is imported when it runs, so that help answers at once and without torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Literal

from vitds.config.names import did_you_mean
from vitds.errors import SettingsError, UsageError, VitdsError
from vitds.words import Command, call_command, help_text, table_text


def doctor(*, json: bool = False) -> None:
    """Check this machine and installation.

    Versions, devices, native bf16, compiled parts, launcher, cores, memory, free disk: each line is ok, a warning, or broken with its fix.

    Args:
        json: print one JSON object and nothing else
    """
    from vitds.jobs.doctor import doctor

    doctor(as_json=json)


def data_build(
    *sources: str,
    out: str,
    storage: Literal["auto", "raw", "jpg"] = "auto",
    side: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    split: str | None = None,
    test_fraction: float | None = None,
    classes_from: str | None = None,
    strict: bool = False,
) -> None:
    """Make a .beton data file from folders of images.

    A source is a folder with a folder a class, a flat folder of images (no labels), a tar of either, or the name `digits`.

    Args:
        sources: folder, tar, or `digits`; several are taken together, classes by name
        out: the file to write, F.beton
        storage: raw pixels (fast, large), JPEG, or auto: raw where the set or its images are small
        side: longer images are scaled down to this short side, in pixels
        quality: of JPEGs that have to be written anew, 1 to 100
        workers: processes; all cores where not given
        split: the folder of this name within each source, as in SOURCE/train
        test_fraction: write F-train.beton and F-test.beton instead, this share of every class for the test
        classes_from: take the class list of this .beton file, so that train and test agree
        strict: stop at the first image that is broken or odd, instead of counting and naming them
    """
    from vitds.jobs.data import build

    build(
        sources,
        out=out,
        storage=storage,
        side_px=side,
        quality=quality,
        workers=workers,
        split=split,
        test_fraction=test_fraction,
        classes_from=classes_from,
        strict=strict,
    )


def data_info(file: str, *, json: bool = False) -> None:
    """Show what a .beton file holds.

    Images, classes, storage, sizes, mean and deviation, content hash, and what was odd about the images when it was built.

    Args:
        file: a .beton file
        json: print one JSON object and nothing else
    """
    from vitds.jobs.data import info

    info(file, as_json=json)


def data_verify(file: str, *, json: bool = False) -> None:
    """Read every image of a .beton file back, for instance after a copy.

    Args:
        file: a .beton file
        json: print one JSON object and nothing else
    """
    from vitds.jobs.data import verify

    verify(file, as_json=json)


def data_preview(file: str, *, recipe: str = "idmm_digits", out: str = "preview.png") -> None:
    """Draw exactly what the network will see.

    A labelled grid: originals, each view, and the mixed crops with their targets' weights.

    Args:
        file: a .beton file
        recipe: a recipe's name or a YAML file
        out: the picture to write
    """
    from vitds.jobs.preview import preview

    preview(file, recipe=recipe, out=out)


def recipes() -> None:
    """List the recipes that come with vitds; `vitds recipes show R` prints one."""
    from vitds.jobs.recipes import print_recipes

    print_recipes()


def recipes_show(recipe: str) -> None:
    """Print a recipe's whole settings tree as YAML.

    Every default is filled in. Saved as a file, it is a recipe of your own: --recipe FILE.yaml.

    Args:
        recipe: a recipe's name or a YAML file
    """
    from vitds.jobs.recipes import show_recipe

    show_recipe(recipe)


def pretrain(
    *,
    recipe: str | None = None,
    data: str | None = None,
    test: str | None = None,
    run: str | None = None,
    init: str | None = None,
    ds_config: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Pretrain a backbone on images without labels.

    Parametric instance discrimination: each image is its own class.

    Without flags: the embedded digits and their recipe, a few minutes on a CPU. The same command with --run goes on from the newest
    sound checkpoint. On several GPUs: deepspeed launch/pretrain.py with the same flags.

    Args:
        recipe: a name from `vitds recipes`, or a YAML file (default idmm_digits)
        data: the .beton file to train on
        test: a .beton file with labels, for kNN at the end
        run: the run directory (default runs/RECIPE-N, the next free number)
        init: a run directory, checkpoint or weights file to begin from
        ds_config: a DeepSpeed JSON file, or the name of a packaged one: zero0 to zero3, zero2_offload, zero3_offload (default zero0)
        epochs: passes over the images (default the recipe's)
        seed: of every random draw (default the recipe's)
        set: one setting, as in --set optimizer.lr_peak=1e-3; may be repeated
    """
    from vitds.jobs.pretrain import pretrain

    pretrain(recipe=recipe, data=data, test=test, run=run, init=init, ds_config=ds_config, epochs=epochs, seed=seed, set=set)


def finetune(
    *,
    recipe: str | None = None,
    data: str | None = None,
    test: str | None = None,
    run: str | None = None,
    init: str | None = None,
    ds_config: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Train a backbone on labelled images, from a pretrained run or from scratch.

    The same command with --run goes on from the newest sound checkpoint. On several GPUs: deepspeed launch/finetune.py with the same
    flags.

    Args:
        recipe: a name from `vitds recipes`, or a YAML file (default finetune_digits)
        data: the .beton file to train on
        test: the .beton file whose top-1 and top-5 are measured at the end
        run: the run directory (default runs/RECIPE-N, the next free number)
        init: a run directory, checkpoint or weights file to begin from; without it training starts from scratch
        ds_config: a DeepSpeed JSON file, or the name of a packaged one: zero0 to zero3, zero2_offload, zero3_offload (default zero0)
        epochs: passes over the images (default the recipe's)
        seed: of every random draw (default the recipe's)
        set: one setting, as in --set optimizer.lr_peak=1e-3; may be repeated
    """
    from vitds.jobs.finetune import finetune

    finetune(recipe=recipe, data=data, test=test, run=run, init=init, ds_config=ds_config, epochs=epochs, seed=seed, set=set)


def eval_top1(run: str, *, data: str | None = None, json: bool = False) -> None:
    """Top-1 and top-5 of a fine-tuned model.

    Args:
        run: a run directory, or one of its checkpoints
        data: the .beton file to classify (default the run's test file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.evaluate import evaluate

    evaluate("top1", run, data=data, as_json=json)


def eval_knn(run: str, *, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Top-1 and top-5 of weighted nearest neighbours on frozen features.

    Args:
        run: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file to classify (default the run's test file)
        bank: the labelled .beton file whose images are the neighbours (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.evaluate import evaluate

    evaluate("knn", run, data=data, bank=bank, as_json=json)


def eval_linear(run: str, *, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Top-1 and top-5 of a linear classifier on frozen features.

    Its regularisation is chosen on a part of the training images.

    Args:
        run: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file to classify (default the run's test file)
        bank: the labelled .beton file that the classifier learns from (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.evaluate import evaluate

    evaluate("linear", run, data=data, bank=bank, as_json=json)


def chain(file: str) -> None:
    """Run stages one after the other.

    Each stage is a run directory: a finished one is skipped, a stopped one goes on.

    Args:
        file: a YAML list of {run: DIRECTORY, command: COMMAND}; each command gets --run DIRECTORY
    """
    from vitds.jobs.chain import chain

    chain(file)


COMMANDS: dict[str, Command] = {
    "doctor": doctor,
    "data build": data_build,
    "data info": data_info,
    "data preview": data_preview,
    "data verify": data_verify,
    "recipes": recipes,
    "recipes show": recipes_show,
    "pretrain": pretrain,
    "finetune": finetune,
    "eval top1": eval_top1,
    "eval knn": eval_knn,
    "eval linear": eval_linear,
    "chain": chain,
}
HELP = ("--help", "-h")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the words of this process where none are given.

    Returns: 0, or the exit code of the error that was printed: vitds/errors.py lists them; 1 for a fault of ours, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = "vitds"
    try:
        if not words or words[0] in HELP:
            print(_overview())
            return 0
        name, function, rest = _find(words)
        if function is None:
            print(_overview(words[0]))
        elif any(word in HELP for word in rest):
            print(help_text(function, name))
        else:
            call_command(function, rest, name)
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except VitdsError as error:
        _report(name, error, str(error), is_debug)
        return error.exit_code
    except Exception as error:
        _report(name, error, f"unexpected {type(error).__name__}: {error}. This is a fault of vitds; --debug shows where", is_debug)
        return 1


def _find(words: list[str]) -> tuple[str, Command | None, list[str]]:
    """`vitds data build`, its function and the other words; None for a group, when its help is asked for.

    Raises: UsageError if there is no such command (names the nearest), or a group is left without one.
    """
    two, one = " ".join(words[:2]), words[0]
    group = [name.split()[1] for name in COMMANDS if name.startswith(f"{one} ")]
    has_second = len(words) > 1 and not words[1].startswith("-")
    if two in COMMANDS and has_second:
        return f"vitds {two}", COMMANDS[two], words[2:]
    if group and has_second:
        raise UsageError(f"{two}: unknown command; {did_you_mean(words[1], group)}")
    if one in COMMANDS:
        return f"vitds {one}", COMMANDS[one], words[1:]
    if not group:
        raise UsageError(f"{one}: unknown command; {did_you_mean(one, {name.split()[0] for name in COMMANDS})}")
    if not any(word in HELP for word in words):
        raise UsageError(f"{one} needs one of {', '.join(group)}; see vitds {one} --help")
    return f"vitds {one}", None, []


def _overview(group: str = "") -> str:
    """Every command, or those of a group, with the first line of its help."""
    rows = [(f"vitds {name}", _first_line(command)) for name, command in COMMANDS.items() if name.startswith(f"{group} ".lstrip())]
    about = "" if group else "Train Vision Transformers from scratch on the images you have.\n\n"
    return f"{about}{table_text(rows)}\n\nvitds COMMAND --help tells more."


def _first_line(command: Command) -> str:
    return command.__doc__.partition("\n")[0]


def _report(name: str, error: Exception, text: str, is_debug: bool) -> None:
    """One message on standard error.

    All ranks of a node read the same words and settings: for mistakes in those its first rank speaks for all.
    """
    if isinstance(error, UsageError | SettingsError) and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if is_debug:
        traceback.print_exception(error)
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"{name}{rank}: {text}", file=sys.stderr)
