"""Opening a .beton: sound files give their tables, everything else a message and never a crash."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.data.built import build
from tests.data.images import class_folders, jpeg, png, write_folder
from vitds.data.beton import (
    ALLOCATION,
    FIELD,
    FIELDS,
    HEADER,
    SAMPLE,
    SAMPLES_START,
    _read_tables,
    labelled,
    open_beton,
    require_same_classes,
)
from vitds.data.build import build_beton
from vitds.data.manifest import load_manifest
from vitds.data.verify import verify_beton
from vitds.errors import DataError
from vitds.kernels.views import JPEG, RAW


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Five JPEG images of three classes."""
    folder = tmp_path_factory.mktemp("sound")
    build_beton(
        [class_folders(folder / "set", {"ant": 2, "cat": 2, "dog": 1})], folder / "x.beton", storage="jpg"
    )
    return folder / "x.beton"


@pytest.fixture
def copy(sound, tmp_path):
    """copy(change) -> the path of a copy whose bytes `change` has altered; the manifest comes along."""

    def make(change=lambda data: None) -> Path:
        data = bytearray(sound.read_bytes())
        changed = change(data)
        path = tmp_path / "x.beton"
        path.write_bytes(data if changed is None else changed)
        (tmp_path / "x.beton.json").write_bytes(sound.with_name("x.beton.json").read_bytes())
        return path

    return make


def header_of(data: bytearray) -> np.ndarray:
    """A writable view of the header's one row."""
    return np.frombuffer(data, HEADER, 1)


def samples_of(data: bytearray) -> np.ndarray:
    """A writable view of the five sample rows."""
    return np.frombuffer(data, SAMPLE, 5, SAMPLES_START)


def allocations_of(data: bytearray) -> np.ndarray:
    """A writable view of the allocation table."""
    return np.frombuffer(data, ALLOCATION, 5, int(header_of(data)["alloc_table_ptr"][0]))


def test_tables_are_those_of_ffcv():
    types = pytest.importorskip("ffcv.types")
    handlers = [types.RGBImageField(), types.IntField(), types.IntField()]
    ours = np.dtype(
        [(f"f{i}", SAMPLE[name]) for i, name in enumerate(("image", "index", "label"))], align=True
    )
    assert ours == types.get_metadata_type(handlers)
    assert (HEADER, FIELD, ALLOCATION) == (types.HeaderType, types.FieldDescType, types.ALLOC_TABLE_TYPE)
    assert [types.TYPE_ID_HANDLER[kind] for kind in (2, 1)] == [types.RGBImageField, types.IntField]


def test_storages_have_the_numbers_of_ffcv():
    modes = pytest.importorskip("ffcv.fields.rgb_image").IMAGE_MODES
    assert (JPEG, RAW) == (modes["jpg"], modes["raw"])


def test_opening_gives_every_image_its_place_size_and_label(sound):
    beton = open_beton(sound)
    data = sound.read_bytes()
    assert beton.images == 5 and beton.manifest.classes == ("ant", "cat", "dog")
    assert beton.labels.tolist() == [0, 0, 1, 1, 2] and beton.is_jpeg.all()
    assert (set(beton.heights.tolist()), set(beton.widths.tolist())) == ({30}, {40})
    stored = [data[start : start + size] for start, size in zip(beton.offsets, beton.sizes, strict=True)]
    assert stored == [jpeg(seed) for seed in range(5)]
    with pytest.raises(ValueError, match="read-only"):
        beton.labels[0] = 1


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"no\.beton: cannot be opened \(No such file or directory\)\. Build it with `vitds data build",
    ):
        open_beton(tmp_path / "no.beton")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be opened \(Is a directory\)"):
        open_beton(tmp_path)


def test_an_empty_file_is_refused(copy):
    with pytest.raises(DataError, match=r"x\.beton: the file is empty\. Build it again"):
        open_beton(copy(lambda data: b""))


@pytest.mark.parametrize("content", [b"PNG", jpeg(1), bytes(4000), b"label,image\n" * 99])
def test_a_file_of_another_kind_is_refused(copy, content):
    with pytest.raises(
        DataError, match=r"x\.beton: this is not a \.beton file\. Make one with `vitds data build"
    ):
        open_beton(copy(lambda data: content))


def test_another_format_version_is_refused(copy):
    def change(data):
        header_of(data)["version"] = 3

    with pytest.raises(
        DataError, match=r"x\.beton: format version 3, vitds reads 2 \(FFCV 1\.0\)\. Build it again"
    ):
        open_beton(copy(change))


