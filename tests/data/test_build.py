"""From images to a .beton: what is stored, in which order, with which labels, and how a build ends."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.built import build, pixels_of
from tests.data.images import (
    class_folders,
    encode,
    jpeg,
    photo,
    png,
    write_folder,
)
from vitds.data.beton import open_beton
from vitds.data.build import BuildOptions, build_beton
from vitds.data.sampling import Sample
from vitds.data.writer import BetonWriter
from vitds.errors import DataError, ResourceError, UsageError

# ------------------------------------------------------------------------------------------------------- what
# is stored


def test_a_jpeg_that_needs_no_change_keeps_its_own_bytes(tmp_path):
    grey = encode(Image.fromarray(photo(3)).convert("L"), "JPEG")
    files = {
        "a/1.jpg": jpeg(1),
        "a/2.jpg": jpeg(2, progressive=True),
        "a/3.jpg": grey,
        "b/4.jpg": jpeg(4, quality=30, subsampling=0),
    }
    beton = build(tmp_path, files, storage="jpg")
    data = beton.path.read_bytes()
    assert [data[at : at + size] for at, size in zip(beton.offsets, beton.sizes, strict=True)] == list(
        files.values()
    )


def test_raw_storage_holds_the_decoded_pixels(tmp_path):
    beton = build(tmp_path, {"a/1.png": png(1), "a/2.png": png(2, 25, 60)}, storage="raw")
    assert not beton.is_jpeg.any()
    assert np.array_equal(pixels_of(beton, 0), photo(1)) and np.array_equal(
        pixels_of(beton, 1), photo(2, 25, 60)
    )


def test_content_hash_does_not_depend_on_storage_of_unchanged_jpegs(tmp_path):
    files = {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)}
    hashes = {build(tmp_path, files, storage=storage).manifest.content_hash for storage in ("raw", "jpg")}
    assert len(hashes) == 1


def test_content_hash_depends_on_pixels_labels_and_order(tmp_path):
    sets = [
        {"a/1.png": png(1), "b/2.png": png(2)},
        {"a/1.png": png(1), "b/2.png": png(3)},
        {"a/1.png": png(1), "a/2.png": png(2), "b/0.txt": b""},
        {"a/1.png": png(2), "b/2.png": png(1)},
    ]
    assert len({build(tmp_path / str(i), files).manifest.content_hash for i, files in enumerate(sets)}) == 4


def test_png_in_jpg_storage_is_encoded_at_the_quality_asked_for(tmp_path):
    sizes = {}
    for quality in (50, 95):
        beton = build(tmp_path, {"a/1.png": png(1)}, storage="jpg", quality=quality)
        assert beton.is_jpeg.all() and np.abs(pixels_of(beton, 0).astype(int) - photo(1)).mean() < 12
        sizes[quality] = int(beton.sizes[0])
    assert sizes[95] > 1.2 * sizes[50]


@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_side_is_the_short_side_and_nothing_is_enlarged(tmp_path, storage):
    files = {
        "a/1.png": png(1, 80, 60),
        "a/2.png": png(2, 30, 90),
        "a/3.png": png(3, 20, 29),
        "a/4.png": png(4, 30, 30),
    }
    beton = build(tmp_path, files, storage=storage, side_px=30)
    assert list(zip(beton.widths.tolist(), beton.heights.tolist(), strict=True)) == [
        (40, 30),
        (30, 90),
        (20, 29),
        (30, 30),
    ]
    assert beton.manifest.side_px == 30
    reference = Image.fromarray(photo(1, 80, 60)).resize((40, 30), Image.Resampling.BICUBIC)
    assert np.abs(pixels_of(beton, 0).astype(int) - np.asarray(reference)).mean() <= (
        0 if storage == "raw" else 12
    )


def test_a_jpeg_larger_than_side_is_reduced_from_its_pixels(tmp_path):
    beton = build(tmp_path, {"a/1.jpg": jpeg(1, 90, 60)}, storage="raw", side_px=30)
    assert pixels_of(beton, 0).shape == (30, 45, 3)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (1500, 30), (3, 7000)])
def test_extreme_shapes_are_kept(tmp_path, width, height):
    beton = build(tmp_path, {"a/1.png": png(1, width, height)}, side_px=20)
    short = min(20, width, height)
    scale = short / min(width, height)
    assert pixels_of(beton, 0).shape == (round(height * scale), round(width * scale), 3)


def test_auto_storage_is_raw_for_what_is_small_or_tiny_and_jpg_else(tmp_path, monkeypatch):
    files = {f"a/{i}.png": png(i, 100, 80) for i in range(3)}
    assert build(tmp_path, files).manifest.storage == "raw"
    monkeypatch.setattr("vitds.data.build.RAW_BYTES", 3 * 100 * 80 * 3 - 1)
    assert build(tmp_path, files).manifest.storage == "jpg"
    assert build(tmp_path, files, side_px=64).manifest.storage == "raw"


def test_means_and_deviations_are_those_of_all_stored_pixels(tmp_path):
    beton = build(tmp_path, {"a/1.png": png(1), "a/2.png": png(2, 90, 14)}, storage="raw")
    pixels = np.concatenate([photo(1).reshape(-1, 3), photo(2, 90, 14).reshape(-1, 3)]) / 255
    np.testing.assert_allclose(beton.manifest.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(beton.manifest.std, pixels.std(0), rtol=1e-9)
    assert (beton.manifest.width_px, beton.manifest.height_px) == ((40, 90), (14, 30))


def test_the_bytes_of_a_file_do_not_depend_on_the_number_of_workers(tmp_path):
    source = class_folders(tmp_path / "set", {"cat": 15, "dog": 6})
    write_folder(source, {"cat/bad.jpg": b"no", "dog/big.png": png(99, 300, 200)})
    for workers in (1, 2):
        build_beton([source], tmp_path / f"{workers}.beton", workers=workers, storage="jpg", side_px=100)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "2.beton").read_bytes()
    assert (tmp_path / "1.beton.json").read_bytes() == (tmp_path / "2.beton.json").read_bytes()


# ---------------------------------------------------------------------------------------------------- read by
# stock FFCV


def read_with_stock_ffcv(path: Path, os_cache: bool, order: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All images, indices and labels through ffcv.Loader as it comes, sorted by index."""
    loader = pytest.importorskip("ffcv.loader")
    options = {
        "num_workers": 1,
        "drop_last": False,
        "os_cache": os_cache,
        "order": loader.OrderOption[order],
        "seed": 0,
    }
    batches = [
        [part.numpy().copy() for part in batch] for batch in loader.Loader(str(path), batch_size=3, **options)
    ]
    images, index, label = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    order_of = np.argsort(index[:, 0])
    return images[order_of], index[order_of, 0], label[order_of, 0]


