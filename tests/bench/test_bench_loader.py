"""The benchmarks compare like with like, and their tables have the agreed names. No test looks at a time."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.small_files import PHOTOGRAPHS, picture, settings_for, write_file
from vitds.bench import augment, loader
from vitds.bench.images import bench_images
from vitds.bench.reference import POLICY, ReferenceSet, open_picture, view_transforms
from vitds.config.load import load_settings
from vitds.config.tree import ViewGroup, Views
from vitds.data.images import decode_stored
from vitds.errors import UsageError
from vitds.kernels.views import COLOUR_OPS, POLICY_OPS

# numba loses a key of its own table when FFCV's compiled decoders are collected; it has no consequence.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROWS = ["reference", "ffcv_per_view", "torch_kernel", "crops", "complete_u8", "complete_f32", "complete_bf16"]


@pytest.fixture(scope="module", params=["jpg", "raw"])
def file(request, tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("data") / "x.beton", storage=request.param, images=12)


@pytest.fixture
def short(monkeypatch):
    """One counted pass a row."""
    for module, passes in ((loader, "PASSES"), (augment, "REPEATS")):
        monkeypatch.setattr(module, passes, 1)
        monkeypatch.setattr(module, "SECONDS", 0.0)


def test_the_loader_table_has_the_agreed_rows(tmp_path, short, capsys):
    file = write_file(tmp_path / "x.beton", storage="raw", images=12)
    rows = loader.bench_loader(str(file.path), recipe="idmm_digits", as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["rows"]] == [row.name for row in rows] == ROWS
    for row in rows:
        assert row.images_per_s > 0 and row.cpu_ms > 0
        assert row.crops_per_s_core == pytest.approx(
            6 * row.images_per_s, abs=0.4
        )  # both are rounded to a tenth
        assert row.ratio == pytest.approx(row.images_per_s / rows[0].images_per_s, rel=0.01, abs=0.01)


def test_the_table_for_people_is_printed_and_torchs_threads_are_kept(tmp_path, short, capsys):
    file = write_file(tmp_path / "x.beton")
    threads = torch.get_num_threads()
    rows = loader.bench_loader(str(file.path), recipe="idmm_digits", workers=2)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ROWS) and "workers 2" in printed
    assert all(row.crops_per_s_core == pytest.approx(3 * row.images_per_s, abs=0.3) for row in rows)
    assert torch.get_num_threads() == threads


def test_workers_below_one_are_refused():
    with pytest.raises(UsageError, match="--workers 0: must be 1 or more"):
        loader.bench_loader(workers=0)


def test_only_the_first_images_are_used_in_whole_batches(file):
    assert loader.first_images(file, 12).images == 12
    many = loader.first_images(file, 5)
    assert many.images == 5 and len(many.offsets) == len(many.labels) == 5
    assert loader.IMAGES % loader.BATCH_IMAGES == 0


def test_crops_only_has_the_recipes_boxes_and_nothing_else(file, monkeypatch):
    groups = (ViewGroup(name="large", views=2), ViewGroup(name="small", scale=(0.05, 0.4)))
    coloured = (groups[0], groups[1].model_copy(update={"blur": 1.0, "solarise": 0.2}))
    settings, seen = settings_for(views=Views(crop_px=32, groups=coloured, grey=0.2)), []
    monkeypatch.setattr(loader, "ours", lambda file, settings, *dtype: seen.append((settings.views, *dtype)))
    pipelines = loader.pipelines(file, settings)
    for name in ROWS[3:]:
        pipelines[name]()
    crops, complete, *floats = seen
    assert crops[0] == Views(crop_px=32, groups=groups) and complete[0] == settings.views
    assert [row[1] for row in floats] == [torch.float32, torch.bfloat16]


def step_names(views):
    """By view, the names of the reference's steps."""
    return [[type(step).__name__ for step in chain.transforms] for chain in view_transforms(views)]