@pytest.mark.parametrize("keep", [500, 4000, -1, -200])
def test_a_truncated_file_is_refused(copy, keep):
    with pytest.raises(
        DataError, match=r"x\.beton: (truncated: .* The file is damaged: copy it again|its fields are)"
    ):
        open_beton(copy(lambda data: data[:keep]))


def test_a_truncated_header_is_named_as_such(copy):
    with pytest.raises(DataError, match=r"x\.beton: truncated: 500 bytes end inside the header"):
        open_beton(copy(lambda data: data[:500]))


def test_a_cut_end_names_both_sizes(copy, sound):
    size = sound.stat().st_size
    with pytest.raises(
        DataError, match=rf"truncated: the header promises {size} bytes, there are {size - 1}\."
    ):
        open_beton(copy(lambda data: data[:-1]))


def test_missing_fields_are_named(copy):
    def change(data):
        fields = np.frombuffer(data, FIELD, 3, HEADER.itemsize)
        fields["name"][1] = fields["name"][2]

    with pytest.raises(
        DataError,
        match=r"its fields are 'image' \(type 2\), 'label' \(type 1\); vitds needs image, index and label",
    ):
        open_beton(copy(change))


def test_a_file_of_stock_ffcv_with_two_fields_is_refused(tmp_path):
    writer = pytest.importorskip("ffcv.writer")
    fields = pytest.importorskip("ffcv.fields")
    writer = writer.DatasetWriter(
        str(tmp_path / "two.beton"),
        {"image": fields.RGBImageField(), "label": fields.IntField()},
        num_workers=1,
    )
    writer.from_indexed_dataset([(np.zeros((4, 4, 3), np.uint8), 0)] * 3)
    with pytest.raises(
        DataError,
        match=r"two\.beton: its fields are 'image' \(type 2\), 'label' \(type 1\); vitds needs image, index",
    ):
        open_beton(tmp_path / "two.beton")


def test_no_image_is_refused(copy):
    def change(data):
        header_of(data)["num_samples"] = 0

    with pytest.raises(DataError, match="the header says that it holds no image"):
        open_beton(copy(change))


@pytest.mark.parametrize("count", [4, 6, 2**40, 2**64 - 1])
def test_a_wrong_number_of_images_is_refused(copy, count):
    def change(data):
        header_of(data)["num_samples"] = count

    with pytest.raises(
        DataError, match=r"x\.beton: (truncated: the header promises|the header's 4 images and table at byte)"
    ):
        open_beton(copy(change))


def test_a_file_that_is_cut_while_it_is_read_is_refused(copy, sound):
    data = bytearray(sound.read_bytes())
    header = {name: int(header_of(data)[name][0]) for name in HEADER.names}
    path = copy(lambda data: data[:-30])
    with (
        path.open("rb") as file,
        pytest.raises(
            DataError, match=r"x\.beton: it became shorter while it was read\. The file is damaged"
        ),
    ):
        file.seek(HEADER.itemsize)
        _read_tables(path, file, len(data), header)


SAMPLE_CHANGES = {
    "its allocation table does not name every image once": lambda s, a: a["sample_id"].__setitem__(1, 0),
    "image 1: its bytes lie outside the file's data": lambda s, a: a["ptr"].__setitem__(1, 0),
    "image 2: its bytes lie outside the file's data": lambda s, a: a["size"].__setitem__(2, 2**64 - 8),
    "image 3: its pointer differs from the allocation table's": lambda s, a: s["image"][
        "data_ptr"
    ].__setitem__(3, 2**63),
    "image 4: its storage is neither JPEG nor raw": lambda s, a: s["image"]["mode"].__setitem__(4, 2),
    "image 0: its width or height is 0": lambda s, a: s["image"]["width"].__setitem__(0, 0),
    "image 1: its size is not that of its raw pixels": lambda s, a: s["image"]["mode"].__setitem__(1, 1),
    "image 1: its bytes overlap another image's": lambda s, a: a["size"].__setitem__(
        0, a["size"][0] + np.uint64(1)
    ),
    "image 2: its index is not its position": lambda s, a: s["index"].__setitem__(2, 3),
    "image 3: its label is outside 0..2, the range of the manifest's 3 classes": lambda s, a: s[
        "label"
    ].__setitem__(3, 3),
    "image 4: its label is outside 0..2": lambda s, a: s["label"].__setitem__(4, -1),
}


