"""Odd and broken images: handled as a person would expect, counted and named; `strict` refuses them."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.built import build, names, pixels_of
from tests.data.images import (
    class_folders,
    cmyk_jpeg,
    encode,
    grey16_png,
    jpeg,
    photo,
    png,
    rotated_jpeg,
    write_tar,
)
from vitds.data.findings import Findings
from vitds.data.images import LeftOut, Storing, store_image
from vitds.data.sources import scan_sources
from vitds.errors import DataError


def with_alpha(seed: int) -> Image.Image:
    picture = Image.fromarray(photo(seed)).convert("RGBA")
    picture.putalpha(Image.fromarray(photo(seed + 1)).convert("L"))
    return picture


def on_white(picture: Image.Image) -> np.ndarray:
    """Plain blending in floating point."""
    layers = np.asarray(picture.convert("RGBA")).astype(float)
    alpha = layers[..., 3:] / 255
    return layers[..., :3] * alpha + 255 * (1 - alpha)


LEVELS = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
GREY = np.asarray(Image.fromarray(photo(5)).convert("L"))
PALETTE = Image.fromarray(photo(6)).quantize(50)
GREY_ALPHA = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(photo(7)).convert("L")])
PORTABLE_GREY = b"P5 40 30 65535\n" + LEVELS.astype(">u2").tobytes()

CONVERTED = {
    "grey.png": (encode(GREY, "PNG"), ["grey"], np.repeat(GREY[..., None], 3, 2)),
    "black_and_white.png": (encode(Image.fromarray(GREY).convert("1"), "PNG"), ["grey"], None),
    "deep.png": (grey16_png(LEVELS), ["grey", "deep"], np.repeat(LEVELS[..., None] / 257, 3, 2)),
    "deep.tif": (
        encode(Image.fromarray(LEVELS), "TIFF"),
        ["grey", "deep"],
        np.repeat(LEVELS[..., None] / 257, 3, 2),
    ),
    "deep.pgm": (PORTABLE_GREY, ["grey", "deep"], np.repeat(LEVELS[..., None] / 257, 3, 2)),
    "palette.png": (encode(PALETTE, "PNG"), ["palette"], np.asarray(PALETTE.convert("RGB"))),
    "palette.gif": (encode(PALETTE, "GIF"), ["palette"], np.asarray(PALETTE.convert("RGB"))),
    "alpha.png": (encode(with_alpha(8), "PNG"), ["transparent"], on_white(with_alpha(8))),
    "grey_alpha.png": (encode(GREY_ALPHA, "PNG"), ["grey", "transparent"], on_white(GREY_ALPHA)),
    "colour_key.png": (
        encode(photo(9), "PNG", transparency=tuple(photo(9)[0, 0].tolist())),
        ["transparent"],
        None,
    ),
    "cmyk.jpg": (cmyk_jpeg(10), ["cmyk"], photo(10)),
    "plain.webp": (encode(photo(11), "WEBP", lossless=True), [], photo(11)),
    "plain.bmp": (encode(photo(12), "BMP"), [], photo(12)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_an_odd_image_becomes_rgb_and_is_named(tmp_path, name):
    data, kinds, expected = CONVERTED[name]
    beton = build(tmp_path, {f"a/{name}": data, "a/ordinary.png": png(50)}, storage="raw")
    assert names(beton) == {kind: [f"a/{name}"] for kind in kinds}
    assert beton.images == 2
    if expected is not None:
        difference = np.abs(
            pixels_of(beton, sorted([name, "ordinary.png"]).index(name)) - expected.astype(float)
        )
        assert difference.max() <= 1.01 if name != "cmyk.jpg" else difference.mean() < 6


def test_a_transparent_colour_becomes_white(tmp_path):
    key = tuple(photo(9)[0, 0].tolist())
    beton = build(tmp_path, {"a/1.png": encode(photo(9), "PNG", transparency=key)}, storage="raw")
    assert pixels_of(beton, 0)[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(pixels_of(beton, 0)[-1, -1], photo(9)[-1, -1])


def test_sixteen_bit_colour_is_scaled_to_eight(tmp_path):
    cv2 = pytest.importorskip("cv2")
    deep = photo(1).astype(np.uint16) * 257
    encoded = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    beton = build(tmp_path, {"a/1.png": encoded}, storage="raw")
    assert names(beton) == {"deep": ["a/1.png"]}
    assert np.abs(pixels_of(beton, 0).astype(int) - photo(1)).max() <= 1


TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_a_photograph_is_turned_upright_as_its_exif_tag_says(tmp_path, orientation):
    as_shot = pixels_of(build(tmp_path / "plain", {"a/1.jpg": jpeg(1)}, storage="jpg"), 0)
    beton = build(tmp_path / "turned", {"a/1.jpg": rotated_jpeg(1, orientation)}, storage="raw")
    assert np.abs(pixels_of(beton, 0).astype(int) - TURNS[orientation](as_shot)).max() <= 1
    assert names(beton) == ({} if orientation == 1 else {"rotated": ["a/1.jpg"]})


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(photo(seed)) for seed in (1, 2)]
    beton = build(
        tmp_path,
        {"a/1.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)},
        storage="raw",
    )
    assert names(beton) == {"animated": ["a/1.webp"]}
    assert np.array_equal(pixels_of(beton, 0), photo(1))


def damaged_jpeg(seed: int) -> bytes:
    """Stray bytes before the end marker: Pillow decodes it, libjpeg complains."""
    return jpeg(seed)[:-2] + b"\x12\x34\x56\x78" + b"\xff\xd9"


def test_a_jpeg_with_faulty_data_that_can_be_read_is_stored_anew(tmp_path):
    beton = build(tmp_path, {"a/1.jpg": damaged_jpeg(1)}, storage="jpg")
    assert names(beton) == {"mended": ["a/1.jpg"]}
    assert np.abs(pixels_of(beton, 0).astype(int) - photo(1)).mean() < 12


def giant_png() -> bytes:
    """A small file that says it is 60,000 x 60,000."""
    head = b"IHDR" + (60000).to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    return png(1)[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png(1)[33:]


LEFT_OUT = {
    "text.jpg": (b"this is no picture\n" * 50, "not_image"),
    "empty.png": (b"", "not_image"),
    "cut.jpg": (jpeg(2, 200, 200)[:2000], "truncated"),
    "cut.png": (png(3, 200, 200)[:20000], "truncated"),
    "float.tif": (encode(Image.fromarray(photo(4)[..., 0].astype(np.float32)), "TIFF"), "range_unknown"),
    "long.tif": (encode(Image.fromarray(photo(4)[..., 0].astype(np.int32)), "TIFF"), "range_unknown"),
    "giant.png": (giant_png(), "too_large"),
    "long.png": (png(5, 300, 1), "too_large"),
    "picture.eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_image"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_image_that_cannot_be_used_is_left_out_and_named_with_the_reason(tmp_path, name):
    data, kind = LEFT_OUT[name]
    options = {"side_px": 300} if name != "long.png" else {}
    files = {
        "a/0.png": png(7),
        f"a/{name}": data if name != "long.png" else encode(Image.new("RGB", (70000, 1)), "PNG"),
        "b/z.png": png(9),
    }
    beton = build(tmp_path, files, storage="raw", **options)
    (found,) = names(beton).values()
    assert list(names(beton)) == [kind] and len(found) == 1
    assert found[0].startswith(f"a/{name} (") and len(found[0]) > len(name) + 8
    assert beton.images == 2 and beton.labels.tolist() == [0, 1]


def test_a_file_that_vanished_is_left_out(tmp_path):
    source = class_folders(tmp_path / "set", {"cat": 2})
    packed = write_tar(tmp_path / "set.tar", {"cat/9.jpg": jpeg(9)})
    images = scan_sources([source, packed], Findings(), tmp_path).images
    packed.unlink()
    assert store_image(images[2], Storing("raw", None, 90)) == LeftOut(
        "unreadable", "No such file or directory"
    )


UNUSABLE = {"not_image", "truncated", "damaged", "too_large", "range_unknown"}


def test_random_damage_never_ends_a_build(tmp_path):
    draw = np.random.default_rng(0)
    files = {}
    for i in range(300):
        data = bytearray(
            [jpeg(1), png(2), encode(PALETTE, "GIF"), grey16_png(LEVELS), encode(photo(3), "TIFF")][i % 5]
        )
        for at in draw.integers(0, len(data), draw.integers(1, 30)):
            data[at] = draw.integers(256)
        files[f"a/{i}.jpg"] = bytes(data)
    beton = build(tmp_path, {**files, "a/good.jpg": jpeg(4)}, storage="jpg")
    unusable = [beton.manifest.findings[kind].count for kind in UNUSABLE & set(beton.manifest.findings)]
    assert beton.images + sum(unusable) == 301 and sum(unusable) > 20


def test_names_in_any_script_are_ordinary(tmp_path):
    beton = build(
        tmp_path,
        {
            "котик/фото 1.png": png(1),
            "猫/写真.png": png(2),
            "قط/صورة.png": png(3),
            "a[red]b/'quote\".png": png(4),
        },
    )
    assert beton.manifest.classes == ("a[red]b", "котик", "قط", "猫")
    assert beton.manifest.findings == {}


def test_exact_duplicates_are_kept_and_named(tmp_path):
    beton = build(
        tmp_path,
        {"a/1.png": png(1), "a/2.png": png(2), "b/3.bmp": encode(photo(1), "BMP"), "b/4.png": png(1)},
        storage="raw",
    )
    assert beton.images == 4
    assert [name.split(" = ")[0] for name in names(beton)["duplicate"]] == ["b/3.bmp", "b/4.png"]
    assert all(name.endswith("set/a/1.png") for name in names(beton)["duplicate"])


def test_a_class_of_which_nothing_is_left_stays_in_the_list_and_is_named(tmp_path):
    beton = build(tmp_path, {"a/1.png": b"", "b/2.png": png(2)})
    assert beton.manifest.classes == ("a", "b") and beton.labels.tolist() == [1]
    assert beton.manifest.findings["class_lost"].names == ("a",)


def test_a_build_of_which_nothing_is_left_is_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"x\.beton: none of the 2 images can be used, the first: .*a/1\.png .*Nothing was written",
    ):
        build(tmp_path, {"a/1.png": b"", "a/2.png": b"x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize("name", [*CONVERTED, *(name for name in LEFT_OUT if name != "long.png")])
def test_strict_turns_what_was_odd_into_an_error_and_writes_nothing(tmp_path, name):
    data = (CONVERTED | LEFT_OUT)[name][0]
    files = {f"a/{name}": data, "a/ordinary.png": png(50)}
    if name.startswith("plain"):
        assert build(tmp_path, files, strict=True).images == 2
        return
    with pytest.raises(
        DataError,
        match=rf"`strict`: 1 x .*\(first: .*a/{name}.*\)\. Nothing was written\. Mend or remove these images",
    ):
        build(tmp_path, files, strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_strict_names_every_kind(tmp_path):
    (tmp_path / "set" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match=r"1 x a class folder without images"):
        build(tmp_path, {"a/1.png": png(1)}, strict=True)
    (tmp_path / "set" / "empty").rmdir()
    files = {
        "a/1.png": png(1),
        "a/2.png": png(1),
        "a/3.png": b"",
        "a/4.jpg": cmyk_jpeg(3),
        "a/5.jpg": cmyk_jpeg(4),
    }
    with pytest.raises(DataError) as caught:
        build(tmp_path, files, strict=True)
    for part in ("1 x left out: not an image", "1 x same content as another image", "2 x CMYK, now RGB"):
        assert part in str(caught.value)
