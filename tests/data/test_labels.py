"""Labels from a table and from file names: what is read, what is counted, what is asked about."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.images import png, write_folder, write_tar
from vitds.data.findings import Findings
from vitds.data.sources import ImageSet, SourceOptions, scan_sources
from vitds.errors import DataError, UsageError

FILES = ("a1.jpg", "a2.jpg", "b1.jpg", "deep/b2.png")
ROWS = (("a1.jpg", "ant"), ("a2.jpg", "ant"), ("b1.jpg", "bee"), ("deep/b2.png", "bee"))
ANSWER = {"a1.jpg": "ant", "a2.jpg": "ant", "b1.jpg": "bee", "deep/b2.png": "bee"}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "set", dict.fromkeys(FILES, b""))


def scan(*sources: Path, **options: object) -> tuple[ImageSet, Findings]:
    findings = Findings()
    return scan_sources(sources, findings, sources[0].parent, SourceOptions(**options)), findings


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder.parent / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def text_of(rows, delimiter=",", header=None, end="\n") -> str:
    return end.join(delimiter.join(row) for row in [*([header] if header else []), *rows]) + end


def labels_of(images: ImageSet) -> dict[str, str | None]:
    return {image.member: image.class_name for image in images.images}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " "])
@pytest.mark.parametrize("header", [None, ("file", "label"), ("Bild", "Klasse")])
def test_any_delimiter_is_read_with_and_without_a_header(folder, delimiter, header):
    images, findings = scan(folder, labels=table(folder, text_of(ROWS, delimiter, header)))
    assert labels_of(images) == ANSWER and images.classes == ("ant", "bee")
    assert list(findings.counts) == ["table_read"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "latin-1"])
def test_any_encoding_is_read_and_said(folder, encoding):
    text = text_of(ROWS, ";", ("file", "label"), "\r\n").replace("bee", "Käfer")
    images, findings = scan(folder, labels=table(folder, text, encoding))
    assert images.classes == ("Käfer", "ant")
    read = {"latin-1": "cp1252"}.get(encoding, encoding)
    assert findings.names["table_read"] == [
        f"{folder.parent}/labels.csv: labels from column 'label', files from column 'file', 4 rows, read "
        f"as {read}"
    ]


@pytest.mark.parametrize(
    ("encoding", "name"), [("gb18030", "玫瑰"), ("shift_jis", "バラ"), ("euc_kr", "장미"), ("cp1251", "роза")]
)
def test_an_encoding_that_is_stated_is_taken(folder, encoding, name):
    text = text_of(ROWS, ",", ("file", "label")).replace("bee", name)
    images, findings = scan(folder, labels=table(folder, text, encoding), label_encoding=encoding)
    assert set(images.classes) == {"ant", name}
    assert findings.names["table_read"][0].endswith(f"read as {encoding}")


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("shift-jiss", "label_encoding=shift-jiss`: there is no such encoding; did you mean shiftjis"),
        ("base64", "label_encoding=base64`: there is no such encoding"),
        ("utf-8", "not a text .*name its encoding with `label_encoding`"),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(folder, stated, said):
    text = text_of(ROWS, ",", ("file", "label")).replace("bee", "Käfer")
    with pytest.raises((DataError, UsageError), match=said):
        scan(folder, labels=table(folder, text, "cp1252"), label_encoding=stated)


def test_quoted_cells_may_hold_separators_and_line_ends(folder):
    text = 'note,file,label\n"x, ""y""\nz",a1.jpg,"ant, red"\n,a2.jpg,ant\n'
    images, _ = scan(folder, labels=table(folder, text))
    assert labels_of(images) == {"a1.jpg": "ant, red", "a2.jpg": "ant"}


@pytest.mark.parametrize(
    "cells",
    [
        ("a1", "a2", "b1", "b2"),
        ("A1.JPG", "A2.jpg", "B1.jpg", "b2.PNG"),
        (r"C:\photos\set\a1.jpg", r".\a2.jpg", "set/b1.jpg", r"deep\b2.png"),
        ("/mnt/camera/set/a1.jpg", "/mnt/camera/set/a2.jpg", "/x/b1.jpg", "/mnt/camera/set/deep/b2.png"),
    ],
)
def test_files_are_found_by_name_stem_path_and_end_of_path(folder, cells):
    rows = [(cell, label) for cell, (_, label) in zip(cells, ROWS, strict=True)]
    assert labels_of(scan(folder, labels=table(folder, text_of(rows)))[0]) == ANSWER


@pytest.mark.parametrize(
    "text",
    [
        "label,id\n1,1\n1,2\n2,3\n2,4\n",  # labels that are names of files as well
        ",file,label\n1,2.jpg,1\n2,1.jpg,1\n3,4.jpg,2\n4,3.jpg,2\n",  # row numbers that are
        ",image_id,label\n1,2,1\n2,1,1\n3,4,2\n4,3,2\n",
    ],
)
def test_numbers_that_could_be_files_are_not_taken_for_the_column_of_files(tmp_path, text):
    source = write_folder(tmp_path / "set", {f"{i}.jpg": b"" for i in range(1, 5)})
    images, _ = scan(source, labels=table(source, text), label_column="label")
    assert labels_of(images) == {"1.jpg": "1", "2.jpg": "1", "3.jpg": "2", "4.jpg": "2"}


def test_the_folder_called_from_is_a_source_like_another(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "set", {"cat/1.jpg": b"", "cat/2.jpg": b""})
    monkeypatch.chdir(source)
    path = table(source, "/data/cat/1.jpg,ant\nset/cat/2.jpg,bee\n")
    assert labels_of(scan(Path("."), labels=path)[0]) == {"cat/1.jpg": "ant", "cat/2.jpg": "bee"}


def test_a_path_into_another_folder_is_not_taken_for_an_image_of_the_same_name(tmp_path):
    source = write_folder(tmp_path / "set", {"a/1.jpg": b"", "b/2.jpg": b""})
    images, findings = scan(source, labels=table(source, "a/1.jpg,x\nc/2.jpg,y\n"))
    assert labels_of(images) == {"a/1.jpg": "x"}
    assert findings.names["table_missing"] == [f"{tmp_path}/labels.csv: line 2: c/2.jpg"]
    assert findings.names["unlisted"] == [f"{source}/b/2.jpg"]


def test_missing_and_unlisted_files_are_counted_and_named_and_empty_labels_are_unlabelled(folder):
    rows = [("gone.jpg", "ant"), ("a1.jpg", "ant"), ("a2.jpg", " "), ("b1.jpg", "bee")]
    images, findings = scan(folder, labels=table(folder, text_of(rows, header=("file", "label"))))
    assert labels_of(images) == {"a1.jpg": "ant", "b1.jpg": "bee", "a2.jpg": None}
    assert [image.class_name for image in images.images] == ["ant", "bee", None]  # those without come last
    assert findings.names["table_missing"] == [f"{folder.parent}/labels.csv: line 2: gone.jpg"]
    assert findings.names["unlisted"] == [f"{folder}/deep/b2.png"]


def test_a_first_row_whose_image_is_missing_is_no_header(folder):
    images, findings = scan(folder, labels=table(folder, "gone,ant\na1,ant\nb1,bee\n"))
    assert findings.counts["table_missing"] == 1 and len(images.images) == 2


def test_empty_cells_that_a_program_left_out_at_a_rows_end_are_empty(folder):
    images, _ = scan(
        folder, labels=table(folder, "file,label,note\na1.jpg,ant,x\nb1.jpg,bee\na2.jpg,ant,,\n")
    )
    assert labels_of(images) == {"a1.jpg": "ant", "a2.jpg": "ant", "b1.jpg": "bee"}


def test_a_table_serves_a_tar_as_its_folder(tmp_path):
    source = write_tar(tmp_path / "set.tar", dict.fromkeys((f"set/{name}" for name in FILES), b""))
    images, _ = scan(source, labels=table(source, text_of(ROWS)))
    assert labels_of(images) == ANSWER


@pytest.mark.parametrize("stated", ["utf-8", "utf-16-le"])
def test_a_mark_before_the_first_cell_is_not_read_with_a_stated_encoding(folder, stated):
    text = "\ufeff" + text_of([("a1.jpg", "PKs"), *ROWS[1:]])
    images, _ = scan(folder, labels=table(folder, text, stated), label_encoding=stated)
    assert labels_of(images) == ANSWER | {"a1.jpg": "PKs"}


def test_a_table_may_begin_with_the_letters_of_a_zip(folder):
    images, _ = scan(folder, labels=table(folder, text_of(ROWS, header=("PK", "label"))))
    assert labels_of(images) == ANSWER


def test_two_rows_that_say_the_same_are_counted(folder):
    images, findings = scan(folder, labels=table(folder, text_of([*ROWS, ROWS[0]])))
    assert labels_of(images) == ANSWER
    assert findings.names["table_twice"] == [f"{folder.parent}/labels.csv: line 5: a1.jpg"]


REFUSED = [  # the table, the options, the message
    (
        text_of([*ROWS, ("a1.jpg", "bee")]),
        {},
        r"labels\.csv: two rows for a1\.jpg: line 1 says 'ant', line 5 'bee'\. Leave one",
    ),
    (
        "file,label,who\na1.jpg,ant,p1\nb2.jpg,bee,p3\na1.jpg,ant,p2\n",
        {"group": "who"},
        r"two rows for a1\.jpg: line 2 says 'p1', line 4 'p2'\. Leave one: an image has one group",
    ),
    (
        text_of([*ROWS, ("b2", "Bee"), ("a1", "BEE ")]),
        {},
        r"two rows for b2: line 4 says 'bee', line 5 'Bee'",
    ),
    (
        text_of([(name, label.title() if name == "a1.jpg" else label) for name, label in ROWS]),
        {},
        r"differ only by case or blanks: 'Ant' \(1 rows\), 'ant' \(1 rows\)\. Say with `alike=merge` .* "
        r"`alike=keep`",
    ),
    ("a1.jpg,ant\na2.jpg,ant \nb1.jpg,ant\n", {}, r"blanks: 'ant' \(2 rows\), 'ant ' \(1 rows\)"),
    (
        "file,kind,colour\na1.jpg,ant,red\n",
        {},
        r"not clear which of its 3 columns has the labels: 'file', 'kind', 'colour'\. Say which with "
        r"`label_col",
    ),
    (
        "file,label,class\na1.jpg,ant,red\n",
        {},
        r"not clear which of its 3 columns has the labels: 'file', 'label', 'class'",
    ),
    (
        "file,species\na1.jpg,ant\n",
        {"label_column": "specie"},
        r"`label_column=specie`: there is no such column; did you mean species\?",
    ),
    ("a1.jpg,ant\n", {"label_column": "3"}, r"`label_column=3`: there is no such column; one of: 1, 2"),
    ("a1.jpg,ant\n", {"label_column": "1"}, r"`label_column=1`: that column names the files"),
    (
        "x.jpg,ant\ny.jpg,bee\n",
        {},
        r"names the images that are there, such as a1\.jpg\. Its first line is 'x\.jpg,ant'\. It needs a",
    ),
    ("", {}, r"no column of it names the images that are there"),
    ("a1.jpg\na2.jpg\n", {}, r"one column alone\. It needs a column of file names and one of labels"),
    (
        "a1.jpg,ant\na2.jpg,ant,x\nb1.jpg,bee\n",
        {},
        r"line 2 has 3 cells, most have 2: 'a2\.jpg \| ant \| x'\. Put",
    ),
    ("file,label\n1,a1.jpg,ant\n2,a2.jpg,bee\n", {}, r"line 1 has 2 cells, most have 3"),
    ("a1.jpg,\na2.jpg,\n", {}, r"column number 2 has no label for any image"),
    ("PK\3\4", {}, r"a spreadsheet or zip, not a text\. Save it as CSV"),
]


@pytest.mark.parametrize(("text", "options", "message"), REFUSED)
def test_a_table_that_cannot_be_understood_is_refused_with_the_place(folder, text, options, message):
    with pytest.raises(DataError, match=message):
        scan(folder, labels=table(folder, text), **options)


def test_a_missing_table_is_refused(folder):
    with pytest.raises(DataError, match=r"no\.csv: the table of labels cannot be read \(No such file"):
        scan(folder, labels=folder / "no.csv")


def test_a_name_that_several_files_have_is_asked_about(tmp_path):
    source = write_folder(tmp_path / "set", {"x/1.jpg": b"", "y/1.jpg": b""})
    with pytest.raises(
        DataError, match=r"line 1: '1\.jpg' may be any of 2 files: .*x/1\.jpg, .*y/1\.jpg\. Write"
    ):
        scan(source, labels=table(source, "1.jpg,ant\n"))
    one, two = (write_folder(tmp_path / name, {"1.jpg": b""}) for name in ("one", "two"))
    images, _ = scan(one, two, labels=table(one, "one/1.jpg,ant\ntwo/1.jpg,bee\n"))
    assert [image.class_name for image in images.images] == ["ant", "bee"]


def test_a_quote_after_a_blank_spoils_no_table_with_commas(folder):
    """To the delimiter " " it opens a cell, which then is longer than Python's reader allows."""
    rows = [("a1.jpg", 'ant, "big" '), ("a2.jpg", 'ant, "big" '), ("b1.jpg", "bee"), *ROWS[3:]]
    rows += [(f"gone{number}.jpg", f"{number} plates") for number in range(9000)]
    path = table(folder, "".join('{},"{}"\n'.format(name, label.replace('"', '""')) for name, label in rows))
    assert 'ant, "big"' in scan(folder, labels=path)[0].classes
    path.write_text('a1.jpg,"ant\n' + "b1.jpg,bee\n" * 20_000)
    with pytest.raises(DataError, match=r"labels\.csv: line \d+: not a row of a table \(field larger"):
        scan(folder, labels=path)