@pytest.mark.parametrize("message", SAMPLE_CHANGES)
def test_a_wrong_number_in_the_tables_is_refused(copy, message):
    def change(data):
        SAMPLE_CHANGES[message](samples_of(data), allocations_of(data))

    with pytest.raises(DataError) as caught:
        open_beton(copy(change))
    assert f"x.beton: {message}" in str(caught.value)
    assert "The file is damaged: copy it again, or build it again" in str(caught.value)


def test_a_sample_across_a_pages_border_is_refused(copy):
    border = 1 << 21

    def change(data):
        header_of(data)["page_size"] = border
        table = allocations_of(data).copy()
        header_of(data)["alloc_table_ptr"] = border + 5000
        table["ptr"][4] = samples_of(data)["image"]["data_ptr"][4] = border - 10
        return data + bytes(border + 5000 - len(data)) + table.tobytes()

    with pytest.raises(DataError, match="image 4: its bytes cross a page's border"):
        open_beton(copy(change))


def test_a_missing_manifest_is_refused(copy):
    path = copy()
    path.with_name("x.beton.json").unlink()
    with pytest.raises(
        DataError,
        match=r"x\.beton\.json: the manifest of x\.beton cannot be read \(No such file.*Copy it along",
    ):
        open_beton(path)


def change_manifest(path: Path, **values: object) -> None:
    sidecar = path.with_name("x.beton.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": "many"}, r"x\.beton\.json: images: Input should be a valid integer"),
        ({"extra": 1}, r"x\.beton\.json: extra: Unexpected"),
        ({"mean": [0.1, 0.2]}, r"x\.beton\.json: mean\.2: Field required"),
        (
            {"version": 3},
            r"x\.beton\.json: manifest version 3, this vitds reads 2\. Build the file again with this vitds",
        ),
        (
            {"images": 6},
            r"x\.beton\.json: written for 6 images in \d+ bytes, x\.beton has 5 in \d+\. "
            "The two files do not belong together",
        ),
        ({"file_bytes": 7}, r"written for 5 images in 7 bytes"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, values, message):
    path = copy()
    change_manifest(path, **values)
    with pytest.raises(DataError, match=message):
        open_beton(path)


def test_the_manifest_of_another_build_of_as_many_images_and_bytes_is_refused(tmp_path):
    files = {"a/1.png": png(1), "a/2.png": png(2)}
    new, old = (
        build(tmp_path / "new", files),
        build(tmp_path / "old", dict(zip(files, [png(3), png(4)], strict=True))),
    )
    assert new.path.stat().st_size == old.path.stat().st_size
    old.path.replace(new.path)  # as if the second build had been killed after its manifest
    with pytest.raises(
        DataError, match=r"x\.beton\.json: written for other images .* do not belong together"
    ):
        open_beton(new.path)
    data = bytearray(new.path.read_bytes())  # as written before the hash stood in it
    fields = np.frombuffer(data, FIELD, len(FIELDS), HEADER.itemsize)
    fields["arguments"] = 0
    new.path.write_bytes(data)
    assert open_beton(new.path).images == 2


def test_a_manifest_that_is_no_json_is_refused(copy):
    path = copy()
    path.with_name("x.beton.json").write_bytes(b"\xff{")
    with pytest.raises(
        DataError, match=r"x\.beton\.json: the whole file: Invalid JSON.*Build the file again"
    ):
        load_manifest(path)


def test_files_with_one_class_list_agree(sound):
    assert require_same_classes(open_beton(sound), open_beton(sound)) is None  # and raises nothing


def test_files_whose_class_lists_differ_are_refused_with_the_first_difference(sound, tmp_path):
    other = write_folder(tmp_path / "set", {"ant/1.jpg": jpeg(1), "cow/1.jpg": jpeg(2)})
    build_beton([other], tmp_path / "other.beton")
    with pytest.raises(DataError) as caught:
        require_same_classes(open_beton(sound), open_beton(tmp_path / "other.beton"))
    assert str(caught.value) == (
        f"{tmp_path}/other.beton: its 2 classes are not the 3 of {sound}: "
        "class 1 is 'cow' there, 'cat' here. "
        f"Build it again with `vitds data build … --classes_from {sound}`."
    )


