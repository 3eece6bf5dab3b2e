"""The command line: a function a command, called by Fire after words.py has checked every word.

A command exists by standing in COMMANDS. Its function is the flags (keyword-only), the words (positional) and
the help (docstring); the job behind it is imported when it runs, so that help answers at once and without
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vitds.config.flags import TrainFlags
from vitds.console import find_command, run_command
from vitds.errors import ResourceError, UsageError
from vitds.words import Command, call_command, takes


def doctor(*, json: bool = False) -> None:
    """Check this machine and installation.

    Versions, devices, native bf16, compiled parts, launcher, cores, memory, free disk: each line is ok, a
    warning, or broken with its fix.

    Args:
        json: print one JSON object and nothing else
    """
    from vitds.jobs.doctor import doctor

    if broken := doctor(as_json=json):
        raise ResourceError(f"{broken} broken, see above; each has its fix beside it")


def data_build(
    *sources: str,
    out: str,
    storage: Literal["auto", "raw", "jpg"] = "auto",
    side: int | None = None,
    quality: int | None = None,
    workers: int | None = None,
    split: str | None = None,
    classes_are_folders: bool = False,
    test_fraction: float | None = None,
    classes_from: str | None = None,
    strict: bool = False,
    root: str | None = None,
    download: bool = False,
    per_class: int | None = None,
    classes: int | None = None,
    total: int | None = None,
    seed: int | None = None,
    list: str | None = None,
) -> None:
    """Make a .beton data file from folders of images.

    A source is a folder with a folder a class, a flat folder of images (no labels), a tar of either, or a
    name: `digits` (the embedded set), or one of the published sets flowers102, pets, dtd, aircraft, cars,
    cub200, indoor67, cifar10, cifar100, imagenet, which lie under --root. Named sets have a split of their
    own: they give F-train.beton and F-test.beton, or one file with --split.

    Args:
        sources: folders and tars are taken together, classes by name; a named set stands alone
        out: the file to write, F.beton
        storage: raw pixels (fast, large), JPEG, or auto: raw where the set or its images are small
        side: larger images are scaled down to this short side, in pixels
        quality: of JPEGs that have to be written anew, 1 to 100 (default 90)
        workers: processes (default one a core)
        split: the folder of this name within each source, as in SOURCE/train; of a named set, the part to
            take
        classes_are_folders: the first folders are the classes, even if they look like splits or like a folder
            around the classes
        test_fraction: write F-train.beton and F-test.beton instead, this share of every class for the test
        classes_from: take the class list of this .beton file, so that train and test agree
        strict: stop if anything about the images is broken or odd, instead of counting and naming it
        root: where a published set lies, as its publisher ships it
        download: fetch a published set into --root
        per_class: of a published set, this many images of every class
        classes: of a published set, this many classes
        total: of a published set, this many images
        seed: of the choice that --test_fraction, --per_class, --classes and --total make (default 0)
        list: take exactly the images that a list names; a sample's list is written beside its file
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.data import build

    with as_flags(data_build):
        build(
            sources,
            out=out,
            storage=storage,
            side_px=side,
            quality=quality,
            workers=workers,
            split=split,
            classes_are_folders=classes_are_folders,
            test_fraction=test_fraction,
            classes_from=classes_from,
            strict=strict,
            root=root,
            download=download,
            per_class=per_class,
            classes=classes,
            total=total,
            seed=seed,
            list=list,
        )


def data_info(file: str, *, json: bool = False) -> None:
    """Show what a .beton file holds.

    Images, classes, storage, sizes, mean and deviation, content hash, and what was odd about the images when
    it was built.

    Args:
        file: a .beton file
        json: print one JSON object and nothing else
    """
    from vitds.jobs.data_check import info

    info(file, as_json=json)


def data_verify(file: str, *, json: bool = False) -> None:
    """Read every image of a .beton file back, for instance after a copy.

    Args:
        file: a .beton file
        json: print one JSON object and nothing else
    """
    from vitds.jobs.data_check import verify

    verify(file, as_json=json)


