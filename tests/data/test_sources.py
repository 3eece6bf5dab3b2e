"""Which images a folder or tar is found to hold, in which order, under which class names."""

from __future__ import annotations

import io
import os
import random
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.data.images import class_folders, jpeg, png, tar_member, write_folder, write_tar
from vitds.data.archives import list_members
from vitds.data.findings import Findings
from vitds.data.images import read_bytes
from vitds.data.sources import ImageSet, SourceOptions, scan_sources
from vitds.errors import DataError, UsageError

SOME = {"cat/b.jpg": b"1", "cat/a.JPG": b"2", "ant/x/deep.png": b"3", "ant/z.jpeg": b"4"}
ORDER = ["ant/x/deep.png", "ant/z.jpeg", "cat/a.JPG", "cat/b.jpg"]


@pytest.fixture
def scan(tmp_path: Path):
    """scan(source, ..., split=None) -> (ImageSet, Findings)"""
    workspace = tmp_path / "workspace"
    workspace.mkdir()

    def scan_them(*sources: Path, split: str | None = None) -> tuple[ImageSet, Findings]:
        findings = Findings()
        return scan_sources(sources, findings, workspace, SourceOptions(split=split)), findings

    return scan_them


def members(images: ImageSet) -> list[str]:
    return [image.member for image in images.images]


def test_images_are_sorted_by_class_name_then_by_path(tmp_path, scan):
    images, findings = scan(write_folder(tmp_path / "set", SOME))
    assert members(images) == ORDER
    assert images.classes == ("ant", "cat")
    assert [image.class_name for image in images.images] == ["ant", "ant", "cat", "cat"]
    assert findings.counts == {}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_found_to_hold_what_its_folder_holds(tmp_path, scan, mode):
    suffix = ".tar" + mode[1:].replace(":", ".")
    images, _ = scan(
        write_tar(tmp_path / f"set{suffix}", {f"./{name}": data for name, data in SOME.items()}, mode)
    )
    assert members(images) == ORDER
    assert [read_bytes(image) for image in images.images] == [SOME[name] for name in ORDER]


def test_a_plain_tar_may_begin_with_the_letters_of_a_compression(tmp_path, scan):
    images, _ = scan(write_tar(tmp_path / "set.tar", {"BZh9/a.jpg": b"1", "cat/b.jpg": b"2"}))
    assert images.classes == ("BZh9", "cat")


def test_the_folder_that_a_tar_was_made_of_is_no_class(tmp_path, scan):
    images, _ = scan(write_tar(tmp_path / "set.tar", {f"set/{name}": data for name, data in SOME.items()}))
    assert images.classes == ("ant", "cat")


def test_a_tar_made_of_a_folder_itself_is_read(tmp_path, scan):
    source = write_folder(tmp_path / "set", SOME)
    (source / "empty").mkdir()
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(source, arcname=".")
    images, findings = scan(tmp_path / "set.tar")
    assert members(images) == ORDER
    assert findings.names == {"empty_class": [f"{tmp_path}/set.tar/empty"]}


def test_a_flat_folder_has_no_labels(tmp_path, scan):
    images, _ = scan(write_folder(tmp_path / "flat", {"b.png": b"", "a.jpg": b""}))
    assert members(images) == ["a.jpg", "b.png"] and images.classes == ()
    assert {image.class_name for image in images.images} == {None}


def test_sources_are_joined_by_class_name(tmp_path, scan):
    first = write_folder(tmp_path / "one", {"cat/1.jpg": b"", "dog/1.jpg": b""})
    second = write_tar(tmp_path / "two.tar", {"cat/0.jpg": b"", "ant/9.jpg": b""})
    images, _ = scan(first, second)
    assert members(images) == ["ant/9.jpg", "cat/0.jpg", "cat/1.jpg", "dog/1.jpg"]
    assert images.sources == (str(first), str(second))


def test_a_class_name_written_in_two_unicode_forms_is_one_class(tmp_path, scan):
    composed = write_folder(tmp_path / "a", {"caf\u00e9/1.jpg": b"", "花/1.jpg": b""})
    images, _ = scan(composed, write_folder(tmp_path / "b", {"cafe\u0301/2.jpg": b""}))
    assert images.classes == ("caf\u00e9", "花")