def test_stock_ffcv_reads_raw_files_pixel_for_pixel(tmp_path):
    beton = build(
        tmp_path,
        {"a/1.png": png(1), "a/2.png": png(2), "b/3.png": png(3), "b/bad.png": b"", "c/4.png": png(4)},
        storage="raw",
    )
    images, index, label = read_with_stock_ffcv(beton.path, True, "SEQUENTIAL")
    assert np.array_equal(images, np.stack([photo(seed) for seed in (1, 2, 3, 4)]))
    assert index.tolist() == [0, 1, 2, 3] and label.tolist() == [0, 0, 1, 2]


def test_stock_ffcv_reads_jpeg_files(tmp_path):
    beton = build(tmp_path, {f"a/{seed}.jpg": jpeg(seed) for seed in range(5)}, storage="jpg")
    images, index, _ = read_with_stock_ffcv(beton.path, True, "SEQUENTIAL")
    ours = np.stack([pixels_of(beton, i) for i in range(5)])
    assert np.abs(images.astype(int) - ours).max() <= 6  # FFCV decodes with the faster, less exact transform
    assert index.tolist() == [0, 1, 2, 3, 4]


def test_stock_ffcv_reads_images_larger_than_its_usual_page(tmp_path):
    files = {f"a/{seed}.jpg": jpeg(seed, 1800, 1700) for seed in range(4)}
    beton = build(tmp_path, files, storage="raw")
    assert beton.sizes.min() > 1 << 23
    images, _, _ = read_with_stock_ffcv(beton.path, False, "QUASI_RANDOM")  # reads page by page
    assert all(np.array_equal(images[i], pixels_of(beton, i)) for i in range(4))


