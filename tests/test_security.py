"""Nothing that a command reads can run code: a malicious pickle takes the place of each file in turn, under
the file's own name.
"""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.engine.training import SMALL, small_run, stopped_run
from vitds.cli import main
from vitds.config.methods import readers
from vitds.jobs.quickstart import _print_table

ROOT = Path(__file__).parents[1]
ONLY_WRITTEN = ("log.txt", "curve.png", "environment.json")


# Files of data sets that are built by name. CIFAR's are published as pickles, with check sums.
NAMED_SETS = {
    f"cifar-10-batches-py/{name}": "cifar10"
    for name in ("batches.meta", "test_batch", "data_batch_1", "data_batch_5")
}
NAMED_SETS |= {f"cifar-100-python/{name}": "cifar100" for name in ("meta", "train", "test")}
NAMED_SETS |= {
    f"ILSVRC2012_{name}": "imagenet" for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz")
}
NAMED_SETS |= {
    f"stanford_cars/{name}": "cars" for name in ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat")
}
NAMED_SETS |= {
    "flowers-102/imagelabels.mat": "flowers102",
    "CUB_200_2011/images.txt": "cub200",
    "TrainImages.txt": "indoor67",
}


def sets(method: str = "idmm", **changes: str) -> list[str]:
    """The words that make a method's run small."""
    return [
        word
        for key, value in (SMALL | changes).items()
        if method in readers(key)
        for word in ("--set", f"{key}={value}")
    ]


SETS = sets()
DIGITS = ("--recipe", "idmm_digits")
FINE_DIGITS = ("--recipe", "finetune_digits")
FINE_SETS = sets("supervised", **{"views.groups": "[{name: train, views: 1, scale: [0.3, 1.0]}]"})


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        return Path.touch, (self.sign,)


def call_all(commands: Sequence[Sequence[str]]) -> list[int]:
    """The exit status of each command line, called in this process."""
    return [main(words) for words in commands]


def small_run_path(run: str, data: tuple[str, str], **options) -> str:
    return str(small_run(run, data, **options).path)