def test_the_reference_makes_every_view_complete_and_normalised(file):
    torch.manual_seed(0)
    settings = load_settings(recipe="idmm_deit_tiny", command=None, flags={})
    views = ReferenceSet(file, settings.views)[0]
    assert views.shape == (6, 3, 112, 112) and views.dtype == torch.float32 and views.min() < 0 < views.max()
    steps = step_names(settings.views)[0]
    wanted = [
        "RandomResizedCrop",
        "RandomApply",
        "RandomGrayscale",
        "RandomApply",
        "RandomHorizontalFlip",
        "ToTensor",
        "Normalize",
    ]
    assert steps == wanted
    fine = load_settings(recipe="finetune_deit_tiny_224", command=None, flags={}).views
    assert "RandAugment" in step_names(fine)[0]


def test_the_reference_has_each_groups_own_probabilities():
    groups = (ViewGroup(name="first", blur=1.0), ViewGroup(name="second", views=2, solarise=0.2))
    first, *second = step_names(Views(groups=groups, flip=0.0))
    assert "RandomApply" in first and "RandomSolarize" not in first
    assert all("RandomSolarize" in steps and "RandomApply" not in steps for steps in second)


def test_the_reference_reads_the_files_own_pictures(file):
    mapped = np.memmap(file.path, np.uint8, "r")
    for image in range(12):
        raw = mapped[file.offsets[image] :][: file.sizes[image]].tobytes()
        ours = decode_stored(
            raw, bool(file.is_jpeg[image]), int(file.heights[image]), int(file.widths[image])
        )
        np.testing.assert_allclose(np.asarray(open_picture(file, mapped, image), int), ours, atol=2)


def test_the_reference_knows_all_fifteen_policy_operations(file):
    assert tuple(POLICY) == POLICY_OPS[1:]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    for name, operation in POLICY.items():
        changed = operation(picture, 1.0)
        assert (
            changed.size == picture.size
            and changed.tobytes() != picture.tobytes()
            or name in ("autocontrast", "equalize")
        ), name


def test_the_augment_table_has_every_kernel(tmp_path, short, capsys):
    file = write_file(tmp_path / "x.beton", storage="raw")
    rows = augment.bench_augment(str(file.path), as_json=True)
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]]
    wanted = {
        *COLOUR_OPS[1:],
        "grey",
        "blur",
        "solarise",
        "resample bilinear",
        "resample bicubic",
        *(f"policy {name}" for name in POLICY_OPS[1:]),
        *(inputs := {f"input, mixing {kind}" for kind in ("none", "cutmix", "mixup")}),
    }
    assert set(names) == wanted and len(names) == len(wanted)
    assert all(row.ms > 0 and row.torchvision_ms > 0 for row in rows)
    assert {row.name for row in rows if row.pil_ms is None} == inputs
    augment.bench_augment(str(file.path))
    assert "solarize" in capsys.readouterr().out


@pytest.mark.parametrize("name", augment.KERNELS)
def test_what_is_timed_side_by_side_does_the_same(name):
    """Within rounding; PIL blurs by boxes, and torchvision shears bilinearly, ours and PIL bicubically."""
    kernel = augment.KERNELS[name]
    crops = [np.asarray(Image.fromarray(whole).resize((112, 112))) for whole in PHOTOGRAPHS]
    ours = augment._cut((crops * augment.CROPS)[: augment.CROPS], kernel.spec)[: len(crops), 0].astype(int)
    pil = np.stack([np.asarray(kernel.pil(Image.fromarray(crop))) for crop in crops]).transpose(0, 3, 1, 2)
    theirs = kernel.torchvision(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)).numpy()
    assert np.abs(ours - pil).mean() < 1 and np.abs(ours - theirs).mean() < 1.5


def test_a_folder_of_images_is_built_with_its_jpeg_bytes_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.fromarray(picture(0, 40, 30)).save(tmp_path / "photos" / "cat" / "1.jpg", quality=90)
    built = bench_images("photos")
    offset, size = int(built.offsets[0]), int(built.sizes[0])
    assert (
        built.images == 1
        and built.path.read_bytes()[offset : offset + size]
        == (tmp_path / "photos" / "cat" / "1.jpg").read_bytes()
    )


def test_without_photographs_the_digits_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench_images(None).images == 896
