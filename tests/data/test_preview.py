"""The preview shows the training's own pixels, labelled so that every letter and every weight can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

from tests.data.images import class_folders, write_folder
from tests.data.images import png as picture
from tests.data.small_files import expected_views, write_file
from vitds.cli import main
from vitds.config.load import load_settings
from vitds.data import lettering
from vitds.data.build import build_beton
from vitds.data.digits import build_digits
from vitds.data.lettering import LINE_PX, escaped, wrapped
from vitds.data.order import epoch_order
from vitds.data.preview import GAP_PX, ImagePreview, draw_preview
from vitds.errors import ResourceError, SettingsError, UsageError
from vitds.jobs import preview as job
from vitds.jobs.preview import preview

RECIPE = """
method: {method}
seed: 5
views:
  crop_px: 128
  groups: [{{name: large, views: {views}, scale: [0.14, 1.0]}}]
  colour: 0.8
  hue: 0.2
mix: {{kind: {kind}}}
batch: {{global_images: 8, chunk_images: 4}}
"""


@pytest.fixture
def recipe_of(tmp_path):
    """recipe_of(kind) -> the path of a recipe of crops of 128 pixels, 4 images a chunk, 8 a step."""

    def write(kind: str = "cutmix", method: str = "idmm", views: int = 2) -> str:
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(kind=kind, method=method, views=views))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.fixture
def page_of(tmp_path, recipe_of):
    """page_of(kind) -> the preview of a small file as an array, the file, its settings."""

    def draw(kind: str, method: str = "idmm", views: int = 2, **options: object):
        file, recipe = write_file(tmp_path / "x.beton"), recipe_of(kind, method, views)
        page = np.asarray(Image.open(preview(file.path, recipe=recipe, out=tmp_path / "page.png", **options)))
        return page, file, load_settings(recipe=recipe, command=None, flags={})

    return draw


@pytest.fixture
def written(monkeypatch):
    """What stands on the pages that are drawn: the title, then all captions, in order."""
    texts: list[str] = []

    def remember(images, view_names, groups, title):
        texts.extend([title, *(text for image in images for text in (image.name, *image.targets))])
        return draw_preview(images, view_names, groups, title)

    monkeypatch.setattr(job, "draw_preview", remember)
    return texts


def cell(page: np.ndarray, image: int, band: int, view: int, images: int = 4) -> np.ndarray:
    """The pixels of one crop on the page, (128, 128, 3), counted from its lower edge, as the header's height
    varies.
    """
    left = GAP_PX + (view + 1) * (128 + GAP_PX)
    top = len(page) - (2 * (images - image) - band) * (128 + 2 * LINE_PX + GAP_PX)
    return page[top : top + 128, left : left + 128]


# ----------------------------------------------------------------------------------------------------- pixels


def test_the_upper_band_holds_the_loaders_views(page_of):
    page, file, settings = page_of("cutmix")
    for row, image in enumerate(epoch_order(10, 5, 0)[:4].tolist()):
        for view, crop in enumerate(expected_views(file, settings, image, 0)):
            np.testing.assert_array_equal(cell(page, row, 0, view), crop.transpose(1, 2, 0))


def test_the_lower_band_holds_the_same_views_where_nothing_is_mixed_and_others_where_it_is(page_of):
    cells = [(row, view) for row in range(4) for view in range(2)]
    page, *_ = page_of("none")
    assert all(np.array_equal(cell(page, row, 0, view), cell(page, row, 1, view)) for row, view in cells)
    page, *_ = page_of("mixup")
    assert any(not np.array_equal(cell(page, row, 0, view), cell(page, row, 1, view)) for row, view in cells)


def test_images_of_several_chunks_stand_in_the_order_of_the_step(page_of):
    page, file, settings = page_of("none", images=7)
    for row, image in enumerate(epoch_order(10, 5, 0)[:7].tolist()):
        for view, crop in enumerate(expected_views(file, settings, image, 0)):
            for band in (0, 1):
                np.testing.assert_array_equal(cell(page, row, band, view, 7), crop.transpose(1, 2, 0))


def test_there_are_no_more_images_than_the_step_has(page_of, capsys):
    page_of("none", images=100)
    assert "page.png: 8 images of x.beton" in capsys.readouterr().out


def test_a_file_smaller_than_a_step_shows_no_image_twice(tmp_path, recipe_of, written):
    build_beton([class_folders(tmp_path / "set", {"a": 3}, picture)], tmp_path / "few.beton")
    preview(tmp_path / "few.beton", recipe=recipe_of("none"), out=tmp_path / "page.png", images=8)
    assert sorted(text for text in written if text.endswith("\na")) == [
        "image 0\na",
        "image 1\na",
        "image 2\na",
    ]


def test_a_supervised_recipe_has_one_view(page_of, capsys):
    page, *_ = page_of("cutmix", method="supervised", views=1)
    assert page.shape[1] == GAP_PX + 2 * (128 + GAP_PX)
    assert "page.png: 4 images of x.beton, 280 x " in capsys.readouterr().out


def test_small_crops_are_enlarged_by_whole_factors():
    crops = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), np.uint8)
    boxes = np.array([[0, 0, 8, 8]], np.int32)
    image = ImagePreview("a", np.zeros((8, 8, 3), np.uint8), boxes, crops, crops, ("1.00 of a",))
    page = np.asarray(draw_preview([image], ["only 0"], [0], "title")[0])
    np.testing.assert_array_equal(cell(page, 0, 0, 0, 1)[::8, ::8], crops[0].transpose(1, 2, 0))


def test_seed_and_settings_stand_in_place_of_the_recipes(tmp_path, recipe_of, written):
    file = write_file(tmp_path / "x.beton")
    words = ("--recipe", recipe_of("cutmix"), "--out", str(tmp_path / "page.png"), "--images", "2")
    assert main(["data", "preview", str(file.path), *words, "--seed", "9", "--set", "mix.kind=none"]) == 0
    assert "seed 9" in written[0] and "mixing: none" in written[0]
    names = [text for text in written[1:] if text.startswith("image")]
    assert [int(name.split()[1]) for name in names] == epoch_order(10, 9, 0)[:2].tolist()


# --------------------------------------------------------------------------------------------------- captions


def test_the_header_is_broken_between_words_and_never_cut():
    lines = wrapped("a header of many words that a narrow page cannot hold in one line", 100)
    assert len(lines) > 3 and " ".join(lines).startswith("a header of many words that")
    crops = np.zeros((1, 3, 16, 16), np.uint8)
    image = ImagePreview(
        "a", np.zeros((8, 8, 3), np.uint8), np.array([[0, 0, 8, 8]], np.int32), crops, crops, ("1.00 of a",)
    )
    page, _ = draw_preview([image], ["only 0"], [0], "word " * 60)
    assert (np.asarray(page)[:, -4:] == 255).all()  # no letter reaches the edge


def test_weights_that_label_smoothing_makes_smaller_are_explained(page_of, written):
    page_of("cutmix")
    assert (
        "label smoothing: the 0.10 missing from each crop's weights lies evenly on all targets" in written[0]
    )
    for text in (text for text in written[1:] if " of image " in text):
        assert sum(float(line.split()[0]) for line in text.split("\n")) == pytest.approx(0.9, abs=0.011)


def test_without_label_smoothing_weights_are_whole_and_nothing_is_explained(page_of, written):
    page_of("cutmix", set=["head.label_smoothing=0"])
    assert "label smoothing:" not in written[0]
    for text in (text for text in written[1:] if " of image " in text):
        assert sum(float(line.split()[0]) for line in text.split("\n")) == pytest.approx(1, abs=0.011)


def test_images_without_labels_are_said_to_have_none(tmp_path, recipe_of, written):
    build_beton(
        [write_folder(tmp_path / "set", {f"{i}.png": picture(i) for i in range(8)})], tmp_path / "x.beton"
    )
    preview(tmp_path / "x.beton", recipe=recipe_of("mixup", "supervised", 1), out=tmp_path / "page.png")
    assert written[1:] == [
        f"image {number}" if i % 2 == 0 else "no label" for number in epoch_order(8, 5, 0)[:4] for i in (0, 1)
    ]


def test_a_supervised_recipe_shows_the_labelled_images_alone(tmp_path, recipe_of, written):
    source = write_folder(tmp_path / "set", {f"{'ab'[i % 2]}/{i}.png": picture(i) for i in range(8)})
    more = write_folder(tmp_path / "more", {f"{i}.png": picture(10 + i) for i in range(8)})
    build_beton([source], tmp_path / "x.beton", unlabelled=more)
    preview(tmp_path / "x.beton", recipe=recipe_of("none", "supervised", 1), out=tmp_path / "page.png")
    assert all(name.split("\n")[1] in "ab" for name in written[1::2])
    assert all(target.endswith((" of a", " of b")) for target in written[2::2])


SCRIPTS = {"Häuser": "DejaVuSans.ttf", "кошка": "DejaVuSans.ttf", "plain": None}


@pytest.mark.parametrize("text", SCRIPTS)
def test_letters_that_a_font_at_hand_has_are_drawn_with_it(text):
    font = lettering._font_for(text)
    assert font is lettering.ASCII_FONT if SCRIPTS[text] is None else Path(font.path).name == SCRIPTS[text]


def test_letters_that_no_font_has_stand_as_code_points_and_are_said_once(
    tmp_path, recipe_of, monkeypatch, capsys
):
    own = font_manager.findfont("DejaVu Sans")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [own])
    build_beton([class_folders(tmp_path / "set", {"中文": 4, "Bäume": 4}, picture)], tmp_path / "x.beton")
    preview(tmp_path / "x.beton", recipe=recipe_of("cutmix", "supervised", 1), out=tmp_path / "page.png")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "no font" in line]
    assert "no font of this machine has 中 文; such letters stand there as code points (U+4E2D)." in said
    assert escaped("0.90 of 中文") == "0.90 of U+4E2D U+6587"


# --------------------------------------------------------------------------------------------------- refusals


def test_the_digits_need_no_recipe(tmp_path, written):
    build_digits(tmp_path / "d.beton", split="test")
    preview(tmp_path / "d.beton", out=tmp_path / "page.png", images=1)
    assert "recipe idmm_digits" in written[0]


def test_other_images_are_not_previewed_by_the_recipe_of_the_digits(tmp_path):
    file = write_file(tmp_path / "x.beton")
    with pytest.raises(
        SettingsError, match=r"x\.beton: its recipe is missing\. Say with `recipe` how .*idmm_deit_tiny"
    ) as caught:
        preview(file.path, out=tmp_path / "page.png")
    assert "digits" not in str(caught.value)


def test_less_than_one_image_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"`images=0`: must be at least 1\."):
        preview(write_file(tmp_path / "x.beton").path, recipe="idmm_digits", images=0)


@pytest.mark.parametrize("out", ["nowhere/p.png", "p.nothing"])
def test_a_picture_that_cannot_be_written_is_named(tmp_path, out, capsys):
    file = write_file(tmp_path / "x.beton")
    with pytest.raises(ResourceError, match=rf"`out=.*{out}`: the picture cannot be written .* ends in .png"):
        preview(file.path, recipe="idmm_digits", out=tmp_path / out)
    assert (
        main(["data", "preview", str(file.path), "--recipe", "idmm_digits", "--out", str(tmp_path / out)])
        == 6
    )
    assert f"--out {tmp_path / out}: the picture cannot be written" in capsys.readouterr().err