def test_labels_that_differ_by_case_are_merged_or_kept_as_a_person_says(folder):
    rows = [("a1.jpg", "ant"), ("a2.jpg", "ant"), ("b1.jpg", "Ant"), ("b2.png", "bee")]
    path = table(folder, text_of(rows))
    assert scan(folder, labels=path, alike="merge")[0].classes == ("ant", "bee")
    assert scan(folder, labels=path, alike="keep")[0].classes == ("Ant", "ant", "bee")


def test_a_column_is_chosen_by_name_or_number(folder):
    path = table(folder, "file,kind,colour\na1.jpg,ant,red\nb1.jpg,bee,blue\n")
    assert scan(folder, labels=path, label_column="KIND")[0].classes == ("ant", "bee")
    assert scan(folder, labels=path, label_column="3")[0].classes == ("blue", "red")


def test_a_column_of_the_table_says_which_images_are_a_group(folder):
    path = table(folder, "file,label,patient\na1.jpg,ant,7\na2.jpg,ant,7\nb1.jpg,bee,\n")
    images, _ = scan(folder, labels=path, group="patient")
    assert [image.group for image in images.images] == ["7", "7", None]
    with pytest.raises(
        DataError, match=r"`group=patien`: it matches no .* did you mean the column patient\?"
    ):
        scan(folder, labels=path, group="patien")


