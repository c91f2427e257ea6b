"""The content of an image file as an image."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from vmkd_fx.errors import DataError


def decoded(content: bytes) -> Image.Image:
    """An image in RGB.

    Raises:
        DataError: the content is empty or of no known format; damaged ones meet Pillow's own errors.
    """
    if not content:
        raise DataError("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError("no image of a known format") from error
