"""Groups stay whole, classes keep their shares, folds cover everything once; near-duplicates are found."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.images import class_folders, encode, photo, png, write_folder
from tests.data.small_files import picture
from vitds.data import likeness
from vitds.data.beton import BetonFile, open_beton
from vitds.data.build import build_beton
from vitds.data.findings import TEST_GROUP, Findings
from vitds.data.likeness import LOOK_PX, look_of, nearest_looks
from vitds.data.sampling import Sample
from vitds.data.sources import ImageSet
from vitds.data.split import split_folds, split_once
from vitds.data.trees import SourceImage
from vitds.errors import DataError, UsageError

OUT = Path("x.beton")


def image_set(rows: list[tuple[str | None, str | None]]) -> ImageSet:
    """(class, group) an image."""
    images = [SourceImage(str(i), str(i), name, group=group) for i, (name, group) in enumerate(rows)]
    return ImageSet(images, tuple(sorted({name for name, _ in rows if name})), ("set",))


def patients(seed: int, groups: int = 120) -> ImageSet:
    """Groups of 1 to 9 images, each mostly of one of three unequal classes."""
    draw = np.random.default_rng(seed)
    rows = []
    for group in range(groups):
        usual = draw.choice(3, p=(0.6, 0.3, 0.1))
        for _ in range(draw.integers(1, 10)):
            rows.append(("abc"[usual if draw.random() < 0.8 else draw.integers(3)], f"p{group}"))
    return image_set(rows)


def groups_of(images: ImageSet, chosen) -> set[str | None]:
    return {images.images[i].group for i in chosen}


@pytest.mark.parametrize("seed", range(3))
def test_a_split_keeps_groups_whole_and_every_class_near_its_share(seed):
    images, findings = patients(seed), Findings()
    train, test = split_once(images, OUT, 0.2, seed, findings)
    assert sorted([*train.chosen, *test.chosen]) == list(range(len(images.images)))
    assert not groups_of(images, train.chosen) & groups_of(images, test.chosen)
    whole = Counter(image.class_name for image in images.images)
    own = Counter(images.images[i].class_name for i in test.chosen)
    for name in images.classes:
        assert 0.15 < own[name] / whole[name] < 0.25, name
    assert findings.counts == {}


@pytest.mark.parametrize("seed", range(3))
def test_folds_test_each_image_once_and_keep_groups_and_shares(seed):
    images = patients(seed)
    pairs = split_folds(images, OUT, 5, seed, Findings())
    tested = [i for _, test in pairs for i in test.chosen]
    assert sorted(tested) == list(range(len(images.images)))
    whole = Counter(image.class_name for image in images.images)
    for train, test in pairs:
        assert sorted([*train.chosen, *test.chosen]) == list(range(len(images.images)))
        assert not groups_of(images, train.chosen) & groups_of(images, test.chosen)
        own = Counter(images.images[i].class_name for i in test.chosen)
        assert all(0.13 < own[name] / whole[name] < 0.27 for name in images.classes)
    assert [part.out.name for part in pairs[1]] == ["x-fold2-train.beton", "x-fold2-test.beton"]


def test_folds_without_groups_give_each_class_evenly_and_are_drawn_by_the_seed():
    images = image_set([("a", None)] * 23 + [("b", None)] * 12)
    folds = split_folds(images, OUT, 5, 0, Findings())
    counts = [Counter(images.images[i].class_name for i in test.chosen) for _, test in folds]
    assert {count["a"] for count in counts} == {4, 5} and {count["b"] for count in counts} == {2, 3}
    assert {sum(count.values()) for count in counts} == {7}
    again, other = (split_folds(images, OUT, 5, seed, Findings()) for seed in (0, 1))
    assert [part.chosen for _, part in again] == [part.chosen for _, part in folds]
    assert [part.chosen for _, part in other] != [part.chosen for _, part in folds]


def test_images_without_a_label_are_for_training_unless_their_group_is_tested():
    rows = (
        [("a", f"p{i // 2}") for i in range(20)] + [(None, f"p{i}") for i in range(10)] + [(None, None)] * 5
    )
    images, findings = image_set(rows), Findings()
    train, test = split_once(images, OUT, 0.3, 0, findings)
    assert findings.names[TEST_GROUP] == [str(i) for i in test.chosen if i >= 20]
    assert not (groups_of(images, train.chosen) & groups_of(images, test.chosen)) - {None}
    assert set(range(30, 35)) <= set(train.chosen)
    assert len([i for i in test.chosen if i < 20]) == 6 and len(test.chosen) == 9
    findings = Findings()
    for train, _ in split_folds(images, OUT, 2, 0, findings):
        assert set(range(30, 35)) <= set(train.chosen)
    assert findings.counts[TEST_GROUP] == 10


def test_groups_that_are_too_large_or_of_one_class_are_named():
    findings = Findings()
    rows = [("a", "p1")] * 9 + [("b", "p2")] * 9 + [("a", "p3"), ("b", "p3")]
    split_once(image_set(rows), OUT, 0.4, 0, findings)
    assert findings.counts.keys() <= {"one_sided", "share_missed"} and findings.counts
    with pytest.raises(DataError, match=r"the images are of 1 groups, .* A share of 0\.4 needs more and"):
        split_once(image_set([("a", "p")] * 9), OUT, 0.4, 0, Findings())


def test_too_few_images_or_groups_for_the_folds_are_refused_and_small_classes_named():
    with pytest.raises(DataError, match=r"x\.beton: `folds=5` needs as many images, there are 3"):
        split_folds(image_set([("a", None)] * 3), OUT, 5, 0, Findings())
    with pytest.raises(DataError, match=r"`folds=3` needs as many groups, there are 2"):
        split_folds(image_set([("a", "p"), ("b", "q")] * 5), OUT, 3, 0, Findings())
    findings = Findings()
    split_folds(image_set([("a", None)] * 9 + [("b", None)] * 2), OUT, 3, 0, findings)
    assert findings.names == {"fold_lacks": ["b"]}


# ------------------------------------------------------------------------------------------ through the build


def opened(built) -> list[BetonFile]:
    return [open_beton(path) for path, _ in built]


def test_the_manifest_says_by_what_the_split_was_grouped(tmp_path):
    files = {f"{name}/p{i % 5}_{i}.png": png(10 * i + ord(name)) for name in "ab" for i in range(10)}
    source = write_folder(tmp_path / "set", files)
    train, test = opened(
        build_beton([source], tmp_path / "x.beton", test_fraction=0.4, group=r"(p\d)_", workers=1)
    )
    assert (train.manifest.grouped.by, test.manifest.grouped.by) == (r"(p\d)_",) * 2
    assert train.manifest.grouped.groups + test.manifest.grouped.groups == 5
    sides = [{name.split("/")[1][:2] for name in beton.names} for beton in (train, test)]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("column", [False, True])
def test_unlabelled_images_go_where_their_group_goes_and_those_of_none_are_counted(tmp_path, column):
    files = {f"{name}/p{i % 5}_{i}.png": png(10 * i + ord(name)) for name in "ab" for i in range(10)}
    more = {f"p{i}_u.png": png(200 + i) for i in range(5)} | {"odd.png": png(210)}
    table = tmp_path / "t.csv"
    rows = [f"{name},{name[0]},{'' if name[2:4] == 'p4' else name[2:4]}" for name in files]
    table.write_text("\n".join(["file,label,patient", *rows]))
    options = {"labels": table, "group": "patient"} if column else {"group": r"(p\d)_"}
    train, test = opened(
        build_beton(
            [write_folder(tmp_path / "set", files)],
            tmp_path / "x.beton",
            unlabelled=write_folder(tmp_path / "more", more),
            test_fraction=0.4,
            **options,
        )
    )
    groupless = train.manifest.findings["groupless"]
    if column:  # the table says nothing of the unlabelled ones, and of no image of p4
        assert groupless.count == len(more) + 4 and train.manifest.unlabelled == len(more)
        return
    sides = [{Path(name).name[:2] for name in beton.names} for beton in (train, test)]
    assert not sides[0] & sides[1] and test.manifest.unlabelled == len(sides[1]) == 2
    assert train.manifest.findings[TEST_GROUP].count == 2 and groupless.names[0].endswith("odd.png")


def test_a_sample_decides_the_training_images_and_leaves_the_test_file_whole(tmp_path):
    source = class_folders(tmp_path / "set", {"ant": 10, "bee": 10, "cat": 10}, png)
    whole = opened(build_beton([source], tmp_path / "w.beton", test_fraction=0.3))
    some = opened(
        build_beton([source], tmp_path / "s.beton", test_fraction=0.3, sample=Sample(per_class=2, seed=1))
    )
    assert np.bincount(some[0].labels).tolist() == [2, 2, 2] and set(some[0].names) < set(whole[0].names)
    assert some[1].manifest.content_hash == whole[1].manifest.content_hash
    (two,) = opened(build_beton([source], tmp_path / "c.beton", sample=Sample(classes=2, total=7)))
    assert two.images == 7 and len(two.manifest.classes) == 2


def test_a_sample_a_class_of_images_without_labels_is_refused(tmp_path):
    source = write_folder(tmp_path / "set", {"1.png": png(1), "2.png": png(2)})
    with pytest.raises(UsageError, match=r"`per_class`: the images have no labels\. Draw with `total`"):
        build_beton([source], tmp_path / "x.beton", sample=Sample(per_class=1))
    (one,) = opened(build_beton([source], tmp_path / "x.beton", sample=Sample(total=1)))
    assert one.images == 1


def test_a_sample_a_class_keeps_the_images_without_a_label(tmp_path):
    source = class_folders(tmp_path / "set", {"ant": 4, "bee": 4}, png)
    more = write_folder(tmp_path / "more", {"1.png": png(91), "2.png": png(92)})
    built = build_beton([source], tmp_path / "x.beton", unlabelled=more, sample=Sample(per_class=1))
    assert opened(built)[0].labels.tolist() == [0, 1, -1, -1]


# ------------------------------------------------------------------------------------------- near-duplicates


def changed(pixels: np.ndarray, change: str) -> np.ndarray:
    image = Image.fromarray(pixels)
    if change == "resized":
        image = image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.BICUBIC)
    elif change == "encoded":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=30)
        image = Image.open(file)
    elif change == "darker":
        image = image.point(lambda level: level * 0.7)
    return np.asarray(image)


@pytest.mark.parametrize("change", ["resized", "encoded", "darker"])
def test_a_photograph_is_found_again_after_a_change_and_others_are_not(change):
    photographs = [picture(number, 120, 150) for number in range(30)]
    looks = [look_of(changed(pixels, change)) for pixels in photographs[::3]]
    found = nearest_looks(looks, [look_of(pixels) for pixels in photographs])
    assert found.tolist() == list(range(0, 30, 3))
    others = [look_of(picture(number, 120, 150)) for number in range(40, 60)]
    assert (nearest_looks(others, looks) == -1).all()


def test_pairs_are_compared_in_blocks_and_the_last_of_the_most_alike_is_found(monkeypatch):
    draw = np.random.default_rng(0)
    scene = draw.uniform(60, 200, (LOOK_PX, LOOK_PX))  # of a fixed camera: all are alike
    looks = [(scene + draw.normal(0, 9, scene.shape)).astype(np.uint8).tobytes() for _ in range(70)]
    others = looks[:20] + [look_of(photo(1))] + looks[10:30]
    whole = nearest_looks(looks, others)
    assert whole[:30].tolist() == [*range(10), *range(21, 41)]
    monkeypatch.setattr(likeness, "BLOCK", (16, 8))
    monkeypatch.setattr(likeness, "PAIRS", 30)
    assert (nearest_looks(looks, others) == whole).all()
    parts = likeness._proposed(*(likeness._hashes(likeness._grey(half)) for half in (looks, others)))
    assert max(len(rows) for rows, _ in parts) == 30


def test_blank_images_and_empty_halves_are_like_nothing():
    blank = look_of(np.full((9, 9, 3), 200, np.uint8))
    assert len(blank) == LOOK_PX**2
    assert nearest_looks([blank], [blank, look_of(photo(1))]).tolist() == [-1]
    assert nearest_looks([], [blank]).tolist() == [] and nearest_looks([blank], []).tolist() == [-1]


def test_a_near_duplicate_across_the_split_is_counted_and_named_in_the_test_file(tmp_path):
    files = {f"a/{i}.png": encode(picture(i, 60, 80), "PNG") for i in range(8)}
    files |= {f"a/{i}_again.jpg": encode(picture(i, 60, 80), "JPEG", quality=60) for i in range(8)}
    source = write_folder(tmp_path / "set", files)
    (_, train), (_, test) = build_beton([source], tmp_path / "x.beton", test_fraction=0.25)
    assert "near_duplicate" not in train.findings and test.findings["near_duplicate"].count > 0
    for line in test.findings["near_duplicate"].names:
        tested, trained = (Path(name).name.split(".")[0].removesuffix("_again") for name in line.split(" ~ "))
        assert tested == trained
    with pytest.raises(DataError, match=r"`strict`: .*looks almost like an image of the training file"):
        build_beton([source], tmp_path / "y.beton", test_fraction=0.25, strict=True)