def data_preview(
    file: str,
    *,
    recipe: str | None = None,
    out: str = "preview.png",
    images: int = 4,
    seed: int | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Draw exactly what the network will see.

    A labelled grid: originals, each view, and the mixed crops with their targets' weights.

    Args:
        file: a .beton file
        recipe: a recipe's name or a YAML file (default idmm_digits, for the embedded digits alone)
        out: the picture to write
        images: how many of the first step's images
        seed: of every random draw (default the recipe's)
        set: one setting, as in --set views.crop_px=96; may be repeated
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.preview import preview

    with as_flags(data_preview):
        preview(file, recipe=recipe, out=out, images=images, seed=seed, set=set)


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


def models(pattern: str = "deit*", *, side: int | None = None, json: bool = False) -> None:
    """List timm's models: parameters, width of the features, sides of crops, operations.

    Each model is asked, which takes about a second; nothing is downloaded or trained.

    Args:
        pattern: of names, * stands for anything: '*vit*tiny*' in quotes
        side: of the crop whose operations are counted, in pixels (default the side of the published weights)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.models import print_models

    print_models(pattern, side_px=side, as_json=json)


@takes(TrainFlags)
def pretrain(flags: TrainFlags) -> None:
    """Pretrain a backbone on images without labels.

    The recipe says by which method; without one it is parametric instance discrimination, where each image is
    its own class.

    Without flags: the embedded digits and their recipe, a few minutes on a CPU. The same command with --run
    goes on from the newest sound checkpoint. On several GPUs: deepspeed launch/pretrain.py with the same
    flags. With --test, and labels in both files, nearest neighbours are counted at the end.
    """
    from vitds.jobs.train import train

    train("pretrain", flags)


@takes(TrainFlags)
def finetune(flags: TrainFlags) -> None:
    """Train a backbone on labelled images, from a pretrained run or from scratch.

    The same command with --run goes on from the newest sound checkpoint. On several GPUs: deepspeed
    launch/finetune.py with the same flags. Top-1 and top-5 on --test are measured at the end.
    """
    from vitds.jobs.train import train

    train("finetune", flags)


def eval_top1(run: str, *, data: str | None = None, json: bool = False) -> None:
    """Top-1 and top-5 of a fine-tuned model.

    Args:
        run: a run directory, or one of its checkpoints
        data: the .beton file to classify (default the run's test file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_top1):
        evaluate("top1", run, data=data, as_json=json)


def eval_knn(run: str, *, data: str | None = None, bank: str | None = None, json: bool = False) -> None:
    """Top-1 and top-5 of weighted nearest neighbours on frozen features.

    Args:
        run: a run directory, one of its checkpoints, or a timm model's name
        data: the .beton file to classify (default the run's test file)
        bank: the labelled .beton file whose images are the neighbours (default the run's training file)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_knn):
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
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.evaluate import evaluate

    with as_flags(eval_linear):
        evaluate("linear", run, data=data, bank=bank, as_json=json)


def chain(file: str) -> None:
    """Run stages one after the other.

    Each stage is a run directory: a finished one is skipped, a stopped one goes on.

    Args:
        file: a YAML list of {run: DIRECTORY, command: COMMAND}; each command gets --run DIRECTORY
    """
    from vitds.jobs.chain import chain

    chain(file, _check_stage)


def _check_stage(words: Sequence[str], made: Sequence[Path]) -> None:
    """Raises: what is wrong with a stage's words, by this table of commands; see jobs/chain.check_stages."""
    from vitds.jobs.chain import check_training

    name, function, rest = find_command(COMMANDS, words)
    if function not in (pretrain, finetune):
        raise UsageError(
            f"{name} makes no run directory. A stage is `vitds pretrain` or `vitds finetune`; both evaluate "
            "at their end"
        )

    @takes(TrainFlags)
    def check(flags: TrainFlags) -> None:
        """Check a training's flags."""
        check_training("pretrain" if function is pretrain else "finetune", flags, made)

    call_command(check, rest, name)


def bench_loader(
    *, data: str | None = None, recipe: str | None = None, workers: int = 1, json: bool = False
) -> None:
    """Images and crops a second and core of the input pipeline.

    Beside ours, on the same images and in the same run: the reference (PIL and torchvision), FFCV with one
    pipeline a view, and FFCV's decode with torch's kernel.

    Args:
        data: a .beton file, or a folder or tar of images (default photographs in ../shared/data, else the
            embedded digits)
        recipe: whose crops are made (default idmm_deit_tiny, for the digits idmm_digits)
        workers: threads of the loader
        json: print one JSON object and nothing else
    """
    from vitds.bench.loader import bench_loader

    bench_loader(data=data, recipe=recipe, workers=workers, as_json=json)


def bench_augment(*, data: str | None = None, json: bool = False) -> None:
    """Time of every augmentation, beside PIL, torchvision and kornia.

    Args:
        data: a .beton file, or a folder or tar of images (default photographs in ../shared/data, else the
            embedded digits)
        json: print one JSON object and nothing else
    """
    from vitds.bench.augment import bench_augment

    bench_augment(data=data, as_json=json)


def bench_step(
    *,
    recipe: str | None = None,
    data: str | None = None,
    ds_config: str | None = None,
    rounds: int = 3,
    json: bool = False,
) -> None:
    """Time of a whole training step, beside a bare loop on synthetic tensors.

    Args:
        recipe: a recipe of pretraining (default idmm_digits)
        data: a .beton file (default the embedded digits)
        ds_config: a DeepSpeed JSON file, or the name of a packaged one (default zero0)
        rounds: of an epoch of ours and as many bare steps, in turn
        json: print one JSON object and nothing else
    """
    from vitds.bench.step import bench_step

    bench_step(recipe=recipe, data=data, ds_config=ds_config, rounds=rounds, as_json=json)


def bench_head(
    *,
    rows: int,
    dim: int,
    batch: int,
    ranks: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    bf16_rows: bool = False,
    rounds: int = 3,
    keep_mb: int = 64,
    json: bool = False,
) -> None:
    """Time, memory and traffic of the instance head, beside others' ways.

    Loss and gradients of one step, forward and backward: ours dense and sharded, torch's linear and
    cross_entropy, the same in tiles, Liger and Cut Cross-Entropy where they are installed and run, and the
    four bare products that none of them can do without.

    Args:
        rows: N, the instances
        dim: D, the features' width
        batch: M, the features of one step, of all ranks together
        ranks: also spread the rows over so many processes on this machine
        precision: of the products
        bf16_rows: rows and their gradient are bfloat16 too, as with head.row_dtype=bf16; float32 otherwise
        rounds: of every way, in turn; the best counts
        keep_mb: of ours, head.keep_mb: logits up to this size are kept for the backward pass
        json: print one JSON object and nothing else
    """
    from vitds.bench.head import bench_head

    bench_head(
        rows=rows,
        dim=dim,
        batch=batch,
        ranks=ranks,
        precision=precision,
        bf16_rows=bf16_rows,
        rounds=rounds,
        keep_mb=keep_mb,
        as_json=json,
    )


def plan(
    *,
    model: str | None = None,
    rows: int,
    batch: int | None = None,
    gpus: int = 1,
    ds_config: str | None = None,
    recipe: str | None = None,
    set: tuple[str, ...] = (),
    images_per_s: float | None = None,
    hours: bool = False,
    json: bool = False,
) -> None:
    """Memory of one GPU, traffic and hours of a pretraining, by arithmetic.

    No GPU is needed, and nothing is trained but with --hours.

    Args:
        model: a timm model (default the recipe's)
        rows: N, the images; each is a row of the head where the method has one
        batch: images a step, over all GPUs (default the recipe's)
        gpus: ranks
        ds_config: a DeepSpeed JSON file, or the name of a packaged one (default zero0)
        recipe: a recipe of pretraining (default idmm_deit_tiny)
        set: one setting, as in --set batch.micro_images=128; may be repeated
        images_per_s: of all GPUs together; gives hours
        hours: measure images a second here, on one device
        json: print one JSON object and nothing else
    """
    from vitds.jobs.plan import plan

    plan(
        model=model,
        rows=rows,
        batch=batch,
        gpus=gpus,
        ds_config=ds_config,
        recipe=recipe,
        set=set,
        images_per_s=images_per_s,
        hours=hours,
        as_json=json,
    )


def checkpoint_list(run: str, *, json: bool = False) -> None:
    """List a run's checkpoints.

    Args:
        run: a run directory
        json: print one JSON object and nothing else
    """
    from vitds.jobs.checkpoints import list_run

    list_run(run, as_json=json)


def checkpoint_verify(run: str, *, json: bool = False) -> None:
    """Hash every file of a run's checkpoints; a damaged one is named.

    Args:
        run: a run directory
        json: print one JSON object and nothing else
    """
    from vitds.jobs.checkpoints import verify_run

    verify_run(run, as_json=json)


def checkpoint_prune(run: str, *, keep: int = 1, json: bool = False) -> None:
    """Remove a run's checkpoints but the newest sound ones.

    A finished run needs none to be evaluated or to begin another from. The rows of its instance head are in
    them alone.

    Args:
        run: a run directory
        keep: how many stay
        json: print one JSON object and nothing else
    """
    from vitds.jobs.checkpoints import prune_run

    prune_run(run, keep=keep, as_json=json)


COMMANDS: dict[str, Command] = {
    "doctor": doctor,
    "data build": data_build,
    "data info": data_info,
    "data preview": data_preview,
    "data verify": data_verify,
    "recipes": recipes,
    "recipes show": recipes_show,
    "models": models,
    "pretrain": pretrain,
    "finetune": finetune,
    "eval top1": eval_top1,
    "eval knn": eval_knn,
    "eval linear": eval_linear,
    "chain": chain,
    "plan": plan,
    "checkpoint list": checkpoint_list,
    "checkpoint verify": checkpoint_verify,
    "checkpoint prune": checkpoint_prune,
    "bench loader": bench_loader,
    "bench augment": bench_augment,
    "bench step": bench_step,
    "bench head": bench_head,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default this process's words; returns the exit status (console.py)."""
    return run_command(COMMANDS, sys.argv[1:] if argv is None else argv)
