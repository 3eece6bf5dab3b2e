"""One image to the view that evaluation has of it, to the bit.

A run is evaluated on a .beton file, whose images were reduced and stored when it was built. So any other
image is stored in the same way first, in memory, and the kernels cut its view from that.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from vitds.data.draws import centre_views
from vitds.data.images import LeftOut, Storing, decode_stored, store_image
from vitds.data.trees import SourceImage
from vitds.errors import DataError
from vitds.kernels.views import JPEG, RAW, cut_views, error_text
from vitds.use.images import NamedImage


def view_of(image: NamedImage, storing: Storing, crop_px: int) -> UInt8[np.ndarray, "3 S S"] | LeftOut:
    """The evaluation view of an image, or why there is none.

    Args:
        image: of a file or in memory; one of a .beton file is taken as it is stored there.
        storing: how the images of the run were stored.
        crop_px: S.
    """
    found = _stored(image, storing)
    if isinstance(found, LeftOut):
        return found
    data, is_jpeg, height, width = found
    specs = centre_views(crop_px, [height], [width])
    views, status = cut_views([data], [JPEG if is_jpeg else RAW], [(height, width)], specs, crop_px)
    if status[0]:
        return LeftOut("damaged", error_text(int(status[0])))
    return views[0, 0]


def whole_picture(image: NamedImage, storing: Storing) -> NDArray[np.uint8] | LeftOut:
    """All pixels (H, W, 3) of an image as it is stored, to be looked at, or why there are none."""
    found = _stored(image, storing)
    if isinstance(found, LeftOut):
        return found
    try:
        return decode_stored(*found)
    except DataError as error:
        return LeftOut("damaged", str(error))


def _stored(image: NamedImage, storing: Storing) -> tuple[bytes, bool, int, int] | LeftOut:
    """Bytes, whether they are a JPEG, height and width."""
    if isinstance(image, SourceImage):
        stored = store_image(image, storing)
        if isinstance(stored, LeftOut):
            return stored
        return stored.data, stored.is_jpeg, stored.height, stored.width
    try:
        with open(image.path, "rb") as file:
            file.seek(image.offset)
            return file.read(image.size), image.is_jpeg, image.height, image.width
    except OSError as error:
        return LeftOut("unreadable", error.strerror or str(error))
