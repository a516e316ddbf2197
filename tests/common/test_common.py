"""The ground everything stands on: streams of randomness apart, files whole or absent, images bounded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from blipdiff_train.common import distributed, files, rng
from blipdiff_train.common.images import ImageError, decode_image, load_image
from blipdiff_train.common.shapes import check_shape


def test_a_seed_depends_on_every_argument_and_on_nothing_else() -> None:
    places = [(0, "noise"), (1, "noise"), (0, "crop"), (0, "noise", 0), (0, "noise", 1), (0, "noise", 0, 1)]
    places.append((0, "noise", 1, 0))
    seeds = [rng.derive_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [rng.derive_seed(*place) for place in places]
    assert all(0 <= seed < 2**63 for seed in seeds)
    # written down once: a change here would silently change every run that is resumed
    assert rng.derive_seed(0, "noise", 7) == 3541993843066589761


def test_generators_repeat_and_streams_differ() -> None:
    def draw(*place) -> torch.Tensor:
        return torch.randn(4, generator=rng.torch_generator(*place))

    assert torch.equal(draw(0, "noise", 5), draw(0, "noise", 5))
    assert not torch.equal(draw(0, "noise", 5), draw(0, "noise", 6))
    assert rng.numpy_generator(3, "crop", 1).random() == rng.numpy_generator(3, "crop", 1).random()
    with pytest.raises(ValueError, match="purpose"):
        rng.derive_seed(0, "")


def test_hashed_numbers_are_those_of_their_place_and_uniform():
    def drawn(*place, sizes=(30,)):
        numbers = rng.HashedUniform(*place)
        return [number for size in sizes for number in numbers.random(size)]

    assert drawn(3, "crop", 1) == drawn(3, "crop", 1, sizes=(1, 8, 0, 7, 14))
    assert drawn(0, "noise", 7)[8] == 0.9795487137813623  # of the second block; a change would change every resumed run
    places = [(3, "crop", 1), (4, "crop", 1), (3, "crop", 2), (3, "drop", 1), (3, "crop", 1, 0), (31, "crop")]
    assert len({number for place in places for number in drawn(*place)}) == 30 * len(places)
    many = np.array([drawn(0, "any", position, sizes=(4,)) for position in range(2000)])
    assert many.min() >= 0
    assert many.max() < 1
    shares = np.histogram(many, bins=10, range=(0, 1))[0] / many.size
    assert np.abs(shares - 0.1).max() < 0.015
    assert np.abs(np.corrcoef(many.T) - np.eye(4)).max() < 0.08
    with pytest.raises(ValueError, match="purpose"):
        rng.HashedUniform(0, "")


def test_one_process_is_a_group_of_one() -> None:
    tensor = torch.randn(3, 2, requires_grad=True)
    assert distributed.world_size() == 1
    assert distributed.rank() == 0
    assert not distributed.gather_no_grad(tensor).requires_grad
    assert distributed.gather_with_grad(tensor) is tensor
    assert distributed.any_rank(True)
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    distributed.barrier()


def test_an_error_while_writing_leaves_the_old_file_and_no_rest(tmp_path) -> None:
    target = tmp_path / "folder" / "file.json"
    files.write_json(target, {"version": 1})

    def write_half() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("the writer fails")

    with pytest.raises(RuntimeError, match="writer"):
        write_half()
    assert target.read_text() == '{\n  "version": 1\n}\n'
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(target, {"bad": float("nan")})
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]


def test_a_tensor_hash_sees_names_types_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    variants = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
    ]
    assert files.sha256_tensors(base) == files.sha256_tensors(dict(reversed(base.items())))
    assert len({files.sha256_tensors(tensors) for tensors in [base, *variants]}) == 5


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [1001, 12_000, 50_000])
def test_a_huge_image_is_refused_by_its_header(side) -> None:
    with pytest.raises(ImageError, match=r"bomb\.png: .*limit of 1000000"):
        decode_image(png(side, side), name="bomb.png", max_pixels=1_000_000)


@pytest.mark.parametrize("data", [b"", b"not an image", png(8, 8, b"\0" * 10)])
def test_what_is_not_an_image_is_named(data) -> None:
    with pytest.raises(ImageError, match="photo 7"):
        decode_image(data, name="photo 7")


def test_a_photograph_is_turned_upright(tmp_path) -> None:
    image = Image.fromarray(np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    assert load_image(path).size == (2, 4)
    assert load_image(path, mode="L").mode == "L"


def test_other_formats_are_not_even_tried() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="TIFF")
    with pytest.raises(ImageError, match="only JPEG, PNG, WEBP are read"):
        decode_image(buffer.getvalue(), name="x.tif")


def test_shapes_are_checked_by_letters() -> None:
    sizes = check_shape(torch.zeros(2, 3, 8, 8), "B 3 S S", name="image")
    assert sizes == {"B": 2, "S": 8}
    for pattern, known in [("B 4 S S", {}), ("B C S", {}), ("B 3 S S", {"S": 9})]:
        with pytest.raises(ValueError, match=r"image has shape \(2, 3, 8, 8\), expected"):
            check_shape(torch.zeros(2, 3, 8, 8), pattern, name="image", **known)
    with pytest.raises(ValueError, match="expected"):
        check_shape(torch.zeros(2, 3, 8, 7), "B 3 S S", name="image")