# ----------------------------------------------------------------------------------------------- other ways


NAMES = {
    "crazing_12.jpg": "crazing",
    "cat.0.jpg": "cat",
    "rolled-in_scale_3.png": "rolled-in_scale",
    "dog (3).jpg": "dog",
    "beetle12.jpg": "beetle",
    "type1_5.jpg": "type1",
    "7_owl.jpg": "owl",
}


def test_classes_in_file_names_are_believed_once_a_person_has_seen_them(tmp_path):
    source = write_folder(tmp_path / "set", dict.fromkeys([*NAMES, "0001.jpg"], b""))
    with pytest.raises(
        DataError,
        match=r"`label_from=name` would make 7 classes of 7 files: .*crazing \(1, as crazing_12\.jpg\), .*"
        r"Without a class: 1 \(first: .*/0001\.jpg\)\. If that is right, say so with `yes`\. Nothing was "
        r"written",
    ):
        scan(source, label_from="name")
    images, findings = scan(source, label_from="name", yes=True)
    assert labels_of(images) == NAMES
    assert findings.names == {"nameless": [f"{source}/0001.jpg"]}


def test_names_without_a_class_are_refused(folder):
    source = write_folder(folder / "x", {"0001.jpg": b"", "0002.jpg": b""})
    with pytest.raises(DataError, match=r"no file's name has a class and a number in it, .* is 0001\.jpg"):
        scan(source, label_from="name", yes=True)


