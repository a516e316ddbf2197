"""From a record's bytes to a sample; everything random is drawn from (seed, purpose, position).

Resizing is bicubic with antialiasing, as the reference's (golden notes 32 and 33), by torch's uint8 kernel: within one
grey level of Pillow's and several times as fast.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from blipdiff_train.common.images import FORMATS, MAX_PIXELS, Header, plain_header
from blipdiff_train.common.rng import HashedUniform, numpy_generator
from blipdiff_train.context import composite
from blipdiff_train.data.samples import Stage1Sample, Stage2Sample
from blipdiff_train.data.shards import SampleError, ShardSet

PHOTO_SUFFIXES = ("jpg", "jpeg", "png", "webp")
FOREGROUND_SUFFIXES = ("fg.jpg", "fg.png")
ALPHA_SUFFIX = "alpha.png"
LATENT_SUFFIX = "latent.npy"

_BACKGROUND_DRAWS = 8
# to be added to a colour flag: the "grey" ones are the bare factor, the "colour" ones would also ask for BGR
_REDUCED = (
    (8, cv2.IMREAD_REDUCED_GRAYSCALE_8),
    (4, cv2.IMREAD_REDUCED_GRAYSCALE_4),
    (2, cv2.IMREAD_REDUCED_GRAYSCALE_2),
)
_EXIF_ORIENTATION = 0x0112

Record = Mapping[str, bytes | str]


# -------------------------------------------------------------------------------------------------- members to arrays


def decode_photo(
    record: Record,
    suffixes: Sequence[str] = PHOTO_SUFFIXES,
    *,
    max_pixels: int = MAX_PIXELS,
    shrink_to: int | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """The first of ``suffixes`` that is there, decoded and upright.

    Args:
        record: a sample's members.
        suffixes: in order of preference.
        max_pixels: limit of width × height, checked on the header.
        shrink_to: a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as its shorter side keeps this many pixels.

    Returns:
        The image (H W 3 uint8) and the (height, width) it has without shrinking.

    Raises:
        SampleError: missing, not an image, truncated, too large.
    """
    for suffix in suffixes:
        if suffix in record:
            return _decode(record[suffix], "RGB", _name(record, suffix), max_pixels, shrink_to)
    raise SampleError("missing member", f"{_name(record)} has none of {', '.join('.' + suffix for suffix in suffixes)}")


def decode_alpha(record: Record, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The matte: H W uint8, 255 is subject.

    Raises:
        SampleError: missing, not an image, truncated, too large, or without a pixel that is subject by half.
    """
    if ALPHA_SUFFIX not in record:
        raise SampleError("missing member", f"{_name(record)} has no .{ALPHA_SUFFIX}")
    alpha_matte, _ = _decode(record[ALPHA_SUFFIX], "L", _name(record, ALPHA_SUFFIX), max_pixels, None)
    if alpha_matte.size == 0 or alpha_matte.max() < 128:
        raise SampleError("empty matte", f"{_name(record, ALPHA_SUFFIX)}: no pixel is subject")
    return alpha_matte


