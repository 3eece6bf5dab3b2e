"""The preview shows the training's own pixels, labelled."""

import numpy as np
import pytest
from PIL import Image

from tests.data.small_files import expected_views, write_file
from vitds.config.load import load_settings
from vitds.data.order import epoch_order
from vitds.data.preview import GAP_PX, LINE_PX, ImagePreview, draw_preview
from vitds.errors import ResourceError
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
def page_of(tmp_path):
    """page_of(kind) -> the preview of a small file as an array, the file, its settings."""

    def draw(kind, method="idmm", views=2):
        file, recipe = write_file(tmp_path / "x.beton"), tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE.format(kind=kind, method=method, views=views))
        page = np.asarray(Image.open(preview(file.path, recipe=str(recipe), out=tmp_path / "page.png")))
        return page, file, load_settings(recipe=str(recipe), command=None, flags={})

    return draw


def cell(page, image, band, view):
    """The pixels of one crop on the page, (128, 128, 3)."""
    left = GAP_PX + (view + 1) * (128 + GAP_PX)
    top = GAP_PX + 2 * LINE_PX + (2 * image + band) * (128 + 2 * LINE_PX + GAP_PX)
    return page[top : top + 128, left : left + 128]


def test_the_upper_band_holds_the_loaders_views(page_of):
    page, file, settings = page_of("cutmix")
    for row, image in enumerate(epoch_order(10, 5, 0)[:4].tolist()):
        for view, crop in enumerate(expected_views(file, settings, image, 0)):
            np.testing.assert_array_equal(cell(page, row, 0, view), crop.transpose(1, 2, 0))


def test_the_lower_band_holds_the_same_views_where_nothing_is_mixed_and_others_where_it_is(page_of):
    page, *_ = page_of("none")
    assert all(
        np.array_equal(cell(page, row, 0, view), cell(page, row, 1, view))
        for row in range(4)
        for view in range(2)
    )
    page, *_ = page_of("mixup")
    assert any(
        not np.array_equal(cell(page, row, 0, view), cell(page, row, 1, view))
        for row in range(4)
        for view in range(2)
    )


def test_a_supervised_recipe_has_one_view(page_of, capsys):
    page, *_ = page_of("cutmix", method="supervised", views=1)
    assert page.shape[1] == GAP_PX + 2 * (128 + GAP_PX)
    assert capsys.readouterr().out.endswith("page.png: 4 images of x.beton, 280 x 1348 pixels\n")


def test_small_crops_are_enlarged_by_whole_factors():
    crops = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), np.uint8)
    image = ImagePreview(
        "a", np.zeros((8, 8, 3), np.uint8), np.array([[0, 0, 8, 8]], np.int32), crops, crops, ("1.00 of a",)
    )
    page = np.asarray(draw_preview([image], ["only 0"], [0], "title"))
    np.testing.assert_array_equal(cell(page, 0, 0, 0)[::8, ::8], crops[0].transpose(1, 2, 0))


@pytest.mark.parametrize("out", ["nowhere/p.png", "p.nothing"])
def test_a_picture_that_cannot_be_written_is_named(tmp_path, out):
    file = write_file(tmp_path / "x.beton")
    with pytest.raises(ResourceError, match=rf"--out .*{out}: the picture cannot be written .* ends in .png"):
        preview(file.path, recipe="idmm_digits", out=tmp_path / out)