@pytest.fixture(scope="module")
def sound(rank_pool, digit_files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that commands read, sound: data, a run to resume, a finished one, settings, weights,
    sources of data.
    """
    folder = tmp_path_factory.mktemp("sound")
    for half, source in zip(("train", "test"), digit_files, strict=True):
        for suffix in ("", ".json"):
            shutil.copy(source + suffix, folder / f"{half}.beton{suffix}")
    data = (str(folder / "train.beton"), str(folder / "test.beton"))
    [said] = rank_pool(1).run(
        stopped_run, str(folder / "pre"), data, after_lines=1, epochs=1, head__kind="sharded"
    )
    assert said.startswith("stopped by a signal")
    rank_pool(1).run(small_run_path, str(folder / "fine"), data, method="supervised", epochs=1)
    (folder / "recipe.yaml").write_text(
        f"method: idmm\nviews: {{crop_px: 16}}\nbackbone: {{options: {SMALL['backbone.options']}}}\n"
    )
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 0}}')
    (folder / "chain.yaml").write_text(f"- {{run: {folder / 'fine'}, command: 'false'}}\n")
    shutil.copy(folder / "fine/backbone.safetensors", folder / "weights.safetensors")
    torch.save(load_file(folder / "weights.safetensors"), folder / "weights.pth")
    (folder / "images/digit 0").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images/digit 0/1.png")
    for name, mode in (("images.tar", "w"), ("images.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as tar:
            tar.add(folder / "images", "images")
    for file in NAMED_SETS:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_text("")
    return folder


def commands_that_read(file: Path, folder: Path) -> list[list[str]]:
    """The commands that read a file of the folder, as words."""
    build = ["data", "build", "--out", str(folder / "built.beton")]
    top = file.relative_to(folder).parts[0]
    if (name := NAMED_SETS.get(str(file.relative_to(folder)))) is not None:
        return [[*build, name, "--root", str(folder), "--split", split] for split in ("train", "test")]
    if ".beton" in top:
        return commands_on_a_beton(file, folder, build)
    if top in ("pre", "fine"):
        return commands_on_a_run(folder)[top]
    train, images = str(folder / "train.beton"), str(folder / "images")
    new = new_run(folder)
    return {
        "recipe.yaml": [
            ["pretrain", *new, "--recipe", str(file)],
            [*preview(folder), train, "--recipe", str(file)],
            ["recipes", "show", str(file)],
            ["plan", "--rows", "100", "--recipe", str(file), "--set", "head.kind=dense"],
            *(["bench", kind, "--data", train, "--recipe", str(file)] for kind in ("loader", "step")),
        ],
        "ds.json": [
            ["pretrain", *new, *DIGITS, "--ds_config", str(file), *SETS],
            ["plan", "--rows", "100", "--ds_config", str(file)],
            ["bench", "step", "--ds_config", str(file)],
        ],
        "chain.yaml": [["chain", str(file)]],
        "weights.safetensors": [["pretrain", *new, *DIGITS, "--init", str(file), *SETS]],
        "weights.pth": [["pretrain", *new, *DIGITS, "--init", str(file), *SETS]],
        "images": [[*build, images]],
        "images.tar": [[*build, str(file)]],
        "images.tar.gz": [[*build, str(file)]],
    }[top]


def new_run(folder: Path, name: str = "new") -> list[str]:
    """Flags of a training of one epoch on the folder's files."""
    train, test = str(folder / "train.beton"), str(folder / "test.beton")
    return ["--run", str(folder / name), "--data", train, "--test", test, "--epochs", "1"]


def resume(folder: Path) -> list[str]:
    """The words that the folder's pretraining began with."""
    return ["pretrain", *DIGITS, *new_run(folder, "pre"), *SETS, "--set", "head.kind=sharded"]


def preview(folder: Path) -> list[str]:
    """Draw crops."""
    return ["data", "preview", "--out", str(folder / "preview.png")]


def commands_on_a_beton(file: Path, folder: Path, build: list[str]) -> list[list[str]]:
    """Those that read a .beton, or its manifest."""
    beton, fine = str(file).removesuffix(".json"), str(folder / "fine")
    train, test = str(folder / "train.beton"), str(folder / "test.beton")
    return [
        ["data", "info", beton],
        ["data", "verify", beton],
        [*preview(folder), beton, *DIGITS],
        [*build, str(folder / "images"), "--classes_from", beton],
        *(["eval", kind, fine, "--data", test, "--bank", train] for kind in ("knn", "linear")),
        resume(folder),
        *(["bench", kind, "--data", beton] for kind in ("loader", "augment", "step")),
    ]


def commands_on_a_run(folder: Path) -> dict[str, list[list[str]]]:
    """Those that read the folder's pretraining, and its fine-tuning."""
    pre, fine = str(folder / "pre"), str(folder / "fine")
    checkpoint = str(max((folder / "pre/checkpoints").iterdir()))
    tuning = ["finetune", *new_run(folder), *FINE_DIGITS]
    return {
        "pre": [
            ["checkpoint", "list", pre],
            ["checkpoint", "verify", pre],
            resume(folder),
            ["eval", "knn", checkpoint],
            [*tuning, "--init", checkpoint, *FINE_SETS],
        ],
        "fine": [
            *(["eval", kind, fine] for kind in ("top1", "knn", "linear")),
            ["chain", str(folder / "chain.yaml")],
            [*tuning, "--init", fine, *FINE_SETS],
        ],
    }


def plant(file: Path, content: bytes) -> None:
    """Write over a file; where it is a part of a checkpoint, its manifest vouches for the new content."""
    file.write_bytes(content)
    manifest = file.parent / "manifest.json"
    if file.suffix == ".safetensors" and manifest.exists():
        facts = json.loads(manifest.read_text())
        facts["files"][file.name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        del facts["sha256"]
        manifest.write_text(
            json.dumps(facts | {"sha256": sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()})
        )


def payloads(name: str, sign: Path) -> list[bytes]:
    """What might run when a file of this name is read carelessly."""
    found = [pickle.dumps(Planted(sign))]
    if name.endswith((".yaml", ".pth")):
        found.append(pickle.dumps(Planted(sign), protocol=0))  # plain text
    if name.endswith(".yaml"):
        found.append(f"epochs: !!python/object/apply:os.mknod ['{sign}']".encode())
    if name.endswith(".pth"):
        torch.save({"model": Planted(sign)}, sign.with_name("zip"))
        found.append(sign.with_name("zip").read_bytes())
    return found


def test_the_planted_pickle_would_run_where_it_is_unpickled(tmp_path: Path) -> None:
    for content in payloads("weights.txt", tmp_path / "sign"):
        pickle.loads(content)
        assert (tmp_path / "sign").exists()
        (tmp_path / "sign").unlink()


def copied(sound: Path, folder: Path) -> Path:
    """The sound files under another folder, whose name takes the old one's place in them."""
    shutil.copytree(sound, folder)
    for file in (folder / "chain.yaml", *folder.glob("*/settings.yaml")):
        file.write_text(file.read_text().replace(str(sound), str(folder)))
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "pre/lock",
        "fine/head.safetensors",
        "train.beton",
        "recipe.yaml",
        "ds.json",
        "chain.yaml",
        "weights.safetensors",
        "weights.pth",
    ]
    + ["images/digit 0/1.png", "images.tar", "images.tar.gz"],
)
def test_the_commands_go_through_on_sound_files(rank_pool, sound: Path, tmp_path: Path, file: str) -> None:
    folder = copied(sound, tmp_path / "sound")
    commands = [words for words in commands_that_read(folder / file, folder) if words[0] != "bench"]
    assert rank_pool(1).run(call_all, commands) == [[0] * len(commands)], rank_pool(1).output