def test_an_image_of_more_than_two_gibibytes_is_refused(tmp_path):
    message = (
        r"x\.beton: an image of 2147483649 bytes, FFCV's most is 2147483648\. Use `side_px` or `storage=jpg`"
    )
    with BetonWriter(tmp_path / "x.beton", 1) as writer, pytest.raises(DataError, match=message):
        writer.add(bytes((1 << 31) + 1), is_jpeg=False, height=1, width=1, label=0)


# ------------------------------------------------------------------------------------------ labels and splits


def test_test_fraction_gives_every_class_its_share(tmp_path):
    source = class_folders(tmp_path / "set", {"ant": 20, "bee": 10, "cat": 3, "dog": 1}, png)
    built = build_beton([source], tmp_path / "x.beton", test_fraction=0.2)
    train, test = (open_beton(path) for path, _ in built)
    assert [path.name for path, _ in built] == ["x-train.beton", "x-test.beton"]
    assert (np.bincount(train.labels).tolist(), np.bincount(test.labels).tolist()) == (
        [16, 8, 2, 1],
        [4, 2, 1],
    )
    assert train.manifest.classes == test.manifest.classes == ("ant", "bee", "cat", "dog")
    assert (train.manifest.split, test.manifest.split) == ("train", "test")
    assert train.manifest.findings["single"].names == ("dog",)
    pixels = {pixels_of(beton, i).tobytes() for beton in (train, test) for i in range(beton.images)}
    assert len(pixels) == 34  # none lost, none in both


def test_test_fraction_draws_the_same_images_each_time(tmp_path):
    source = class_folders(tmp_path / "set", {"ant": 20})
    hashes = [
        [
            manifest.content_hash
            for _, manifest in build_beton([source], tmp_path / "x.beton", test_fraction=0.5)
        ]
        for _ in range(2)
    ]
    assert hashes[0] == hashes[1]


def test_the_split_is_drawn_by_the_seed(tmp_path):
    source = class_folders(tmp_path / "set", {"ant": 20, "bee": 20}, png)

    def halves(**options):
        built = build_beton([source], tmp_path / "x.beton", test_fraction=0.5, **options)
        return [manifest.content_hash for _, manifest in built]

    assert halves() == halves(seed=0)
    assert halves(seed=1) == halves(seed=1) != halves()
    assert halves(seed=2) not in (halves(), halves(seed=1))


def test_seed_0_keeps_the_split_that_was_drawn_before_there_was_a_seed(tmp_path):
    source = class_folders(tmp_path / "set", {"ant": 9, "bee": 9}, png)
    (_, train), (_, test) = build_beton(
        [source], tmp_path / "x.beton", test_fraction=0.3, storage="raw", seed=0
    )
    assert train.content_hash == "sha256:f61212f99b2270f073cf7d2b8d42a01889268041ad45322a35185e6b1b50fe01"
    assert test.content_hash == "sha256:04e0d65b2640ff4b8b9f8f97d00cebd8ff4c904bcb851c9dc2bca43eb4421386"


def test_test_fraction_splits_images_without_labels(tmp_path):
    source = write_folder(tmp_path / "set", {f"{i}.png": png(i) for i in range(10)})
    assert [
        manifest.images for _, manifest in build_beton([source], tmp_path / "x.beton", test_fraction=0.3)
    ] == [7, 3]