def mutate(data: bytearray, draw: random.Random) -> bytearray:
    """One change of the header, a table, a pointer, some bytes, or the length."""
    size = len(data)
    values = [0, 1, 2, 5, 255, 2**16 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, size, size - 1, size + 1]
    values += [draw.randrange(2**64), draw.randrange(size)]
    tables = [header_of(data), samples_of(data), samples_of(data)["image"], allocations_of(data)]
    kind = draw.randrange(10)
    if kind < 7:
        table = tables[draw.randrange(len(tables))]
        name = draw.choice([name for name in table.dtype.names if table.dtype[name].names is None])
        row = draw.randrange(len(table))
        bits = 8 * table.dtype[name].itemsize
        near = int(table[name][row]) + draw.randint(-9, 9)
        value = draw.choice([*values, near]) % 2**bits
        table[name][row] = np.array(value, f"u{bits // 8}").astype(table.dtype[name])
    elif kind < 9:
        for _ in range(draw.randint(1, 8)):
            places = [
                draw.randrange(SAMPLES_START + 160),
                draw.randrange(size),
                draw.randrange(size - 120, size),
            ]
            data[draw.choice(places)] ^= 1 << draw.randrange(8)
    else:
        at = draw.randrange(size)
        data = draw.choice([data[:at], data + data[at:], data[:at] + bytes(draw.randint(1, 64)) + data[at:]])
    return data


def test_a_thousand_mutated_files_are_refused_or_read_within_bounds(copy, sound):
    draw = random.Random(0)
    refused, pixels_changed, original = 0, 0, sound.read_bytes()
    for _ in range(1000):
        data = mutate(bytearray(original), draw)
        path = copy(lambda _, data=data: data)
        try:
            beton = open_beton(path)
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        start, table = (
            SAMPLES_START + beton.images * SAMPLE.itemsize,
            int(header_of(data)["alloc_table_ptr"][0]),
        )
        assert beton.images == 5 and set(beton.labels.tolist()) <= {0, 1, 2}
        assert (
            (beton.offsets >= start).all()
            and (beton.sizes > 0).all()
            and (beton.offsets + beton.sizes <= table).all()
        )
        pixels_changed += not verify_beton(path, workers=1).is_sound  # decodes every sample in compiled code
    assert refused > 500 and pixels_changed > 50


# ------------------------------------------------------------------------- names, and images without a label


def without_label(data: bytearray) -> None:
    """The last two of the five images lose theirs."""
    samples_of(data)["label"][3:] = -1


def test_images_without_a_label_stand_beside_others_where_the_manifest_says_how_many(copy):
    path = copy(without_label)
    change_manifest(path, unlabelled=2)
    beton = open_beton(path)
    assert beton.labels.tolist() == [0, 0, 1, -1, -1]


@pytest.mark.parametrize("counted", [0, 1, 3])
def test_a_label_that_is_missing_without_being_counted_is_refused(copy, counted):
    path = copy(without_label)
    change_manifest(path, unlabelled=counted)
    with pytest.raises(DataError, match=r"its label is outside 0\.\.2|do not belong together"):
        open_beton(path)


def test_the_labelled_images_are_a_file_of_their_own(copy, sound):
    path = copy(without_label)
    change_manifest(path, unlabelled=2)
    part = labelled(open_beton(path))
    assert (part.images, part.labels.tolist(), part.index.tolist()) == (3, [0, 0, 1], [0, 1, 2])
    whole = open_beton(sound)
    assert labelled(whole) is whole


def test_names_are_the_paths_below_the_source_and_follow_the_images(sound):
    beton = open_beton(sound)
    assert beton.names == ("ant/000.jpg", "ant/001.jpg", "cat/000.jpg", "cat/001.jpg", "dog/000.jpg")
    part = beton.take(np.array([4, 1]))
    assert part.names == ("dog/000.jpg", "ant/001.jpg")
    assert part.describe(0) == "image 4 (dog/000.jpg)"
    assert part.take(np.array([1])).describe(0) == "image 1 (ant/001.jpg)"


def test_a_manifest_with_too_few_names_is_refused(copy):
    path = copy()
    change_manifest(path, names="a\nb")
    with pytest.raises(DataError, match=r"0 images without a label and names 2, .* do not belong together"):
        open_beton(path)


def test_a_manifest_of_version_1_has_no_names(copy):
    path = copy()
    sidecar = path.with_name("x.beton.json")
    new = json.loads(sidecar.read_text())
    old = {key: new[key] for key in new if key not in ("names", "unlabelled", "grouped")}
    sidecar.write_text(json.dumps(old | {"version": 1}))
    beton = open_beton(path)
    assert beton.names is None and beton.describe(3) == "image 3"