def test_unlabelled_images_stand_beside_labelled_ones(tmp_path):
    source = write_folder(tmp_path / "set", {"cat/1.jpg": b"", "dog/1.jpg": b""})
    more = write_folder(tmp_path / "more", {"x/1.jpg": b"", "2.jpg": b""})
    images, _ = scan(source, unlabelled=more)
    assert [image.class_name for image in images.images] == ["cat", "dog", None, None]
    assert images.classes == ("cat", "dog") and images.sources == (str(source), str(more))


def test_unlabelled_images_beside_images_without_labels_are_refused(tmp_path):
    flat = write_folder(tmp_path / "set", {"1.jpg": b""})
    with pytest.raises(DataError, match=r"`unlabelled` stands beside images with labels, and there are none"):
        scan(flat, unlabelled=flat)


def test_nested_folders_are_taken_without_labels_if_a_person_says_so(tmp_path):
    source = write_folder(tmp_path / "set", {"train/cat/1.jpg": b"", "test/dog/2.jpg": b"", "3.jpg": b""})
    images, findings = scan(source, no_labels=True)
    assert labels_of(images) == dict.fromkeys(("3.jpg", "test/dog/2.jpg", "train/cat/1.jpg"))
    assert images.classes == () and findings.counts == {}


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [("(p[0-9])_", ["p1", "p1", "p2", None]), ("p[0-9]", ["p1", "p1", "p2", None])],
)
def test_a_regular_expression_finds_groups_in_paths(tmp_path, pattern, groups):
    names = ("a/p1_1.jpg", "a/p1_2.jpg", "b/p2_1.jpg", "b/x.jpg")
    source = write_folder(tmp_path / "set", dict.fromkeys(names, b""))
    images, findings = scan(source, group=pattern)
    assert [image.group for image in images.images] == groups
    assert findings.names == {"groupless": [f"{source}/b/x.jpg"]}


def test_a_group_that_is_no_expression_or_finds_nothing_is_refused(tmp_path):
    source = write_folder(tmp_path / "set", {"a/1.jpg": b"", "b/2.png": png(1)})
    with pytest.raises(UsageError, match=r"`group=\(`: not a regular expression \(missing \)"):
        scan(source, group="(")
    with pytest.raises(
        DataError, match=r"`group=patient`: it matches no image's path; the first is a/1\.jpg\."
    ):
        scan(source, group="patient")
