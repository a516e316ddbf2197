"""Members to tensors: as the reference resizes, upright, bounded, and typed errors for everything broken."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_makers import annotated, disc, picture

from blipdiff_train.common.images import plain_header
from blipdiff_train.data import transforms
from blipdiff_train.data.pixels import CLIP_MEAN, CLIP_STD, TARGET, Normalisation
from blipdiff_train.data.samples import background_record, stage2_record
from blipdiff_train.data.shards import SampleError, ShardSet, write_shards
from blipdiff_train.data.transforms import Stage1Transform, Stage2Transform, decode_photo


def encode(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def record(**members):
    return {"__key__": "k", "__shard__": "s.tar", **{k.replace("_", "."): v for k, v in members.items()}}


@pytest.mark.parametrize("size", [(100, 160), (160, 100), (64, 64), (40, 50)])
def test_resize_and_crop_is_pillows_within_a_grey_level(size):
    image = picture(3, *size)
    rows, columns = size
    factor = 64 / min(size)
    height, width = max(64, int(rows * factor + 1e-9)), max(64, int(columns * factor + 1e-9))
    expected = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 64) / 2), round((height - 64) / 2)
    expected = np.asarray(expected.crop((left, top, left + 64, top + 64))).astype(int)
    assert np.abs(transforms.resize_and_crop(image, 64).astype(int) - expected).max() <= 1


def test_a_batch_is_normalised_as_clips_each_image_alone_like_with_others():
    images = [picture(1), picture(2)[:, ::-1], picture(3, 96, 128)[::2, ::2]]  # views, as crops and mirrorings are
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    batch = Normalisation()(images)
    assert batch.shape == (3, 3, 48, 64)
    for image, row in zip(images, batch, strict=True):
        expected = (torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(row, expected, atol=2e-6, rtol=1e-6)
        assert torch.equal(Normalisation()([image])[0], row)
    target = TARGET([np.stack([np.full((2, 2), value, np.uint8) for value in (0, 51, 255)], axis=2)])
    torch.testing.assert_close(target[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    with pytest.raises(ValueError, match="expected one size"):
        TARGET([picture(1), picture(2, 10, 10)])


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_photographs_decode_as_pillow_decodes_them(kind, options):
    data = encode(picture(5), kind, **options)
    suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    decoded, size = decode_photo(record(**{suffix: data}))
    assert size == (48, 64)
    assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_turned_grey_palette_and_transparent_photographs():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, size = decode_photo(record(jpg=encode(picture(5), "JPEG", quality=95, exif=exif.tobytes())))
    assert turned.shape == (64, 48, 3)
    assert size == (64, 48)
    for image in (Image.fromarray(picture(5)).convert(mode) for mode in ("L", "P", "RGBA", "1", "LA")):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        assert decode_photo(record(png=buffer.getvalue()))[0].shape == (48, 64, 3)


def test_large_jpegs_are_decoded_at_a_fraction_but_never_below_what_is_needed():
    data = encode(picture(5, 400, 600), "JPEG")
    assert decode_photo(record(jpg=encode(picture(5, 401, 607), "JPEG")), shrink_to=100)[0].shape == (101, 152, 3)
    for shrink_to, rows in ((400, 400), (201, 400), (200, 200), (100, 100), (50, 50), (10, 50), (None, 400)):
        decoded, size = decode_photo(record(jpg=data), shrink_to=shrink_to)
        assert decoded.shape[0] == rows
        assert size == (400, 600)


def test_an_image_bomb_is_refused_by_its_header():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(SampleError, match="50000×50000 pixels, limit") as error:
        decode_photo(record(png=bomb))
    assert error.value.cause == "image too large"
    with pytest.raises(SampleError, match="50000×50000 pixels, limit"):
        transforms.decode_alpha(record(alpha_png=bomb))
    with pytest.raises(SampleError, match="64×48 pixels, limit 3000") as error:
        decode_photo(record(png=encode(picture(5), "PNG")), max_pixels=3000)
    assert error.value.cause == "image too large"


def test_plain_headers_are_what_pillow_reads_and_the_rest_is_left_to_it():
    def file(mode, kind, **options):
        buffer = io.BytesIO()
        Image.fromarray(picture(5, 37, 53)).convert(mode).save(buffer, kind, **options)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    plain = [file(mode, kind) for mode in ("L", "RGB") for kind in ("JPEG", "PNG")]
    plain += [file("RGB", "JPEG", progressive=True, comment=b"c", icc_profile=b"p" * 70_000, dpi=(72, 72))]
    plain += [cv2.imencode(suffix, picture(5, 37, 53))[1].tobytes() for suffix in (".jpg", ".png")]
    for data in plain:
        image = Image.open(io.BytesIO(data))
        assert plain_header(data) == (image.format, image.mode, 53, 37)
    others = [file(mode, "PNG") for mode in ("P", "RGBA", "LA", "1", "I;16")] + [file("CMYK", "JPEG")]
    others += [file("RGB", "PNG", transparency=(1, 2, 3)), file("RGB", "WEBP")]
    others += [file("RGB", kind, exif=exif.tobytes()) for kind in ("JPEG", "PNG")]
    others += [b"", b"\xff\xd8", plain[1][:30], plain[0][:25], b"\xff\xd8" + plain[0], b"GIF89a" + bytes(40)]
    assert [plain_header(data) for data in others] == [None] * len(others)


def test_a_header_that_lies_about_the_pixels_is_a_typed_error():
    data = encode(picture(5, 300, 400), "JPEG")
    frame = data.index(b"\xff\xc0")
    small = data[frame : frame + 5] + (8).to_bytes(2, "big") * 2 + data[frame + 9 : frame + 19]
    with pytest.raises(SampleError, match="cannot be decoded") as error:
        decode_photo(record(jpg=data[:frame] + small + data[frame:]), max_pixels=1000)
    assert error.value.cause == "undecodable image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_typed_errors(kind):
    data = encode(picture(5), kind)
    for share in (0.1, 0.5, 0.95):
        with pytest.raises(SampleError) as error:
            decode_photo(record(jpg=data[: int(len(data) * share)]))
        assert error.value.cause in ("undecodable image", "not an image")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz_damaged_images_are_images_or_typed_errors(data):
    raw = bytearray(encode(picture(5, 20, 30), data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded, _ = decode_photo(record(jpg=bytes(raw)), max_pixels=10_000)
    except SampleError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.size <= 30_000


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_fuzz_any_json_is_an_object_or_a_typed_error(data):
    try:
        info = transforms.read_info(record(json=data, txt=data))
    except SampleError as error:
        assert error.cause in ("bad json", "bad text")  # noqa: PT017
        return
    assert isinstance(info, dict)


def test_deeply_nested_json_is_a_typed_error():
    with pytest.raises(SampleError, match=r"k\.json"):
        transforms.read_info(record(json=b"[" * 100_000))


def test_latents_take_the_target_s_place_and_only_plain_arrays_are_read():
    moments = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float16)
    buffer = io.BytesIO()
    np.save(buffer, moments)
    good = {**annotated(1), "latent.npy": buffer.getvalue()}
    good["json"] = b'{"caption": "a", "subject": "dog"}'
    transform = Stage2Transform(image_size=16, target_size=32, seed=0, cached_latents=True)
    sample = transform(good, 0)
    assert sample.target_image is None
    assert torch.equal(sample.latent_moments, torch.from_numpy(moments.astype(np.float32)))
    buffer = io.BytesIO()
    np.save(buffer, np.full((8, 4, 4), np.nan, np.float32))
    lying = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000, 1000), }".ljust(118)
    )
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    for data, cause in ((buffer.getvalue(), "bad latent"), (lying, "bad latent"), (pickled.getvalue(), "bad latent")):
        with pytest.raises(SampleError) as error:
            transform({**good, "latent.npy": data}, 0)
        assert error.value.cause == cause
    del good["latent.npy"]
    with pytest.raises(SampleError, match=r"latent\.npy: the record comes without it"):
        transform(good, 0)


def test_stage2_puts_the_subject_on_another_background_and_keeps_the_target():
    image = np.full((40, 40, 3), (200, 10, 10), np.uint8)
    alpha = np.zeros((40, 40), np.uint8)
    alpha[10:30, 10:30] = 255
    image[alpha == 255] = (10, 200, 10)
    sample = stage2_record("k", image, alpha, subject="dog", caption="a green dog", prompt="a dog")
    sample["json"] = b'{"caption": "a green dog", "subject": "dog", "prompt": "a dog"}'
    transform = Stage2Transform(image_size=32, target_size=40, seed=3)
    result = transform(sample, 5)
    assert (result.prompt, result.caption, result.subject_text) == ("a dog", "a green dog", "dog")
    assert np.array_equal(result.target_image, image)
    pixels = result.subject_image.reshape(-1, 3).astype(int)
    assert (np.abs(pixels - (10, 200, 10)).max(1) <= 2).mean() > 0.2
    assert (np.abs(pixels - (200, 10, 10)).max(1) <= 40).mean() < 0.05
    assert np.array_equal(transform(sample, 5).subject_image, result.subject_image)
    assert not np.array_equal(transform(sample, 6).subject_image, result.subject_image)


def test_a_bad_background_changes_nothing_but_the_background(tmp_path):
    """All backgrounds are of one colour, so that nothing may change."""
    grey = encode(np.full((40, 50, 3), 90, np.uint8), "PNG")
    for name, bad in (("good", ()), ("bad", (0, 2))):
        files = [grey[:60] if number in bad else grey for number in range(4)]
        write_shards((background_record(f"b{n}", data) for n, data in enumerate(files)), tmp_path / name)
    told = []
    good, bad = (
        Stage2Transform(
            image_size=32,
            target_size=40,
            seed=3,
            backgrounds=ShardSet(str(tmp_path / name)),
            report=lambda error, shard, key: told.append(key),
        )
        for name in ("good", "bad")
    )
    sample = {**annotated(1), "json": b'{"caption": "a dog", "subject": "dog"}'}
    for position in range(12):
        assert np.array_equal(good(sample, position).subject_image, bad(sample, position).subject_image)
    assert set(told) == {"b0", "b2"}


def test_stage1_crops_at_random_in_training_and_in_the_middle_in_validation():
    sample = {**annotated(2), "json": b'{"caption": " a dog ", "image_id": 7}'}
    train = Stage1Transform(image_size=16, seed=0)
    images = [train(sample, position).image for position in range(6)]
    assert np.array_equal(train(sample, 0).image, images[0])
    assert all(not np.array_equal(images[0], other) for other in images[1:])
    calm = Stage1Transform(image_size=16, seed=0, train=False)
    assert np.array_equal(calm(sample, 0).image, calm(sample, 1).image)
    middle = Stage1Transform(image_size=16, seed=0, min_crop_scale=1.0, flip_probability=0.0)
    assert np.array_equal(middle(sample, 0).image, calm(sample, 0).image)
    assert calm(sample, 0).caption == "a dog"
    other = {**sample, "__key__": "another"}
    assert calm(sample, 0).image_id == calm(other, 0).image_id
    del other["json"]
    other["txt"] = b"a cat"
    assert calm(other, 0).caption == "a cat"
    assert calm(other, 0).image_id != calm(sample, 0).image_id


def test_sixteen_bit_mattes_are_scaled_not_clipped():
    alpha = cv2.imencode(".png", disc().astype(np.uint16) * 257)[1].tobytes()
    assert np.abs(transforms.decode_alpha(record(alpha_png=alpha)).astype(int) - disc()).max() <= 1