def test_a_duplicate_in_the_other_half_is_named(tmp_path):
    source = write_folder(tmp_path / "set", {"a/1.png": png(1), "a/2.png": png(1)})
    (_, train), (_, test) = build_beton([source], tmp_path / "x.beton", test_fraction=0.5)
    assert train.findings == {} and list(test.findings) == ["leak"]
    (line,) = test.findings["leak"].names
    assert sorted(Path(name).name for name in line.split(" = ")) == ["1.png", "2.png"]


def test_a_split_whose_name_is_no_text_stands_in_the_manifest_with_escapes(tmp_path):
    split = os.fsdecode(b"\xe9t\xe9")
    source = write_folder(tmp_path / "set", {f"{split}/{name}/1.png": png(1) for name in ("a", "b")})
    ((_, manifest),) = build_beton([source], tmp_path / "x.beton", split=split)
    assert manifest.split == "\\xe9t\\xe9"


def test_copies_in_the_test_file_alone_are_duplicates(tmp_path):
    source = write_folder(tmp_path / "set", {f"a/{i}.png": png(i % 4) for i in range(12)})
    options = {"test_fraction": 0.5, "group": r"(\d+)[.]png"}
    (_, train), (_, test) = build_beton([source], tmp_path / "x.beton", **options)
    copies = {kind: found.count for kind, found in test.findings.items() if kind in ("leak", "duplicate")}
    trained = {int(Path(name).stem) % 4 for name in train.names.split("\n")}
    tested = [int(Path(name).stem) % 4 for name in test.names.split("\n")]
    leaks = sum(number in trained for number in tested)
    own = [number for number in tested if number not in trained]
    expected = {"leak": leaks, "duplicate": len(own) - len(set(own))}
    assert copies == {kind: count for kind, count in expected.items() if count}


def test_test_fraction_without_a_class_of_two_is_refused(tmp_path):
    source = class_folders(tmp_path / "set", {"ant": 1, "bee": 1})
    with pytest.raises(DataError, match=r"x\.beton: no class has two images, so `test_fraction` finds none"):
        build_beton([source], tmp_path / "x.beton", test_fraction=0.5)


def test_classes_from_another_file_number_the_labels(tmp_path):
    train = build(tmp_path / "train", {"ant/1.png": png(1), "bee/1.png": png(2), "cat/1.png": png(3)})
    test = build(tmp_path / "test", {"cat/2.png": png(4), "bee/2.png": png(5)}, classes_from=train.path)
    assert test.manifest.classes == ("ant", "bee", "cat") and test.labels.tolist() == [1, 2]


def test_classes_that_the_other_file_lacks_are_named(tmp_path):
    train = build(tmp_path / "train", {"ant/1.png": png(1)})
    with pytest.raises(
        DataError,
        match=r"set: 2 of its 3 classes are not among the 1 of .*x\.beton \(`classes_from`\), first 'bee'\.",
    ):
        build(
            tmp_path / "test",
            {"ant/1.png": png(1), "bee/1.png": png(1), "cow/1.png": png(2)},
            classes_from=train.path,
        )


def test_classes_for_images_without_labels_are_refused(tmp_path):
    train = build(tmp_path / "train", {"ant/1.png": png(1)})
    with pytest.raises(
        DataError, match=r"its images have no labels, so `classes_from` has nothing to number\. Leave it out"
    ):
        build(tmp_path / "test", {"1.png": png(1)}, classes_from=train.path)


