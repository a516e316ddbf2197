"""Decode images that came from outside: the size is read from the header before a pixel is decoded."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Default limit; a photograph of 100 megapixels decodes to 300 MB."""

FORMATS = ("JPEG", "PNG", "WEBP")
"""Only these decoders run on foreign bytes: fewer parsers, fewer holes."""


class ImageError(ValueError):
    """An image that cannot or must not be decoded; the message names it."""


def decode_image(data: bytes, *, name: str, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes into a PIL image of ``mode``, turned upright by its EXIF orientation.

    Args:
        data: the file's bytes.
        name: where they come from; stands in every error.
        mode: ``"RGB"`` or ``"L"``.
        max_pixels: upper limit of width × height, checked on the header; Pillow's own limit (179 million) holds too.

    Raises:
        ImageError: not an image of these formats, truncated, or larger than ``max_pixels``.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"{name}: {width}×{height} pixels, more than the limit of {max_pixels}")
        image.load()
        return ImageOps.exif_transpose(image).convert(mode)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a {', '.join(FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: far more pixels than the limit of {max_pixels}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(f"{name}: cannot be decoded: {error}") from error


def load_image(path: str | Path, *, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """:func:`decode_image` of a file.

    Raises:
        FileNotFoundError: no such file.
        ImageError: see :func:`decode_image`.
    """
    path = Path(path)
    return decode_image(path.read_bytes(), name=str(path), mode=mode, max_pixels=max_pixels)