def test_no_file_that_a_command_reads_runs_code(rank_pool, sound: Path, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    for file in sorted(
        path.relative_to(sound)
        for path in sound.rglob("*")
        if path.is_file() and path.name not in ONLY_WRITTEN
    ):
        for content in payloads(file.name, sign):
            folder = copied(sound, tmp_path / "planted")
            plant(folder / file, content)
            commands = commands_that_read(folder / file, folder)
            [statuses] = rank_pool(1).run(call_all, commands)
            shutil.rmtree(folder)
            assert not sign.exists(), f"{file} ran code"
            said = rank_pool(1).output
            is_named = file.name in said or str(file) in NAMED_SETS and f"{file.parent}/" in said
            assert 1 not in statuses and (is_named or not any(statuses)), (
                f"{file}: no refusal that names it:\n{statuses}\n{said}"
            )


HOSTILE = 'it\'s a "run"; touch gone; $(touch gone) `touch gone` | touch gone & * ~ \\ \n#'


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("slurm_small.sh", ["--run", HOSTILE, "--data", HOSTILE, "--set", f"views.flip={HOSTILE}"]),
        (
            "slurm_imagenet.sh",
            ["--folders", HOSTILE, "--run", HOSTILE, "--init", HOSTILE, "--local", HOSTILE],
        ),
        ("slurm_transfer.sh", ["--runs", HOSTILE, "--out", HOSTILE, "--folder", HOSTILE, "--set", HOSTILE]),
        ("single_node.sh", ["--ranks", "1", "pretrain", "--run", HOSTILE, "--set", f"views.flip={HOSTILE}"]),
    ],
)
def test_launch_scripts_pass_hostile_words_on_as_they_are(
    tmp_path: Path, script: str, words: list[str]
) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    said = subprocess.run(
        ["bash", f"launch/{script}", "--dry_run", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    command = 'for word in "$@"; do printf "%s\\0" "$word"; done'
    shown = "".join(
        line.partition(" ")[2] + "\n" for line in said.splitlines() if line.startswith(("+ ", "stage "))
    )
    read_back = subprocess.run(
        ["bash", "-c", f"set -- {shown.replace(chr(10), ' ')}; {command}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert [word for word in read_back.stdout.split("\0") if HOSTILE in word], read_back.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


def test_launch_scripts_run_nothing_that_stands_in_an_options_name(tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    words = ["bash", "launch/slurm_small.sh", "--dry_run", "--run[$(touch gone)]", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown option --run[$(touch gone)]; there are --data" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


def test_tensorboard_as_we_say_to_start_it_shows_the_run_to_this_machine_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, scores = (
        tmp_path / HOSTILE.replace("\n", " "),
        dict.fromkeys(("knn_top1", "finetuned_top1", "scratch_top1", "difference"), 1.0),
    )
    _print_table(root, scores | {"seconds": dict.fromkeys(("pretrain", "finetune", "scratch"), 1.0)})
    words = shlex.split(capsys.readouterr().out.partition("TensorBoard: ")[2].partition("\npicture:")[0])
    assert words == ["tensorboard", "--logdir", str(root)]
    command = [str(Path(sys.executable).parent / words[0]), *words[1:], "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not (
                doors := [
                    door
                    for door in psutil.Process(process.pid).net_connections()
                    if door.status == psutil.CONN_LISTEN
                ]
            ):
                assert process.poll() is None
                time.sleep(0.1)
        finally:
            process.kill()
    assert {door.laddr.ip for door in doors} <= {"127.0.0.1", "::1"}
    ours = [
        path
        for folder in ("launch", "docs", "vitds")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".sh", ".md", ".py")
    ]
    assert not [path for path in ours if "--bind_all" in path.read_text() or "--host 0" in path.read_text()]