def test_class_folders_that_differ_by_case_are_merged_or_kept_as_a_person_says(tmp_path):
    one = write_folder(tmp_path / "one", {"Cat/1.jpg": b"", "Cat/2.jpg": b"", "dog/1.jpg": b""})
    two = write_folder(tmp_path / "two", {"cat/1.jpg": b"", "dog /2.jpg": b"", " /3.jpg": b""})

    def classes(alike: str | None) -> tuple[str, ...]:
        return scan_sources([one, two], Findings(), tmp_path, SourceOptions(alike=alike)).classes

    with pytest.raises(DataError, match=r"'Cat' \(2 images\), 'cat' \(1 images\)\. Say with `alike=merge`"):
        classes(None)
    assert classes("merge") == (" ", "Cat", "dog") and classes("keep") == (" ", "Cat", "cat", "dog", "dog ")
    with pytest.raises(UsageError, match=r"`alike=keep` does nothing here: .* has no class folders"):
        scan_sources([one / "Cat"], Findings(), tmp_path, SourceOptions(alike="keep"))


def test_a_name_that_is_no_text_is_shown_with_escapes(tmp_path, scan):
    folder = os.fsencode(tmp_path / "set") + b"/caf\xe9"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/a\n\x1b.jpg")).write_bytes(b"")
    images, _ = scan(tmp_path / "set")
    assert images.classes == ("caf\\xe9",)
    assert members(images) == ["caf\\xe9/a\\n\\x1b.jpg"]


def test_split_takes_the_folder_of_that_name(tmp_path, scan):
    files = {"train/cat/1.jpg": b"", "train/dog/2.jpg": b"", "val/cat/3.jpg": b""}
    for source in (
        write_folder(tmp_path / "set", files),
        write_tar(tmp_path / "set.tar", {f"wrap/{name}": b"" for name in files}),
    ):
        images, _ = scan(source, split="train")
        assert (
            members(images) == ["cat/1.jpg", "dog/2.jpg"]
            and images.classes == ("cat", "dog")
            and images.split == "train"
        )


def test_an_unknown_split_is_refused_with_what_there_is(tmp_path, scan):
    source = write_folder(tmp_path / "set", {"train/cat/1.jpg": b"", "val/cat/3.jpg": b""})
    with pytest.raises(
        DataError,
        match=r"set: there is no folder 'test' with images in it to take as `split`; there are train, val",
    ):
        scan(source, split="test")


def test_files_that_are_no_images_are_counted_and_hidden_ones_passed_over(tmp_path, scan):
    names = ("cat/1.jpg", "cat/notes.txt", "cat/Thumbs.db", "cat/.DS_Store", "cat/._1.jpg")
    source = write_folder(tmp_path / "set", dict.fromkeys(names, b""))
    images, findings = scan(source)
    assert members(images) == ["cat/1.jpg"] and images.classes == ("cat",)
    assert findings.names == {"other_file": [f"{source}/cat/Thumbs.db", f"{source}/cat/notes.txt"]}


def test_empty_class_folders_and_images_beside_class_folders_are_named(tmp_path, scan):
    source = write_folder(tmp_path / "set", {"cat/1.jpg": b"", "stray.jpg": b"", "dog/readme": b""})
    (source / "eel").mkdir()
    images, findings = scan(source)
    assert images.classes == ("cat",)
    assert findings.names["empty_class"] == [f"{source}/dog", f"{source}/eel"]
    assert findings.names["unlabelled"] == [f"{source}/stray.jpg"]


def test_links_are_followed_and_those_that_lead_out_are_named(tmp_path, scan):
    source = class_folders(tmp_path / "set", {"cat": 1})
    outside = write_folder(tmp_path / "outside", {"far.jpg": b"", "more/1.jpg": b""})
    (source / "cat" / "far.jpg").symlink_to(outside / "far.jpg")
    (source / "dog").symlink_to(outside / "more")
    (source / "cat" / "near.jpg").symlink_to("000.jpg")
    images, findings = scan(source)
    assert members(images) == ["cat/000.jpg", "cat/far.jpg", "cat/near.jpg", "dog/1.jpg"]
    assert findings.counts == {"link_outside": 2}
    assert sorted(findings.names["link_outside"]) == [
        f"{source}/cat/far.jpg -> {outside}/far.jpg",
        f"{source}/dog -> {outside}/more",
    ]


def test_links_to_nowhere_and_in_circles_are_left_out(tmp_path, scan):
    source = class_folders(tmp_path / "set", {"cat": 1})
    (source / "cat" / "dead.jpg").symlink_to("gone.jpg")
    (source / "cat" / "round").symlink_to(source)
    (source / "cat" / "self.jpg").symlink_to("self.jpg")
    (source / "cat" / ".hidden").symlink_to(".hidden")
    images, findings = scan(source)
    assert members(images) == ["cat/000.jpg"]
    assert sorted(findings.names["dead_link"]) == [
        f"{source}/cat/dead.jpg -> gone.jpg",
        f"{source}/cat/round -> {source}",
        f"{source}/cat/self.jpg -> self.jpg",
    ]


