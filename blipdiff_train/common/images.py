"""Decode images that came from outside: the size is read from the header before a pixel is decoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Default limit; a photograph of 100 megapixels decodes to 300 MB."""

FORMATS = ("JPEG", "PNG", "WEBP")
"""Only these decoders run on foreign bytes: fewer parsers, fewer holes."""


class Header(NamedTuple):
    """What an image file says of itself: ``format`` and ``mode`` in Pillow's words, size in pixels."""

    format: str
    mode: str
    width: int
    height: int


def plain_header(data: bytes) -> Header | None:
    """The header of a JPEG or PNG of 8 bits a channel, grey or RGB, that is shown as it is stored.

    None for everything else, for Pillow to judge: EXIF (which may turn the image), transparency, palettes, CMYK, 16
    bits, WebP, and files with anything unusual before their pixels. Pillow's own look at a header takes several times
    as long, a noticeable part of loading a training image.
    """
    if data[:2] == b"\xff\xd8":
        return _plain_jpeg(data)
    return _plain_png(data) if data[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" else None


def _plain_jpeg(data: bytes) -> Header | None:
    """ITU-T T.81, annex B: segments of marker and length up to the frame header."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended and progressive, Huffman-coded
            mode = {1: "L", 3: "RGB"}.get(data[position + 9])
            if mode is None or data[position + 4] != 8:
                return None
            height, width = (int.from_bytes(data[position + n : position + n + 2], "big") for n in (5, 7))
            return Header("JPEG", mode, width, height) if width and height else None
        # tables, comments and application data other than EXIF and XMP
        if length < 2 or not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or (0xE0 <= marker <= 0xEF and marker != 0xE1)):
            return None
        position += 2 + length
    return None


def _plain_png(data: bytes) -> Header | None:
    """W3C PNG, chapters 5 and 11: chunks of length, type, data and checksum up to the pixels."""
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    mode = {b"\x08\0": "L", b"\x08\2": "RGB"}.get(data[24:26])  # bits a channel, colour type
    if mode is None or not width or not height:
        return None
    position = 33
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        if kind == b"IDAT":
            return Header("PNG", mode, width, height)
        if kind in (b"tRNS", b"eXIf", b"acTL"):
            return None
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return None


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
        if image.mode.startswith("I"):
            # 16 bits of grey, which Pillow would clip at 255 and not scale
            image = image.convert("I").point(lambda value: value * (255 / 65535)).convert("L")
        return ImageOps.exif_transpose(image).convert(mode)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: {_what_else(data)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: far more pixels than the limit of {max_pixels}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(f"{name}: cannot be decoded: {error}") from error


_OTHER_FORMATS = (
    # (where, bytes there, name): ISO/IEC 23008-12 and the AVIF, GIF, TIFF and BMP formats
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")),
    (4, b"ftypavif", "AVIF"),
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF or camera raw"),
    (0, b"MM\0*", "TIFF or camera raw"),
    (0, b"BM", "BMP"),
)


def _what_else(data: bytes) -> str:
    """What bytes are that are none of :data:`FORMATS`, and what to do."""
    if not data:
        return "the file is empty"
    expected = f"only {', '.join(FORMATS)} are read"
    for start, mark, what in _OTHER_FORMATS:
        if data.startswith(mark, start):
            return f"a {what} image, {expected}; convert it, e.g. by ImageMagick's `magick FILE FILE.jpg`"
    return f"not an image, or a damaged one: {expected}"


def load_image(path: str | Path, *, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """:func:`decode_image` of a file.

    Raises:
        FileNotFoundError: no such file.
        ImageError: see :func:`decode_image`.
    """
    path = Path(path)
    return decode_image(path.read_bytes(), name=str(path), mode=mode, max_pixels=max_pixels)
