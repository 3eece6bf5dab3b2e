"""The embedded digits: a fixed, class-balanced split, exact grey levels, and files that several processes may
ask for at once.
"""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vitds.data.beton import open_beton
from vitds.data.digits import build_digits, digit_images, embedded_digits
from vitds.errors import UsageError

PIXELS, TARGET = load_digits().images, load_digits().target


def test_the_halves_hold_every_digit_once_and_every_class_in_equal_parts():
    halves = {split: digit_images(split) for split in ("train", "test")}
    numbers = {split: [int(image.member) for image in half.images] for split, half in halves.items()}
    assert (len(numbers["train"]), len(numbers["test"])) == (896, 901)
    assert sorted(numbers["train"] + numbers["test"]) == list(range(1797))
    for label in range(10):
        train, test = (sum(TARGET[numbers[split]] == label) for split in ("train", "test"))
        assert test - train in (0, 1)
    for split, half in halves.items():
        assert [image.class_name for image in half.images] == [str(label) for label in TARGET[numbers[split]]]


def test_grey_levels_are_spread_over_the_whole_range():
    for image in digit_images("test").images[:50]:
        scan = PIXELS[int(image.member)]
        assert np.array_equal(image.pixels, np.repeat(np.floor(scan * 255 / 16 + 0.5)[:, :, None], 3, axis=2))
    assert {
        pixel for image in digit_images("train").images for pixel in (image.pixels.min(), image.pixels.max())
    } >= {0, 255}


def test_the_split_is_the_same_for_everyone(tmp_path):
    train, test = embedded_digits(tmp_path)
    assert (
        open_beton(train).manifest.content_hash
        == "sha256:8051820246a51eda27c4374ca673100e8f681e0a32f327c4be71ed3529a12e91"
    )
    assert (
        open_beton(test).manifest.content_hash
        == "sha256:ba16ff40b5a8062870f13a538ed098f77700de290f2f8c2dc0f51d786d325c11"
    )


def test_one_half_or_both_are_built(tmp_path):
    assert [path.name for path, _ in build_digits(tmp_path / "d.beton")] == ["d-train.beton", "d-test.beton"]
    ((path, manifest),) = build_digits(tmp_path / "d.beton", split="test")
    assert (path.name, manifest.images, manifest.split, manifest.sources) == (
        "d.beton",
        901,
        "test",
        ("digits",),
    )
    assert open_beton(path).manifest.classes == tuple("0123456789")


def test_another_split_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"`split=val`: the digits have train and test\."):
        build_digits(tmp_path / "d.beton", split="val")


def test_a_test_fraction_is_refused(tmp_path):
    with pytest.raises(
        UsageError,
        match=r"`test_fraction`: the digits have a fixed split\. Leave it out, or choose .*`split=train`",
    ):
        build_digits(tmp_path / "d.beton", test_fraction=0.5)


def test_sound_files_are_not_built_again_and_damaged_ones_are(tmp_path):
    train, test = embedded_digits(tmp_path)
    before = train.stat().st_mtime_ns
    embedded_digits(tmp_path)
    assert train.stat().st_mtime_ns == before
    test.write_bytes(test.read_bytes()[:-1])
    embedded_digits(tmp_path)
    assert open_beton(test).images == 901


def test_processes_that_ask_at_once_all_get_sound_files(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = pool.map(embedded_digits, [tmp_path / "new"] * 6, chunksize=1)
    assert len(set(paths)) == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "digits-test.beton",
        "digits-test.beton.json",
        "digits-train.beton",
        "digits-train.beton.json",
    ]
    assert [open_beton(path).images for path in paths[0]] == [896, 901]