# ------------------------------------------------------------------------------------------- options and ends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "zip"}, r"`storage=zip`: must be auto, raw or jpg\."),
        ({"side_px": 0}, r"`side_px=0`: must be from 1 to 65535\."),
        ({"quality": 101}, r"`quality=101`: must be from 1 to 100\."),
        ({"workers": 0}, r"`workers=0`: must be from 1 to 1024\."),
        ({"seed": 2**63}, r"`seed=9223372036854775808`: must be from 0 to 9223372036854775807\."),
        ({"test_fraction": 1.0}, r"`test_fraction=1\.0`: must be between 0 and 1\."),
        (
            {"classes_from": "x.beton", "sample": Sample(classes=2)},
            r"`classes_from` and `classes` exclude each other: both decide the class list",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize("name", ["x.ffcv", "x", "folder.beton"])
def test_an_out_that_is_no_beton_name_is_refused(tmp_path, name):
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(UsageError, match=rf"`out=.*{name}`: must be a file name that ends in \.beton"):
        build_beton([class_folders(tmp_path / "set", {"a": 1})], tmp_path / name)


def test_folders_on_the_way_to_out_are_made(tmp_path):
    source = class_folders(tmp_path / "set", {"a": 1})
    build_beton([source], tmp_path / "new" / "deep" / "x.beton")
    assert open_beton(tmp_path / "new" / "deep" / "x.beton").images == 1


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ResourceError,
        match=r"file/x\.beton: cannot be written \(.*\)\. Free space or permissions there, or choose",
    ):
        build_beton([class_folders(tmp_path / "set", {"a": 1})], tmp_path / "file" / "x.beton")


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    source = class_folders(tmp_path / "set", {"a": 9}, png)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, hard)
    )  # the kernel refuses longer files, as a full disk would
    try:
        with pytest.raises(ResourceError, match=r"x\.beton: cannot be written \(File too large\)"):
            build_beton([source], tmp_path / "out" / "x.beton", storage="raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_new_file_replaces_an_old_one_when_it_is_complete(tmp_path):
    first = build(tmp_path, {"a/1.png": png(1)})
    with pytest.raises(DataError):
        build(tmp_path, {"a/2.png": b"bad"}, strict=True)
    assert open_beton(first.path).images == 1
    assert build(tmp_path, {"a/2.png": png(2)}).images == 2


BUILD = """
import sys
import tarfile
from vitds.data.build import build_beton
build_beton([sys.argv[1]], sys.argv[2], storage="raw", workers=2)
"""


def partial_of(folder: Path) -> list[Path]:
    return list(folder.glob(".x.beton.*.partial"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_half_file_and_no_process(tmp_path, sent):
    source = write_folder(
        tmp_path / "set", dict.fromkeys((f"a/{i}.png" for i in range(200)), png(0, 600, 500))
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", BUILD, str(source), str(tmp_path / "out" / "x.beton")]
    here = Path(__file__).parents[2]
    process = subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1e6 for path in partial_of(tmp_path / "out")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, sent)
    process.communicate(timeout=60)  # ends only when every worker has closed its end of the pipes
    assert process.returncode != 0
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert (
        left == [] if sent != signal.SIGKILL else not any(name.endswith((".beton", ".json")) for name in left)
    )


# ------------------------------------------------------------------------------------------------------ names


def test_names_of_several_sources_begin_with_the_source(tmp_path):
    first = class_folders(tmp_path / "one", {"cat": 1}, png)
    second = class_folders(tmp_path / "two", {"cat": 1}, png, first_seed=5)
    build_beton([first, second], tmp_path / "x.beton")
    assert open_beton(tmp_path / "x.beton").names == (f"{first}/cat/000.png", f"{second}/cat/000.png")


def test_names_below_a_split_and_in_a_tar_are_those_below_the_source(tmp_path, monkeypatch):
    files = {"train/cat/1.png": png(1), "train/dog/2.png": png(2), "val/cat/3.png": png(3)}
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(write_folder(tmp_path / "set", files), arcname=".")
    monkeypatch.chdir(tmp_path / "set")
    for source in ("../set.tar", ".", str(tmp_path / "set") + "/", "../set"):
        build_beton([source], tmp_path / "x.beton", split="train")
        assert open_beton(tmp_path / "x.beton").names == ("train/cat/1.png", "train/dog/2.png")


def test_no_names_keeps_counts_alone(tmp_path):
    files = {"cat/1.png": png(1), "cat/ann.jpg": b"bad", "dog/bob.png": png(2)}
    beton = build(tmp_path, files, no_names=True)
    text = beton.path.with_name("x.beton.json").read_text()
    assert beton.names is None and "ann" not in text and "bob" not in text
    assert beton.manifest.findings["not_image"].count == 1
