"""Several .beton files make one training set, and nothing is copied: --data a.beton --data b.beton."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.images import encode, jpeg, photo, png, write_folder
from tests.data.small_files import settings_for
from vitds.data.beton import BetonFile, open_beton
from vitds.data.build import build_beton
from vitds.data.joined import join
from vitds.data.loader import TrainLoader, eval_batches
from vitds.errors import DataError

PICTURES = {
    f"{letter}{number}.jpg": jpeg(10 * ord(letter) + number) for letter in "ab" for number in range(4)
}


def built(folder: Path, files: dict[str, bytes], **options: object) -> BetonFile:
    build_beton([write_folder(folder, files)], folder.with_suffix(".beton"), workers=1, **options)
    return open_beton(folder.with_suffix(".beton"))


@pytest.fixture(scope="module", params=["raw", "jpg"])
def whole_and_joined(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[BetonFile, BetonFile]:
    """Eight photographs in one file, and the same in two files that are joined."""
    folder = tmp_path_factory.mktemp("joined")
    whole = built(folder / "whole", PICTURES, storage=request.param)
    halves = [
        built(
            folder / letter,
            {name: data for name, data in PICTURES.items() if name[0] == letter},
            storage=request.param,
        )
        for letter in "ab"
    ]
    return whole, join(halves)


@pytest.mark.parametrize("order", ["random", "pages"])
def test_training_reads_from_several_files_what_it_reads_from_one(whole_and_joined, order: str) -> None:
    run = settings_for()
    run = run.model_copy(update={"data": run.data.model_copy(update={"order": order})})
    seen = []
    for file in whole_and_joined:
        loader = TrainLoader(file, run, rank=0, ranks=1, micro_images=2)
        seen.append(
            {
                int(image): crops.clone()
                for batch in loader.batches(0, loader.steps_per_epoch)
                for image, crops in zip(batch.index, batch.crops, strict=True)
            }
        )
    assert seen[0].keys() == seen[1].keys() == set(range(8))
    assert all(torch.equal(crops, seen[1][image]) for image, crops in seen[0].items())


def test_evaluation_too(whole_and_joined) -> None:
    whole, joined = (
        torch.cat([batch.crops.clone() for batch in eval_batches(file, settings_for().views, batch_images=3)])
        for file in whole_and_joined
    )
    assert torch.equal(whole, joined)


def test_an_image_is_called_by_its_name_and_its_file(whole_and_joined) -> None:
    whole, joined = whole_and_joined
    assert joined.names == whole.names
    assert joined.describe(5).startswith("image 5 of all, in ") and "b.beton (b1.jpg)" in joined.describe(5)
    assert whole.describe(5) == "image 5 (b1.jpg)"
    assert joined.stored(6) == whole.stored(6)
    assert joined.take(np.array([6])).stored(0) == whole.stored(6)


def test_the_manifest_speaks_of_all_images(whole_and_joined) -> None:
    whole, joined = (file.manifest for file in whole_and_joined)
    assert (joined.images, joined.width_px, joined.height_px) == (8, whole.width_px, whole.height_px)
    assert joined.mean == pytest.approx(whole.mean) and joined.std == pytest.approx(whole.std)


def test_a_file_without_labels_stands_beside_one_with(tmp_path: Path) -> None:
    labelled = built(tmp_path / "l", {"ant/1.png": png(1), "bee/1.png": png(2)})
    both = join([built(tmp_path / "u", {"1.png": png(3)}), labelled])
    assert both.manifest.classes == ("ant", "bee") and both.manifest.unlabelled == 1
    assert both.labels.tolist() == [-1, 0, 1]


def test_one_file_stays_what_it_is(tmp_path: Path) -> None:
    file = built(tmp_path / "one", {"1.png": png(1)})
    assert join([file]) is file


def test_what_makes_no_set_is_refused(tmp_path: Path) -> None:
    ants = built(tmp_path / "ants", {"ant/1.png": png(1), "bee/1.png": png(2)})
    again = built(tmp_path / "again", {"ant/1.png": png(1), "bee/1.png": png(2)})
    cats = built(tmp_path / "cats", {"ant/1.png": png(3), "cat/1.png": png(4)})
    small = built(tmp_path / "small", {"ant/1.png": png(5), "bee/1.png": png(6)}, side_px=16)
    with pytest.raises(DataError, match=r"again\.beton holds the same images as .*ants\.beton"):
        join([ants, again])
    with pytest.raises(DataError, match=r"class 1 is 'cat' there, 'bee' here"):
        join([ants, cats])
    with pytest.raises(DataError, match=r"small\.beton stores its images otherwise \(raw, at most 16 px\)"):
        join([ants, small])


def test_the_deviation_is_over_all_files(tmp_path: Path) -> None:
    """Two files of one grey each have no deviation; together they have."""
    greys = [np.full_like(photo(0), level) for level in (0, 255)]
    black, white = (
        built(tmp_path / name, {"1.png": encode(grey, "PNG")}) for name, grey in zip("bw", greys, strict=True)
    )
    assert join([black, white]).manifest.std == pytest.approx((0.5, 0.5, 0.5))
