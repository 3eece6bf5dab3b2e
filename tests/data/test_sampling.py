"""Small sets out of large ones: the numbers asked for, the same each time, and a list that gives the same set
back.
"""

from __future__ import annotations

from collections import Counter

import pytest

from vitds.data.sampling import Sample, draw_sample, keep_classes, write_list
from vitds.data.sources import ImageSet
from vitds.data.trees import SourceImage
from vitds.errors import DataError, UsageError

CLASSES = tuple(f"n{i:03d}" for i in range(40))


@pytest.fixture
def whole() -> ImageSet:
    """40 classes with 12 to 14 images each."""
    members = [(name, f"{name}/{j}.JPEG") for i, name in enumerate(CLASSES) for j in range(12 + i % 3)]
    return ImageSet(
        [SourceImage(f"/data/{member}", member, name) for name, member in members],
        CLASSES,
        ("/data",),
        "train",
    )


def members(images: ImageSet) -> list[str]:
    return [image.member for image in images.images]


def test_so_many_images_of_each_class(whole):
    small = draw_sample(whole, Sample(per_class=10))
    assert Counter(image.class_name for image in small.images) == dict.fromkeys(CLASSES, 10)
    assert small.classes == CLASSES and len(set(members(small))) == 400


def test_so_many_classes_with_all_their_images(whole):
    small = draw_sample(whole, Sample(classes=7))
    assert len(small.classes) == 7 and list(small.classes) == sorted(small.classes)
    assert members(small) == [member for member in members(whole) if member.split("/")[0] in small.classes]


def test_so_many_images_of_the_whole_pool(whole):
    small = draw_sample(whole, Sample(total=100))
    assert len(small.images) == 100
    assert (
        len(set(Counter(image.class_name for image in small.images).values())) > 1
    )  # not balanced, by intent


def test_classes_are_drawn_before_images(whole):
    small = draw_sample(whole, Sample(classes=5, per_class=3))
    assert (
        Counter(image.class_name for image in small.images) == dict.fromkeys(small.classes, 3)
        and len(small.classes) == 5
    )
    assert len(draw_sample(whole, Sample(classes=5, total=11)).images) == 11


def test_a_sample_keeps_the_order_of_the_whole_set(whole):
    order = {member: i for i, member in enumerate(members(whole))}
    for sample in (Sample(per_class=4), Sample(classes=9), Sample(total=50)):
        places = [order[member] for member in members(draw_sample(whole, sample))]
        assert places == sorted(places)


def test_a_sample_is_a_function_of_the_seed(whole):
    drawn = {
        seed: [members(draw_sample(whole, Sample(per_class=5, seed=seed))) for _ in range(2)]
        for seed in (0, 1)
    }
    assert drawn[0][0] == drawn[0][1] and drawn[1][0] == drawn[1][1] and drawn[0][0] != drawn[1][0]


def test_classes_draw_independently_of_each_other(whole):
    small = draw_sample(whole, Sample(per_class=4))
    chosen = {
        name: tuple(member.split("/")[1] for member in members(small) if member.startswith(name))
        for name in CLASSES
    }
    assert len(set(chosen.values())) > 20


@pytest.mark.parametrize("sample", [Sample(per_class=3, seed=5), Sample(classes=4), Sample(total=20)])
def test_a_list_gives_the_same_sample_back(whole, sample, tmp_path):
    small = draw_sample(whole, sample)
    write_list(small, tmp_path / "x.list")
    again = draw_sample(whole, Sample(list=tmp_path / "x.list"))
    assert (members(again), again.classes) == (members(small), small.classes)


def test_a_test_file_keeps_the_drawn_classes_only(whole):
    kept = keep_classes(whole, draw_sample(whole, Sample(classes=3)).classes)
    assert {image.class_name for image in kept.images} == set(kept.classes) and len(kept.classes) == 3


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(per_class=13), r"13 images of n000 are asked for, there are 12\. Ask for fewer\."),
        (Sample(classes=41), r"41 classes are asked for, there are 40\."),
        (Sample(total=10_000), r"10000 images are asked for, there are 519\."),
    ],
)
def test_more_than_there_is_is_refused(whole, sample, message):
    with pytest.raises(DataError, match=message):
        draw_sample(whole, sample)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_class": 0}, r"`per_class=0`: must be at least 1\."),
        ({"classes": -1}, r"`classes=-1`: must be at least 1\."),
        ({"total": 1, "seed": -1}, r"`seed=-1`: must be from 0 to 9223372036854775807\."),
        ({"per_class": 1, "total": 1}, r"`per_class` and `total` exclude each other"),
        (
            {"list": "x", "total": 1},
            r"`list` names the images, so `classes`, `per_class` and `total` have nothing to draw",
        ),
    ],
)
def test_samples_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Sample(**values)


def test_a_missing_list_is_refused(whole, tmp_path):
    with pytest.raises(DataError, match=r"`list=.*x\.list`: cannot be read \(.*No such file"):
        draw_sample(whole, Sample(list=tmp_path / "x.list"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n000/0.JPEG\nn000/99.JPEG\n", "1 of its 2 images are not in the set, first n000/99.JPEG"),
        ("\n", "it names no image"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(whole, tmp_path, text, message):
    (tmp_path / "x.list").write_text(text)
    with pytest.raises(
        DataError,
        match=rf"`list=.*x\.list`: {message}.*Give a list that a build of this set and split has written",
    ):
        draw_sample(whole, Sample(list=tmp_path / "x.list"))
