"""The Python side: the table of view specs, and refusals with their texts."""

from __future__ import annotations

import ctypes
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.pictures import photograph_parts, photographs, whole_spec
from vitds.errors import DataError, ResourceError, ShapeError
from vitds.kernels import views as kernels
from vitds.kernels.library import find_library
from vitds.kernels.views import (
    RAW,
    VIEW_SPEC,
    cut_stored,
    cut_views,
    error_text,
    kernel_error,
    library,
)

SIDE = 24
PICTURE = photograph_parts(48)[0]


def refusal(**fields: object) -> str:
    """Why a view spec is refused."""
    _, status = cut_views([PICTURE], [RAW], [(48, 48)], whole_spec(48, 48, SIDE, **fields)[None], SIDE)
    return error_text(int(status[0]))


def test_spec_has_the_size_that_the_header_asserts() -> None:
    assert VIEW_SPEC.itemsize == 96
    assert (
        f"sizeof(ViewSpec) == {VIEW_SPEC.itemsize}"
        in (Path(kernels.__file__).parent / "pixels.h").read_text()
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"top": -1}, {"left": -1}, {"top": 1}, {"left": 1}, {"height": 0}, {"width": 0}, {"height": 49},
        {"width": 2**31 - 1}, {"top": 2**31 - 1}, {"height": -(2**31)}, {"resized_height": 23},
        {"resized_width": 0}, {"resized_width": 65536}, {"out_top": 1}, {"out_left": -1},
        {"out_left": 2**31 - 1},
    ],
)  # fmt: skip
def test_box_or_window_outside_its_picture_is_refused(fields: dict) -> None:
    assert refusal(**fields) == "a view spec's box or window reaches outside its picture"


@pytest.mark.parametrize(
    "fields",
    [
        {"filter": 2}, {"filter": -1}, {"flip": 2}, {"flip": -1}, {"grey": 2}, {"solarise": 2},
        {"solarise": -1}, {"colour_order": (1, 2, 3, 5)}, {"brightness": -0.1}, {"brightness": np.nan},
        {"contrast": 3.1},
        {"saturation": np.inf}, {"hue": 0.51}, {"hue": np.nan}, {"blur_sigma": -1}, {"blur_sigma": 10.7},
        {"policy_op": (16, 0)}, {"policy_op": (0, -1)}, {"policy_op": (10, 0), "policy_value": (361, 0)},
        {"policy_op": (0, 5), "policy_value": (0, 9)}, {"policy_op": (3, 0), "policy_value": (np.nan, 0)},
        {"cutout_centre": (0.5, 1.1)},
    ],
)  # fmt: skip
def test_number_out_of_range_is_refused(fields: dict) -> None:
    assert refusal(**fields) == "a view spec holds a number that is out of range"


def test_raw_picture_of_another_length_is_refused() -> None:
    _, status = cut_views([PICTURE], [RAW], [(48, 47)], whole_spec(48, 47, SIDE)[None], SIDE)
    assert error_text(int(status[0])) == "a buffer does not have the length that its picture or views need"


@pytest.mark.parametrize(
    ("storage", "size"), [(2, (48, 48)), (RAW, (0, 48)), (RAW, (48, -1)), (RAW, (48, 65536))]
)
def test_unknown_storage_or_impossible_size_is_refused(storage: int, size: tuple[int, int]) -> None:
    _, status = cut_views([PICTURE], [storage], [size], whole_spec(48, 48, SIDE)[None], SIDE)
    assert error_text(int(status[0])) == "an argument is missing or out of range"


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    spec = whole_spec(48, 48, SIDE)[None]
    with pytest.raises(
        ShapeError, match=r"specs must be \(2, views\) of VIEW_SPEC, one row a source; it is \(1, 1\)"
    ):
        cut_views([PICTURE, PICTURE], [RAW, RAW], [(48, 48)] * 2, spec, SIDE)
    with pytest.raises(ShapeError, match=r"specs must be .* it is \(1, 1\) of float32"):
        cut_views([PICTURE], [RAW], [(48, 48)], np.zeros((1, 1), np.float32), SIDE)
    with pytest.raises(
        ShapeError, match=r"storages must be a C-contiguous \(1,\) array of int32; it is \(2,\)"
    ):
        cut_views([PICTURE], [RAW, RAW], [(48, 48)], spec, SIDE)
    with pytest.raises(
        ShapeError, match=r"a batch of 1 images, 1 views, side 4097 px: an argument is missing"
    ):
        cut_views([PICTURE], [RAW], [(48, 48)], spec, 4097)