def test_a_folder_that_cannot_be_read_is_named(scan):
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # not under tmp_path, whose parents are for their owner alone
        os.chmod(folder, 0o755)
        source = class_folders(Path(folder) / "set", {"cat": 1, "dog": 1})
        (source / "dog").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root reads every folder
        try:
            images, findings = scan(source)
        finally:
            os.seteuid(user)
        (source / "dog").chmod(0o700)
    assert members(images) == ["cat/000.jpg"]
    assert findings.names == {
        "unreadable": [f"{source}/dog (Permission denied)"],
        "empty_class": [f"{source}/dog"],
    }


def test_tar_members_that_lead_outside_and_links_are_refused(tmp_path, scan):
    extra = [
        tar_member("cat/l.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        tar_member("cat/h.jpg", tarfile.LNKTYPE, "/etc/passwd"),
        tar_member("cat/u.jpg", tarfile.SYMTYPE, "../../cat/1.jpg"),
    ]
    source = write_tar(
        tmp_path / "set.tar",
        {"cat/1.jpg": b"", "../up.jpg": b"", "/root.jpg": b"", "cat/../../x.jpg": b""},
        extra=extra,
    )
    images, findings = scan(source)
    assert members(images) == ["cat/1.jpg"]
    assert findings.names["archive_link"] == [f"{source}:cat/{name}.jpg" for name in "lhu"]
    assert findings.names["archive_outside"] == [
        f"{source}:../up.jpg",
        f"{source}:/root.jpg",
        f"{source}:cat/../../x.jpg",
    ]


def test_links_within_a_tar_are_images_as_they_are_in_its_folder(tmp_path, scan):
    source = write_folder(tmp_path / "set", {"cat/b.jpg": b"1", "dog/d.jpg": b"2"})
    os.link(source / "cat/b.jpg", source / "dog/a_hard_link.jpg")
    (source / "cat" / "a.jpg").symlink_to("b.jpg")
    (source / "dog" / "e.jpg").symlink_to("../cat/b.jpg")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(source, arcname="set")
    (of_folder, odd), (of_tar, odd_too) = scan(source), scan(tmp_path / "set.tar")
    assert members(of_tar) == members(of_folder) and len(of_tar.images) == 5
    assert [read_bytes(image) for image in of_tar.images] == [read_bytes(image) for image in of_folder.images]
    assert odd.counts == odd_too.counts == {}


def test_links_to_links_are_images_in_any_order_and_circles_are_none(tmp_path, scan):
    links = {"a.jpg": "b.jpg", "b.jpg": "c.jpg", "c.jpg": "z.jpg", "d.jpg": "c.jpg"}
    links |= {"e.jpg": "f.jpg", "f.jpg": "g.jpg", "g.jpg": "f.jpg", "h.jpg": "h.jpg", "i.jpg": "../../z.jpg"}
    extra = [tar_member(f"cat/{name}", tarfile.SYMTYPE, target) for name, target in links.items()]
    source = write_tar(tmp_path / "set.tar", {"cat/z.jpg": b"1"}, extra=extra)
    images, findings = scan(source)
    assert members(images) == [f"cat/{letter}.jpg" for letter in "abcdz"]
    assert {read_bytes(image) for image in images.images} == {b"1"}
    assert findings.names == {"archive_link": [f"{source}:cat/{letter}.jpg" for letter in "efghi"]}


def test_of_two_members_of_one_path_the_last_is_taken_and_named(tmp_path, scan):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, data in (("a", b"1"), ("a", b"2"), ("b", b"3"), ("c", b"4")):
            info = tarfile.TarInfo(f"cat/{name}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(tar_member("cat/b.jpg", tarfile.SYMTYPE, "c.jpg"))
        tar.addfile(tar_member("cat/c.jpg", tarfile.LNKTYPE, "cat/c.jpg"))
    images, findings = scan(tmp_path / "set.tar")
    assert [read_bytes(image) for image in images.images] == [b"2", b"4", b"4"]
    assert findings.names == {"archive_twice": [f"{tmp_path}/set.tar:cat/{letter}.jpg" for letter in "abc"]}


def test_pipes_and_devices_are_no_images(tmp_path, scan):
    source = class_folders(tmp_path / "set", {"cat": 1})
    os.mkfifo(source / "cat" / "pipe.jpg")
    packed = write_tar(
        tmp_path / "set.tar", {"cat/1.jpg": b""}, extra=[tar_member("cat/pipe.jpg", tarfile.FIFOTYPE)]
    )
    assert members(scan(source)[0]) == ["cat/000.jpg"]
    assert members(scan(packed)[0]) == ["cat/1.jpg"]


def test_the_later_of_two_tar_members_of_one_name_counts(tmp_path, scan):
    source = write_tar(tmp_path / "set.tar", {"cat/1.jpg": b"old"})
    write_tar(source, {"cat/1.jpg": b"new"}, "a")
    assert [read_bytes(image) for image in scan(source)[0].images] == [b"new"]


@pytest.mark.parametrize("keep", [700, 2000, 2700])
def test_a_tar_that_was_cut_short_is_refused(tmp_path, scan, keep):
    source = write_tar(tmp_path / "set.tar", {"cat/1.jpg": bytes(1000), "cat/2.jpg": bytes(2000)})
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(
        DataError,
        match=r"set\.tar: (not a tar|damaged at byte|cut short inside).*Fetch or make the archive again",
    ):
        scan(source)


def test_a_tar_with_a_damaged_header_in_its_middle_is_refused(tmp_path, scan):
    source = write_tar(tmp_path / "set.tar", {"cat/1.jpg": bytes(1000), "cat/2.jpg": bytes(2000)})
    data = bytearray(source.read_bytes())
    data[1536 + 150] ^= 255
    source.write_bytes(data)
    with pytest.raises(DataError, match=r"set\.tar: damaged at byte 1536"):
        scan(source)


def test_random_damage_to_a_tar_is_refused_or_read_within_bounds(tmp_path):
    original = write_tar(
        tmp_path / "set.tar", {f"cat/{i}.jpg": bytes(700 * i) for i in range(4)}
    ).read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(500):
        data = bytearray(original)
        header = draw.choice([0, 512, 512 * 4, 512 * 8])
        for _ in range(draw.randint(1, 3)):
            data[header + draw.randrange(512)] = draw.randrange(256)
        if draw.random() < 0.8:  # a header whose check sum is right again
            data[header + 148 : header + 156] = b" " * 8
            data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
        (tmp_path / "set.tar").write_bytes(data)
        try:
            found = list_members(tmp_path / "set.tar")
        except DataError:
            refused += 1
        else:
            assert all(member.offset + member.size <= len(data) for member in found if member.kind == "file")
    assert 50 < refused < 500


def test_damaged_compression_is_refused(tmp_path, scan):
    source = write_tar(tmp_path / "set.tar.gz", {"cat/1.jpg": os.urandom(5000)}, "w:gz")
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"set\.tar\.gz: its compressed data are damaged"):
        scan(source)


def test_an_archive_that_cannot_be_read_is_refused_with_the_reason(tmp_path, scan):
    (tmp_path / "set.tar.bz2").write_bytes(b"BZh91AY&SY but not really" * 9)
    with pytest.raises(
        DataError,
        match=r"set\.tar\.bz2: cannot be read \(Invalid data stream\)\. Check the file and the free space",
    ):
        scan(tmp_path / "set.tar.bz2")


def test_a_tar_that_is_none_is_refused(tmp_path, scan):
    (tmp_path / "set.tar").write_bytes(b"hello" * 500)
    with pytest.raises(DataError, match=r"set\.tar: not a tar, or a damaged one"):
        scan(tmp_path / "set.tar")


def test_a_missing_source_is_refused(tmp_path, scan):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder, tar or zip\. Check the path"):
        scan(tmp_path / "nowhere")


def test_a_source_that_is_neither_folder_nor_archive_is_refused(tmp_path, scan):
    (tmp_path / "set.rar").write_bytes(b"Rar!")
    with pytest.raises(
        DataError, match=r"set\.rar: neither a folder nor an archive \(\.tar .* \.zip\)\. Unpack it"
    ):
        scan(tmp_path / "set.rar")


def test_a_source_without_images_is_refused_with_what_is_there_instead(tmp_path, scan):
    with pytest.raises(
        DataError, match=r"set: there are no images\. 2 files are none, for example .*/cat/1\.txt"
    ):
        scan(write_folder(tmp_path / "set", {"cat/1.txt": b"", "cat/2.txt": b""}))


def test_flat_and_class_folder_sources_do_not_mix(tmp_path, scan):
    flat, classes = (
        write_folder(tmp_path / "flat", {"1.jpg": b""}),
        write_folder(tmp_path / "classes", {"cat/1.jpg": b""}),
    )
    with pytest.raises(
        DataError,
        match=r"flat holds images without class folders, .*classes class folders\. Build them as two files",
    ):
        scan(flat, classes)


def test_no_source_is_refused(scan):
    with pytest.raises(DataError, match="no source was given"):
        scan()


def test_images_in_a_tar_are_read_in_place(tmp_path, scan):
    files = {"cat/1.jpg": jpeg(1), "dog/2.png": png(2)}
    source = write_tar(tmp_path / "set.tar", files)
    images, _ = scan(source)
    assert {image.path for image in images.images} == {str(source)}
    assert [read_bytes(image) for image in images.images] == list(files.values())
