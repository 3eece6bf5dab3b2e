"""A zip is read in place, holds what its folder holds, and can do no harm."""

from __future__ import annotations

import random
import stat
import zipfile
from pathlib import Path

import pytest

from tests.data.images import jpeg, png, write_folder
from vitds.data.beton import open_beton
from vitds.data.build import build_beton
from vitds.data.findings import Findings
from vitds.data.images import read_bytes
from vitds.data.sources import scan_sources
from vitds.errors import DataError

SOME = {"cat/1.jpg": jpeg(1), "cat/2.png": png(2), "dog/b": jpeg(3), "dog/note.txt": b"no picture"}


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def scan(source: Path) -> tuple[list[str], Findings]:
    findings = Findings()
    images = scan_sources([source], findings, source.parent).images
    return [image.member for image in images], findings


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_makes_the_file_that_its_folder_makes(tmp_path, method):
    folder = write_folder(tmp_path / "set", SOME)
    source = write_zip(tmp_path / "set.zip", {f"set/{name}": data for name, data in SOME.items()}, method)
    for path, out in ((folder, "a"), (source, "b")):
        build_beton([path], tmp_path / f"{out}.beton", workers=1)
    first, second = (open_beton(tmp_path / f"{out}.beton") for out in "ab")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.manifest.findings.keys() == second.manifest.findings.keys() == {"other_file"}
    assert second.names == ("set/cat/1.jpg", "set/cat/2.png", "set/dog/b")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".beton", ".json")) == [
        "set",
        "set.zip",
    ]


def test_paths_that_lead_outside_and_links_are_found_as_in_a_tar(tmp_path):
    source = write_zip(tmp_path / "set.zip", {"cat/1.jpg": b"1", "../up.jpg": b"", "/root.jpg": b""})
    with zipfile.ZipFile(source, "a") as archive:
        for name, target in (("cat/in.jpg", "1.jpg"), ("cat/out.jpg", "../../etc/passwd")):
            link = zipfile.ZipInfo(name)
            link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, target)
    found, findings = scan(source)
    assert found == ["cat/1.jpg", "cat/in.jpg"]
    assert findings.names == {
        "archive_outside": [f"{source}:../up.jpg", f"{source}:/root.jpg"],
        "archive_link": [f"{source}:cat/out.jpg"],
    }


def test_names_in_utf_8_without_its_flag_and_with_backslashes_are_read(tmp_path):
    source = write_zip(tmp_path / "set.zip", {"caf?/1.jpg": b"", "dog_2.jpg": b""})
    data = source.read_bytes().replace(b"caf?/1.jpg", "café1.jpg".encode())
    source.write_bytes(data.replace("café1.jpg".encode(), "é/é1.jp2".encode()))
    assert scan(source)[0] == ["é/é1.jp2"]
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        info = zipfile.ZipInfo("cat\\1.jpg")
        info.create_system = 0
        archive.writestr(info, b"")
    assert scan(tmp_path / "w.zip")[0] == ["cat/1.jpg"]


def test_a_member_that_unpacks_to_more_than_a_gibibyte_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("vitds.data.zips.MAX_MEMBER_BYTES", 1000)
    source = write_zip(
        tmp_path / "set.zip", {"cat/1.jpg": jpeg(1, 4, 4), "cat/bomb.bmp": b"BM" + bytes(5000)}
    )
    found, findings = scan(source)
    assert found == ["cat/1.jpg"]
    assert findings.names == {"too_large": [f"{source}:cat/bomb.bmp (unpacks to more than 1,024 MiB)"]}


def test_a_member_that_unpacks_to_more_than_it_says_is_stopped_there(tmp_path):
    source = write_zip(tmp_path / "set.zip", {"cat/1.bmp": b"BM" + bytes(1 << 20), "cat/2.jpg": jpeg(2)})
    said = ((1 << 20) + 2).to_bytes(4, "little")
    source.write_bytes(source.read_bytes().replace(said, (500).to_bytes(4, "little")))
    build_beton([source], tmp_path / "x.beton")
    beton = open_beton(tmp_path / "x.beton")
    assert beton.names == ("cat/2.jpg",)
    (name,) = beton.manifest.findings["damaged"].names
    assert name.startswith(f"{source}:cat/1.bmp (damaged inside the zip: its size or check sum")


def test_members_that_lie_over_one_another_are_refused(tmp_path):
    source = write_zip(tmp_path / "set.zip", {f"cat/{i}.jpg": jpeg(i) for i in range(3)}, zipfile.ZIP_STORED)
    with zipfile.ZipFile(source, "a") as archive:
        first = archive.infolist()[0]
        for i in range(9):  # nine more names for the first one's bytes
            again = zipfile.ZipInfo(f"cat/copy{i}.jpg")
            for field in ("header_offset", "compress_size", "file_size", "CRC"):
                setattr(again, field, getattr(first, field))
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(
        DataError, match=r"set\.zip: its members lie over one another, as those of a zip bomb"
    ):
        scan(source)


def test_a_member_with_the_bit_for_encryption_is_refused(tmp_path):
    source = write_zip(tmp_path / "set.zip", {"cat/1.jpg": jpeg(1)})
    data = bytearray(source.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    source.write_bytes(data)
    with pytest.raises(
        DataError, match=r"set\.zip: cat/1\.jpg is encrypted\. Unpack the zip with its password"
    ):
        scan(source)


def test_a_member_packed_by_a_rare_method_is_named(tmp_path):
    source = write_zip(tmp_path / "set.zip", {"cat/1.jpg": jpeg(1)}, zipfile.ZIP_LZMA)
    write_zip(tmp_path / "rest.zip", {"cat/2.jpg": jpeg(2)})
    findings = Findings()
    scan_sources([tmp_path / "rest.zip"], findings, tmp_path)
    with pytest.raises(DataError, match=r"set\.zip: there are no images"):
        scan_sources([source], findings, tmp_path)
    assert findings.names["unreadable"] == [
        f"{source}:cat/1.jpg (packed by a method that is not read here; make the zip again)"
    ]


@pytest.mark.parametrize("keep", [0, 30, 500, -10])
def test_a_zip_that_was_cut_short_is_refused(tmp_path, keep):
    source = write_zip(tmp_path / "set.zip", SOME)
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"set\.zip: not a zip, or damaged or cut short .*Fetch or make"):
        scan(source)


def test_random_damage_to_a_zip_is_refused_found_or_harmless(tmp_path):
    """Whatever the bytes, a build ends with a message or with images that passed their check sums."""
    files = {f"cat/{i}.png": png(i) for i in range(4)}
    original = write_zip(tmp_path / "set.zip", files).read_bytes()
    draw = random.Random(0)
    refused = left_out = 0
    for _ in range(300):
        data = bytearray(original)
        first = draw.choice([0, original.index(b"PK\1\2")])  # anywhere, or in the directory at the end
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(first, len(data))] = draw.randrange(256)
        (tmp_path / "set.zip").write_bytes(data)
        try:
            images = scan_sources([tmp_path / "set.zip"], Findings(), tmp_path).images
        except DataError:
            refused += 1
            continue
        for image in images:
            try:
                assert read_bytes(image) in files.values()
            except ValueError:
                left_out += 1
    assert refused > 20 and left_out > 20