def cut_into(out: np.ndarray, status: np.ndarray) -> None:
    """PICTURE, whole, into arrays of the caller's."""
    place, length = np.array([PICTURE.ctypes.data]), np.array([PICTURE.nbytes])
    storage, height, width = np.array([[RAW], [48], [48]], np.int32)
    cut_stored(place, length, storage, height, width, whole_spec(48, 48, SIDE)[None], out, status)


def test_results_that_have_no_room_for_the_views_are_refused() -> None:
    out, status = np.empty((1, 1, 3, SIDE, SIDE), np.uint8), np.empty(1, np.int32)
    with pytest.raises(
        ShapeError,
        match=r"out must be a C-contiguous \(1, 1, 3, 24, 24\) array of uint8; it is \(1, 1, 3, 23, 24\)",
    ):
        cut_into(out[:, :, :, 1:], status)
    with pytest.raises(
        ShapeError, match=r"status must be a C-contiguous \(1,\) array of int32; it is \(2,\)"
    ):
        cut_into(out, np.empty(2, np.int32))


@pytest.mark.parametrize(
    ("code", "kind"),
    [(-1, ShapeError), (-2, DataError), (-3, DataError), (-7, ShapeError), (-8, ResourceError)],
)
def test_error_codes_become_errors_for_people(code: int, kind: type) -> None:
    error = kernel_error(code, "flowers.beton, image 17")
    assert type(error) is kind and str(error) == f"flowers.beton, image 17: {error_text(code)}."


def test_missing_library_names_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "views.py"))
    with pytest.raises(ResourceError, match=r"there is no _pixels\*\.so in .*Run `bash launch/setup_env.sh`"):
        library.__wrapped__()
    (tmp_path / "_pixels.so").write_bytes(b"no library")
    with pytest.raises(ResourceError, match=r"cannot be loaded: .*Run `bash launch/setup_env.sh`"):
        library.__wrapped__()


def test_of_two_pythons_libraries_each_takes_its_own(tmp_path: Path) -> None:
    (tmp_path / "_pixels.cpython-310-x86_64-linux-gnu.so").touch()
    assert find_library(tmp_path, "_pixels").name == "_pixels.cpython-310-x86_64-linux-gnu.so"
    own = tmp_path / f"_pixels{sysconfig.get_config_var('EXT_SUFFIX')}"
    own.touch()
    assert find_library(tmp_path, "_pixels") == own and find_library(tmp_path, "_mix") is None


def test_views_do_not_depend_on_what_the_scratch_was_used_for_before() -> None:
    fresh = cut_views([PICTURE], [RAW], [(48, 48)], whole_spec(48, 48, 17, filter=1, blur_sigma=1)[None], 17)[
        0
    ]
    for picture in photographs()[:4]:  # other sizes, other tap tables
        for side in (9, 200):
            cut_views(
                [picture],
                [RAW],
                [picture.shape[:2]],
                whole_spec(*picture.shape[:2], side, filter=1, blur_sigma=3)[None],
                side,
            )
    again = cut_views([PICTURE], [RAW], [(48, 48)], whole_spec(48, 48, 17, filter=1, blur_sigma=1)[None], 17)[
        0
    ]
    assert np.array_equal(fresh, again)


def test_scratches_can_be_freed() -> None:
    memory = library().vitds_scratch_new()
    out = np.empty(PICTURE.size, np.uint8)
    assert (
        library().vitds_decode(
            PICTURE.ctypes.data, PICTURE.size, RAW, 48, 48, out.ctypes.data, out.nbytes, memory
        )
        == 0
    )
    library().vitds_scratch_free(ctypes.c_void_p(memory))
    library().vitds_scratch_free(None)
    assert np.array_equal(out, PICTURE.ravel())