def _decode(
    data: bytes, mode: str, name: str, max_pixels: int, shrink_to: int | None
) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        header, as_stored, image = plain_header(data), True, None
        if header is None:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            header = Header(image.format, image.mode, *image.size)
            turned = "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1
            as_stored = header.format in ("JPEG", "PNG") and "transparency" not in image.info and not turned
        width, height = header.width, header.height
        if width * height > max_pixels:
            raise SampleError("image too large", f"{name}: {width}×{height} pixels, limit {max_pixels} in all")
        # grey from colours is left to Pillow: the two libraries weigh the channels differently
        if as_stored and (header.mode == mode or (header.mode, mode) == ("L", "RGB")):
            return _decode_opencv(data, header, mode, shrink_to), (height, width)
        image = image or Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            if image.getexif()[_EXIF_ORIENTATION] in (5, 6, 7, 8):
                width, height = height, width
            image = ImageOps.exif_transpose(image)
        if image.mode != mode:
            # 16 bits a pixel would be clipped, not scaled, by convert
            image = image.point(lambda value: value / 256, "L") if image.mode.startswith("I") else image.convert(mode)
            image = image.convert(mode)
        return np.array(image), (height, width)  # a copy: torch wants memory it may write to
    except SampleError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, on the header too
        raise SampleError("image too large", f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise SampleError("not an image", f"{name}: not a {', '.join(FORMATS)} image") from error
    except Exception as error:  # decoders raise what they like on broken files: OSError, SyntaxError, struct.error, …
        if isinstance(error, MemoryError):
            raise
        raise SampleError("undecodable image", f"{name}: cannot be decoded: {error}") from error


def _decode_opencv(data: bytes, header: Header, mode: str, shrink_to: int | None) -> np.ndarray:
    """JPEGs and 8-bit PNGs as they are stored: the bytes Pillow gives, without its detour over four channels."""
    flags, factor = cv2.IMREAD_GRAYSCALE if mode == "L" else cv2.IMREAD_COLOR_RGB, 1
    if shrink_to is not None and header.format == "JPEG" and mode == "RGB":
        shorter = min(header.width, header.height)
        factor, reduced = next((pair for pair in _REDUCED if shorter >= pair[0] * shrink_to), (1, 0))
        flags |= reduced
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise OSError("truncated or corrupt")
    if pixels.shape[:2] != (-(-header.height // factor), -(-header.width // factor)):
        raise OSError(f"its pixels are {pixels.shape[:2]}, its header says {header.height, header.width}")
    return pixels


def read_info(record: Record) -> dict[str, object]:
    """The sample's JSON, with ``"caption"`` from ``.txt`` when that is there; an empty dict without a ``.json``.

    Raises:
        SampleError: not JSON, not an object, or not UTF-8.
    """
    info: dict[str, object] = {}
    if "json" in record:
        try:
            info = json.loads(record["json"])
        except (ValueError, RecursionError) as error:
            raise SampleError("bad json", f"{_name(record, 'json')}: {error}") from error
        if not isinstance(info, dict):
            raise SampleError("bad json", f"{_name(record, 'json')}: {type(info).__name__}, expected an object")
    if "txt" in record:
        try:
            info["caption"] = record["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError("bad text", f"{_name(record, 'txt')}: not UTF-8") from error
    return info


def text_field(record: Record, info: Mapping[str, object], field: str) -> str:
    """A non-empty text of the sample's JSON, stripped.

    Raises:
        SampleError: missing, empty, or not text.
    """
    value = info.get(field)
    if not isinstance(value, str) or not value.strip():
        raise SampleError(f"missing {field}", f"{_name(record)}: {field} is {value!r:.60}, expected a text")
    return value.strip()


def stage2_texts(record: Record, info: Mapping[str, object]) -> tuple[str, str, str]:
    """Category, caption and prompt; caption and prompt stand in for each other where one is not there.

    Raises:
        SampleError: see :func:`text_field`.
    """
    subject_text = text_field(record, info, "subject")
    fields = ("caption" if "caption" in info else "prompt", "prompt" if "prompt" in info else "caption")
    caption, prompt = (text_field(record, info, field) for field in fields)
    return subject_text, caption, prompt


def image_number(record: Record, info: Mapping[str, object]) -> int:
    """What samples of one photograph share, int64 ≥ 0: made from the JSON's ``image_id``, or else from the key."""
    identity = info.get("image_id", record["__key__"])
    digest = hashlib.blake2b(f"{type(identity).__name__}:{identity}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def decode_latent(record: Record) -> Tensor:
    """Cached VAE moments (2C h w float32); that they are of the right VAE is the store's business.

    Raises:
        SampleError: missing, not a plain float array, not finite.
    """
    name = _name(record, LATENT_SUFFIX)
    if LATENT_SUFFIX not in record:
        raise SampleError("missing latent", f"{name}: the record comes without it")
    stream = io.BytesIO(record[LATENT_SUFFIX])
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = readers[version](stream)
        data = record[LATENT_SUFFIX][stream.tell() :]
        if fortran or dtype.kind != "f" or len(shape) != 3 or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{dtype} {shape} in {len(data)} bytes")
        moments = np.frombuffer(data, dtype).reshape(shape).astype(np.float32)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise SampleError("bad latent", f"{name}: expected a (2C, h, w) float array: {error}") from error
    if not np.isfinite(moments).all():
        raise SampleError("bad latent", f"{name}: NaN or infinite")
    return torch.from_numpy(moments)


def _name(record: Record, suffix: str | None = None) -> str:
    return f"{record.get('__shard__', 'record')}: {record.get('__key__', '?')}" + (f".{suffix}" if suffix else "")


# --------------------------------------------------------------------------------------------------- arrays to arrays


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing: H W 3 uint8 to ``height width 3`` uint8."""
    if image.shape[:2] == (height, width):
        return image
    return composite.resize_antialiased(image, height, width, "bicubic")


def resize_and_crop(image: np.ndarray, size: int, generator: np.random.Generator | None = None) -> np.ndarray:
    """Shorter side to ``size``, then a square crop: the middle, or at random with a generator."""
    rows, columns = image.shape[:2]
    # as torchvision: the longer side is cut to a whole number, the offset rounded
    if rows <= columns:
        height, width = size, max(size, int(size * columns / rows))
    else:
        height, width = max(size, int(size * rows / columns)), size
    image = resize(image, height, width)
    share_top, share_left = (0.5, 0.5) if generator is None else generator.random(2)
    top, left = round((height - size) * share_top), round((width - size) * share_left)
    return image[top : top + size, left : left + size]


def random_resized_crop(image: np.ndarray, size: int, generator: np.random.Generator, min_scale: float) -> np.ndarray:
    """A random part of ``min_scale``..1 of the area, sides 3:4 to 4:3, resized to ``size size 3``; as torchvision's."""
    rows, columns = image.shape[:2]
    for _ in range(10):
        area = rows * columns * generator.uniform(min_scale, 1.0)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < width <= columns and 0 < height <= rows:
            top, left = generator.integers(0, rows - height + 1), generator.integers(0, columns - width + 1)
            return resize(image[top : top + height, left : left + width], size, size)
    return resize_and_crop(image, size)


def drawn_background(size: int, generator: np.random.Generator) -> np.ndarray:
    """A background for when there are no photographs of any: one colour, or soft blotches. ``size size 3`` uint8."""
    cells = (1, 2, 4, 8)[int(generator.integers(4))]
    coarse = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)


# -------------------------------------------------------------------------------------------------------- the stages


@dataclass
class Stage1Transform:
    """Photograph and caption → :class:`Stage1Sample`.

    Args:
        image_size: S.
        seed: of the run.
        train: False takes the middle of the photograph, never mirrored.
        min_crop_scale: smallest share of the photograph's area in a training crop; 1 takes the middle as in validation.
            LAVIS trains with 0.5.
        flip_probability: of a left-right mirroring in training; LAVIS 0.5.
        max_pixels: see :func:`decode_photo`.
    """

    image_size: int
    seed: int
    train: bool = True
    min_crop_scale: float = 0.5
    flip_probability: float = 0.5
    max_pixels: int = MAX_PIXELS

    suffixes = (*PHOTO_SUFFIXES, "json", "txt")

    def __call__(self, record: Record, position: int) -> Stage1Sample:
        """Raises: SampleError, with the cause."""
        info = read_info(record)
        caption = text_field(record, info, "caption")
        image, _ = decode_photo(record, max_pixels=self.max_pixels, shrink_to=2 * self.image_size)
        if self.train:
            generator = numpy_generator(self.seed, "crop", position)
            flip = generator.random() < self.flip_probability
            if self.min_crop_scale < 1:
                image = random_resized_crop(image, self.image_size, generator, self.min_crop_scale)
            else:
                image = resize_and_crop(image, self.image_size)
            image = image[:, ::-1] if flip else image
        else:
            image = resize_and_crop(image, self.image_size)
        return Stage1Sample(
            image=image,
            caption=caption,
            image_id=image_number(record, info),
            key=str(record["__key__"]),
            position=position,
        )


@dataclass
class Stage2Transform:
    """Annotated photograph → :class:`Stage2Sample`: the subject on another background, and the photograph to draw.

    Args:
        image_size: S, side of the subject image.
        target_size: H = W, side of the target; the composite is made at this size and then resized to S.
        seed: of the run.
        backgrounds: photographs to put subjects on; drawn ones if None.
        report: called with a :class:`SampleError`, shard and key for each bad background; another is taken then.
        train: False never drops the subject.
        drop_subject_probability: paper 0.15.
        random_target_crop: False takes the middle, as the reference (golden note 33).
        subject_scale: range of the subject's longest side as a share of the canvas.
        flip_probability: of mirroring the subject on its background; the target is never mirrored.
        cached_latents: the target's VAE moments come with the record and take its place.
        max_pixels: see :func:`decode_photo`.
    """

    image_size: int
    target_size: int
    seed: int
    backgrounds: ShardSet | None = None
    report: Callable[[SampleError, str, str], None] | None = None
    train: bool = True
    drop_subject_probability: float = 0.15
    random_target_crop: bool = False
    subject_scale: tuple[float, float] = (0.5, 0.95)
    flip_probability: float = 0.5
    cached_latents: bool = False
    max_pixels: int = MAX_PIXELS

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Members to read."""
        return (*PHOTO_SUFFIXES, *FOREGROUND_SUFFIXES, ALPHA_SUFFIX, "json", "txt")

    def __call__(self, record: Record, position: int) -> Stage2Sample:
        """Raises: SampleError, with the cause."""
        info = read_info(record)
        subject_text, caption, prompt = stage2_texts(record, info)
        alpha_matte = decode_alpha(record, max_pixels=self.max_pixels)

        foreground = photo = target_image = latent_moments = None
        has_foreground = any(suffix in record for suffix in FOREGROUND_SUFFIXES)
        if not self.cached_latents or not has_foreground:
            photo, full_size = self._photo(record)
            _check_size(record, alpha_matte, full_size)
        if has_foreground:
            foreground, full_size = decode_photo(
                record, FOREGROUND_SUFFIXES, max_pixels=self.max_pixels, shrink_to=2 * self.target_size
            )
            _check_size(record, alpha_matte, full_size)
        if self.cached_latents:
            latent_moments = decode_latent(record)
        else:
            target_image = self._target(photo, position)

        generator = HashedUniform(self.seed, "subject", position)
        dropped = generator.random(1)[0] < self.drop_subject_probability
        colours = foreground if has_foreground else photo
        return Stage2Sample(
            subject_image=self._subject_image(colours, alpha_matte, position, generator),
            target_image=target_image,
            latent_moments=latent_moments,
            subject_text=subject_text,
            prompt=prompt,
            subject_dropped=bool(self.train and dropped),
            caption=caption,
            key=str(record["__key__"]),
            position=position,
        )

    def target(self, record: Record) -> np.ndarray:
        """The target (H W 3 uint8) alone, as a sample has it that is not cropped at random: what latents are made of.

        Raises:
            SampleError: missing, not an image, truncated, too large.
        """
        return self._target(self._photo(record)[0], 0)

    def _photo(self, record: Record) -> tuple[np.ndarray, tuple[int, int]]:
        # twice the size asked for: decoding at a fraction must not cost the target or a small subject its detail
        return decode_photo(record, max_pixels=self.max_pixels, shrink_to=2 * self.target_size)

    def _target(self, photo: np.ndarray, position: int) -> np.ndarray:
        random_crop = self.train and self.random_target_crop
        crop = numpy_generator(self.seed, "target_crop", position) if random_crop else None
        return resize_and_crop(photo, self.target_size, crop)

    def _subject_image(
        self, foreground: np.ndarray, alpha_matte: np.ndarray, position: int, generator: HashedUniform
    ) -> np.ndarray:
        if alpha_matte.shape != foreground.shape[:2]:  # the photograph was decoded at a fraction
            alpha_matte = cv2.resize(alpha_matte, foreground.shape[1::-1], interpolation=cv2.INTER_AREA)
        blended, _ = composite.blend_on_background(
            foreground,
            alpha_matte,
            self._background(position, generator),
            size_px=self.target_size,
            generator=generator,
            scale=self.subject_scale,
            flip_probability=self.flip_probability,
        )
        return resize(blended, self.image_size, self.image_size)

    def _background(self, position: int, generator: HashedUniform) -> np.ndarray:
        """A photograph, or a drawn background when there are none or eight in a row are bad.

        ``generator`` gives the same count of numbers whatever is bad, so that the placement drawn next stays.
        """
        if self.backgrounds is not None:
            for draw in generator.random(_BACKGROUND_DRAWS):
                index = int(draw * len(self.backgrounds))
                try:
                    record = self.backgrounds.read(index, PHOTO_SUFFIXES)
                    return decode_photo(record, max_pixels=self.max_pixels, shrink_to=self.target_size)[0]
                except SampleError as error:
                    if self.report is not None:
                        shard, _ = self.backgrounds.locate(index)
                        self.report(error, self.backgrounds.shards[shard].name, self.backgrounds.key(index))
        return drawn_background(self.target_size, numpy_generator(self.seed, "background", position))


def _check_size(record: Record, alpha_matte: np.ndarray, size: tuple[int, int]) -> None:
    if alpha_matte.shape != size:
        raise SampleError("matte size", f"{_name(record)}: matte {alpha_matte.shape} but photograph {size}")
